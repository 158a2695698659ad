"""What a run leaves behind: what it trained, the last files, and their upload."""

from __future__ import annotations

import torch

from .checkpoint import save_model as export
from .checkpoint.files import CheckpointWriteError
from .report import result as report
from .report.result import RunResult
from .report.run_log import RunLog
from .trainer.signals import Interrupts
from .trainer.trainer import FineTuner


def save(trainer: FineTuner, result: RunResult) -> None:
    """Write what was trained; if the disk is full, the result says so."""
    try:
        export.save_whole(trainer.model, trainer.context.tokenizer, result.output_dir)
    except CheckpointWriteError as error:
        result.status, result.reason = "disk full", str(error)
        result.problems.append({"part": "saving", "error": str(error)})


def write(result: RunResult, run_log: RunLog) -> None:
    """Write the files that sum a run up: the plot, the page, the model card, and ``run.json``.

    One that cannot be written costs none of the others.
    """
    from .report import model_card as card
    from .report import page

    folder = result.output_dir
    logged = {entry["step"] for entry in result.history if "eval_loss" in entry}
    for step, loss in ((0, result.val_loss_before), (result.steps, result.val_loss_after)):
        if loss is not None and step not in logged:
            result.history.append({"step": step, "eval_loss": loss})
    result.history.sort(key=lambda entry: entry["step"])
    with run_log.guarded("plot"):
        export.plot(result.history, folder / "loss.png")
    result.peak_rss_mb = report.peak_rss_mb()
    if torch.cuda.is_available():
        result.peak_cuda_mb = torch.cuda.max_memory_allocated() / 2**20
    with run_log.guarded("report page"):
        page.write(result, folder)
    with run_log.guarded("model card"):
        card.write(result, folder)
    with run_log.guarded("run.json"):
        result.write()


def publish(trainer: FineTuner, result: RunResult, run_log: RunLog, interrupts: Interrupts) -> None:
    """Upload what is there, if the recipe wants that, and note in ``run.json`` what came of it."""
    if not (trainer.args.push_to_hub and result.steps):
        return
    with run_log.guarded("push to the hub"):
        if interrupts.signal is not None and result.signal is None:
            raise RuntimeError("a signal came while the last files were written")
        trainer.push_results()
    with run_log.guarded("run.json"):
        result.write()
