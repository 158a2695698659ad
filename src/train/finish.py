"""What comes after training: it is saved, examined, written up and uploaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..report import Report
from .checkpoint import save_model
from .checkpoint.files import CheckpointWriteError
from .inference import generation
from .model.tokenizer import pad_token
from .report.result import RunResult
from .report.run_log import RunLog
from .trainer.batches import training_batch
from .trainer.context import Context
from .trainer.evaluation import validate
from .trainer.signals import Interrupts
from .trainer.trainer import FineTuner


def save(trainer: FineTuner, result: RunResult) -> None:
    """Write what was trained; if the disk is full, the result says so."""
    try:
        save_model.save_whole(trainer.model, trainer.context.tokenizer, result.output_dir)
    except CheckpointWriteError as error:
        result.end("disk full", str(error))
        result.problems.append({"part": "saving", "error": str(error)})


def examine(
    model: Any, context: Context, sequences: Any, result: RunResult, run_log: RunLog
) -> None:
    """Explain ``model``; if training finished, validate, check the saved adapter, and answer.

    A part that fails costs none of the others.
    """
    recipe, tokenizer = context.recipe, context.tokenizer
    if recipe.optimize:
        with run_log.guarded("explaining"):
            from ..compiler.pipeline import explain

            found = explain(model)
            result.optimize = found.to_dict()
            run_log.say(str(found) if recipe.verbose else summary(found))
    if result.status != "finished":
        return
    if context.validation:
        with run_log.guarded("validation after"):
            loss = None if recipe.load_best_model_at_end else _validated_last(result)
            if loss is None:
                run_log.say("validating again")
                loss = validate(model, context.validation, run_log.say)["eval_loss"]
            result.val_loss_after = loss
    unchecked = save_model.uncheckable(model) if recipe.adapter else None
    if unchecked is not None:
        run_log.say(f"adapter check skipped: {unchecked}")
    elif recipe.adapter:
        with run_log.guarded("adapter check"):
            run_log.say("checking the saved adapter")
            probe = training_batch([next(iter(sequences))], recipe, pad_token(tokenizer))
            model, check = save_model.check_adapter(model, recipe, result.output_dir, probe)
            result.adapter_check = asdict(check)
    if result.sample:
        with run_log.guarded("answer after"):
            question = result.sample["question"]
            run_log.say("answering again")
            result.sample["after"] = generation.answer(model, tokenizer, question, recipe)


def _validated_last(result: RunResult) -> float | None:
    """The validation loss of the last step, if the loop has validated there."""
    losses = {h["step"]: h["eval_loss"] for h in result.history if "eval_loss" in h}
    return losses.get(result.steps)


def summary(found: Report) -> str:
    """The optimize report in a line."""
    kept = len(found.gaps()) + len(found.bypasses)
    left = f"; {kept} left as they were: report.html says why" if kept else ""
    return f"optimized: {found.headline()}{left} (--verbose: the whole table)"


def write(result: RunResult, run_log: RunLog) -> None:
    """Write the files that sum a run up: the plot, the page, the model card, and ``run.json``.

    One that cannot be written costs none of the others.
    """
    from .report import model_card as card
    from .report import page

    folder = result.output_dir
    result.complete()
    with run_log.guarded("plot"):
        save_model.plot(result.history, folder / "loss.png")
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
