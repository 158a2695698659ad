"""Whole training runs on the quickstart's rows: stock Trainer, TRL, fusewright, and peers.

    python benchmarks/training.py --json FILE

Each engine fine-tunes the same model with the same LoRA (rank 16 on all linears) for one epoch over
the same rows, on the same labels (the answers), so that all have seen the same trained tokens when
they end. The batches are equal in what counts, not in shape: stock takes ``--batch`` rows a step
and pads them to the longest; the others take as many packs of ``--sequence-len`` tokens a step as
makes their number of steps come nearest to stock's. All follow the same schedule of learning rates,
by steps, and so by trained tokens.

The engines run in processes of their own with cold compile caches, from one folder of plain
safetensors, and take their steps in turn. A step is everything from one turn to the next, reading
and collating included. Trained tokens (those with a label) per second are those of all steps but
the first, over their time; those that only a peer trains do not count. ``peak_rss_mb`` is the
highest resident memory from the start of training to the last step. At the end one function
computes the validation loss of every saved adapter, on plain PEFT.

Exit status 1 when an engine failed, or its validation loss is not within ``--tolerance`` of stock's
(relative).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
from environment import describe
from harness import EngineProcess, Run, attempt, say
from peers import PEERS
from training_data import Workload, prepared_workload
from training_engines import ENGINES, known
from training_job import TrainingJob

WORKER = Path(__file__).resolve().parent / "training_worker.py"
REQUIRED = {"stock": (2.5, 0.4), "stock-packed": (1.5, 0.4), "trl-nogc": (1.3, 0.4)}
"""What fusewright shall reach: trained tokens per second and peak memory over an engine's."""


class TrainingProcess(EngineProcess):
    """An engine that trains."""

    def __init__(self, job: TrainingJob) -> None:
        own = peers.python(job.engine) if job.engine in PEERS else None
        super().__init__(job, WORKER, python=own or sys.executable)

    @property
    def done(self) -> bool:
        """Whether there is no step left."""
        return bool(self.run.error or (self.run.steps and self.run.steps[-1]["last"]))

    def step(self) -> None:
        """Let the engine take one step, and wait for it."""
        last = self.ask("step")
        self.run.steps.append(last)
        rate = last["trained"] / last["seconds"]
        name = self.run.job.engine
        say(f"{name}: step {len(self.run.steps)}, {last['seconds']:.2f} s, {rate:.0f} trained/s")

    def finish(self) -> None:
        """Let the engine save its adapter."""
        self.run.setting["losses"] = self.ask("finish")["losses"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="fusewright-bench-") as folder:
        work = prepared_workload(options, Path(folder))
        jobs = [_job(options, work, engine, Path(folder)) for engine in options.engines]
        runs = _interleaved(jobs)
        losses = _validation_losses(jobs, runs, work)
    rows = [describe() | row(run, losses, work) for run in runs]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows, losses["base"]))
    verdict, agreed = judge(rows, options.tolerance)
    print(verdict)
    return 0 if agreed and not any(run.error for run in runs) else 1


def row(run: Run, losses: dict[str, float], work: Workload) -> dict[str, Any]:
    """One engine's figures; those that a failed engine lacks are None."""
    job, complete = run.job, run.error is None
    timed = run.steps[1:] or run.steps
    spent = sum(step["seconds"] for step in timed)
    trained = sum(step["trained"] for step in run.steps)
    more = PEERS[job.engine].more * work.count if job.engine in PEERS else 0
    alike = 1 - more / max(trained, 1)
    figures: dict[str, Any] = {
        "trained_tokens_per_s":
            alike * sum(s["trained"] for s in timed) / spent if complete else None,
        "tokens_per_s": sum(s["width"] for s in timed) / spent if complete else None,
        "first_step_s": run.seconds[0] if complete else None,
        "peak_rss_mb": run.steps[-1]["peak"]["rss_mb"] if complete else None,
        "validation_loss": losses.get(job.engine),
        "trained_tokens": trained - more,
        "more_trained_tokens": more,
        "steps": len(run.steps),
    }  # fmt: skip
    return {
        "engine": job.engine,
        "peer_versions": peers.installed(job.engine) if job.engine in PEERS else None,
        **figures,
        "loaded_rss_mb": run.loaded.get("rss_mb"),
        "all_step_s": run.seconds,
        "all_trained": [step["trained"] for step in run.steps],
        **run.setting,
        "error": run.error,
        "base_validation_loss": losses["base"],
        "dtype": job.dtype,
        "batch": job.batch,
        "packs": job.packs,
        "sequence_len": job.sequence_len,
        "learning_rate": job.learning_rate,
        "rows_trained_tokens": work.trained,
    }


def table(rows: Sequence[dict[str, Any]], base: float) -> str:
    """The figures as text, with ratios to the first row."""
    lines = [
        f"{'engine':<18}{'trained/s':>10}{'ratio':>7}{'peak_rss_mb':>13}{'ratio':>7}"
        f"{'val. loss':>11}{'first step':>12}{'steps':>7}{'trained':>9}"
    ]
    for entry in rows:
        if entry["error"]:
            lines.append(f"{entry['engine']:<18}{entry['error']}")
            continue
        cells = f"{entry['engine']:<18}"
        for name, width in (("trained_tokens_per_s", 10), ("peak_rss_mb", 13)):
            base_figure = rows[0][name]
            ratio = f"{entry[name] / base_figure:>7.2f}" if base_figure else f"{'-':>7}"
            cells += f"{entry[name]:>{width}.0f}{ratio}"
        cells += f"{entry['validation_loss']:>11.4f}{entry['first_step_s']:>10.1f} s"
        lines.append(cells + f"{entry['steps']:>7}{entry['trained_tokens']:>9,}")
    lines.append(f"validation loss before training: {base:.4f}")
    return "\n".join(lines)


