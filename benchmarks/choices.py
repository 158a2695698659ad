"""What is raced on this CPU, against each alternative, in whole training steps.

    python benchmarks/choices.py --models tiny-llama,smollm2,gpt2-vocabulary --json FILE

A race times a form of computation by itself; here the winner and each candidate that it beat run a
whole step of a model, each in its own process, in turn. A loss is how much longer the fastest step
takes with the winner than with that candidate: what the race has cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engines import forcing
from environment import describe
from fusewright.kernels import candidates
from fusewright.kernels.choice import Choice, choices
from harness import Run, run_interleaved
from shapes import MODELS
from workload import Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, and print a table; 0 when every engine ran."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="smollm2", help="smollm2, or names of shapes.py")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--method", default="lora", choices=["full", "lora", "qlora"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="of which the first is not timed")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    models = options.models.split(",")
    if unknown := [m for m in models if m not in ("smollm2", *MODELS)]:
        parser.error(f"unknown models: {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    print("| model | dtype | question | chosen | step | instead | step | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for model in models:
        for dtype in options.dtypes.split(","):
            for row in compare(model, dtype, options):
                rows.append(describe() | row)
                print(line(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if any(row["error"] for row in rows) else 0


def compare(model: str, dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each candidate that a race has beaten."""
    # adapters are float32 over half-precision weights
    candidates.measure({torch.float32, getattr(torch, dtype)})
    engines = ["fusewright"]
    beaten: list[tuple[Choice, str]] = []
    for choice in choices():
        if not any(name in choice.question for name in (dtype, "float32")):
            continue
        for name in choice.microseconds:
            if name != choice.candidate:
                beaten.append((choice, name))
                engines.append(forcing(choice.question, name))
    jobs = [
        Job(
            engine=engine, model=model, dtype=dtype, batch=options.batch, seq=options.seq,
            method=options.method, adapter_dtype="auto", checkpointing=False, device="cpu",
            steps=options.steps, threads=options.threads,
        )
        for engine in engines
    ]  # fmt: skip
    raced, *others = run_interleaved(jobs)
    for (choice, name), other in zip(beaten, others, strict=True):
        chosen, instead = _fastest(raced), _fastest(other)
        yield {
            "model": model, "dtype": dtype, "batch": options.batch, "seq": options.seq,
            "method": options.method, "threads": options.threads,
            "question": choice.question, "chosen": choice.candidate, "step_s": chosen,
            "instead": name, "instead_step_s": instead,
            "loss": chosen / instead - 1 if chosen and instead else None,
            "error": raced.error or other.error,
        }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    start = f"| {row['model']} | {row['dtype']} | {row['question']} | {row['chosen']} "
    if row["error"]:
        return f"{start}| | {row['instead']} | | {row['error']} |"
    return (
        f"{start}| {row['step_s']:.3f} s | {row['instead']} | {row['instead_step_s']:.3f} s "
        f"| {row['loss']:+.1%} |"
    )


def _fastest(run: Run) -> float | None:
    return None if run.error else min(run.seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