def judge(rows: Sequence[dict[str, Any]], tolerance: float) -> tuple[str, bool]:
    """Say whether the losses agree, and how fusewright stands to each of the others.

    Returns:
        The text, and whether all trained the same tokens to the same loss.
    """
    complete = [entry for entry in rows if not entry["error"]]
    lines, agreed = [], True
    for entry in complete[1:]:
        first = complete[0]
        apart = abs(entry["validation_loss"] / first["validation_loss"] - 1)
        same = entry["trained_tokens"] == first["trained_tokens"]
        agreed &= same and apart <= tolerance
        if not (same and apart <= tolerance):
            lines.append(
                f"NOT THE SAME TRAINING: {entry['engine']} and {first['engine']} differ by "
                f"{apart:.2%} in loss, {entry['trained_tokens']:,} and "
                f"{first['trained_tokens']:,} trained tokens"
            )
    if agreed:
        lines.append(f"validation losses agree within {tolerance:.1%}")
    ours = [entry for entry in complete if entry["engine"].startswith("fusewright")]
    for mine in ours:
        for other in complete:
            speed, memory = REQUIRED.get(other["engine"], (None, None))
            if speed is None or memory is None:
                continue
            faster = mine["trained_tokens_per_s"] / other["trained_tokens_per_s"]
            leaner = mine["peak_rss_mb"] / other["peak_rss_mb"]
            lines.append(
                f"{mine['engine']} against {other['engine']}: {faster:.2f} x trained tokens/s "
                f"(aim {speed}: {_met(faster >= speed)}), {leaner:.0%} of its peak "
                f"(aim {memory:.0%}: {_met(leaner <= memory)})"
            )
    return "\n".join(lines), agreed


def _met(yes: bool) -> str:
    return "met" if yes else "MISSED"


# --- the run --------------------------------------------------------------------------------------


def _interleaved(jobs: Sequence[TrainingJob]) -> list[Run]:
    """Load one after another, then step in turn until nobody has steps left, then save."""
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:
        processes = []
        for job in jobs:
            if job.engine in PEERS and peers.python(job.engine) is None:
                missing = f"no environment for it: python -m benchmarks peers {job.engine}"
                runs.append(Run(job, error=missing))
                continue
            say(f"{job.engine}: loading")
            process = stack.enter_context(TrainingProcess(job))
            processes.append(process)
            runs.append(process.run)
            attempt(process, process.load)
        number = 0
        while any(not process.done for process in processes):
            turn = number % len(processes)  # nobody is always the one after the same neighbour
            for process in processes[turn:] + processes[:turn]:
                if not process.done:
                    attempt(process, process.step)
            number += 1
        for process in processes:
            attempt(process, process.finish)
    return runs


def _validation_losses(
    jobs: Sequence[TrainingJob], runs: Sequence[Run], work: Workload
) -> dict[str, float]:
    """The loss of the base, and of every saved adapter on it, by plain PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from fusewright.train.data import collate
    from fusewright.train.trainer.evaluation import Batches, validate

    def measured(model: Any) -> float:
        batches = Batches(
            [[sample] for sample in work.validation], 4, lambda p: collate(p, 0, False, 1 << 20)
        )
        return validate(model.eval(), {"held out": batches})["eval_loss"]

    dtype = getattr(torch, jobs[0].dtype)
    adapters = {run.job.engine: run.job.output for run in runs if run.error is None}
    found = {}
    for name, adapter in {"base": None, **adapters}.items():
        model: Any = AutoModelForCausalLM.from_pretrained(jobs[0].base, dtype=dtype)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        found[name] = measured(model)
        say(f"{name}: validation loss {found[name]:.4f}")
    return found


def _job(options: argparse.Namespace, work: Workload, engine: str, folder: Path) -> TrainingJob:
    return TrainingJob(
        engine=engine,
        base=str(work.base),
        rows=str(work.rows),
        samples=str(work.samples),
        output=str(folder / engine.replace(":", "-")),
        sequence_len=options.sequence_len,
        batch=options.batch,
        packs=work.packs,
        steps=work.steps,
        learning_rate=options.learning_rate,
        dtype=options.dtype,
        threads=options.threads,
    )


def engine_names(text: str) -> list[str]:
    """Parse ``--engines``."""
    wanted = text.split(",")
    for name in wanted:
        if not known(name):
            raise argparse.ArgumentTypeError(
                f"unknown engine {name!r}; known: {', '.join(ENGINES)}, fusewright:MEMORY, "
                f"and of other environments {', '.join(PEERS)}"
            )
    return wanted


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", type=engine_names, default="stock,trl,fusewright")
    parser.add_argument("--base", type=Path, help="a model folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", type=Path, help="JSONL chats (default: the quickstart's)")
    parser.add_argument("--rows", type=int, default=192, help="rows to train on (default 192)")
    parser.add_argument("--validation-rows", type=int, default=48, help="default 48")
    parser.add_argument("--sequence-len", type=int, default=512, help="of a pack (default 512)")
    parser.add_argument("--batch", type=int, default=8, help="padded rows of a step (default 8)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="default 5e-4")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--tolerance", type=float, default=0.01, help="of the loss (default 0.01)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
