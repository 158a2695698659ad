"""How speed and memory follow sizes: tokens, batch, vocabulary, layers, rank, samples of a pack.

    python benchmarks/curves.py --axes tokens,rank --json FILE

One size is varied at a time, the others stay: a Llama of SmolLM2's shape with 8 layers, random
weights and tokens, LoRA of rank 16 on all linears, bf16, 2 x 256. Engines step in turn, as in
``train_step.py``. A curve *bends the wrong way* where fusewright's speed relative to the first
engine is lower, by more than ``BEND``, than at the value before: with more work, calls weigh less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from environment import describe
from harness import run_interleaved
from shapes import model_shape
from train_step import DRIFT, compare_losses, engine_names, row
from workload import Job

AXES = {
    "tokens": (64, 256, 1024, 2048),
    "batch": (1, 2, 4, 8),
    "vocabulary": (8192, 49152, 151936),
    "layers": (2, 8, 30),
    "rank": (4, 16, 64, 256),
    "packing": (512, 128, 32),
}
"""The values of each; of ``packing``, tokens of a sample in packs of ``batch * seq`` tokens."""

BEND = 0.1


def varied(base: Job, axis: str, value: int) -> Job:
    """``base`` with one size changed."""
    match axis:
        case "tokens":
            return replace(base, seq=value)
        case "batch":
            return replace(base, batch=value)
        case "vocabulary":
            return replace(base, model=f"{base.model},vocab={value}")
        case "layers":
            return replace(base, model=f"{base.model},layers={value}")
        case "rank":
            return replace(base, rank=value)
        case _:
            return replace(base, sample=value)


def bends(points: Sequence[dict[str, Any]]) -> list[str]:
    """Where the ratio falls along an axis, in words."""
    found = []
    for before, after in itertools.pairwise(points):
        ratios = before["ratio"], after["ratio"]
        if None not in ratios and ratios[1] < ratios[0] * (1 - BEND):
            found.append(
                f"{after['axis']}: {ratios[0]:.2f}x at {before['value']:,}, "
                f"{ratios[1]:.2f}x at {after['value']:,}"
            )
    return found


def measure(options: argparse.Namespace, axis: str, value: int) -> tuple[list[Any], str | None]:
    """The rows of all engines at one point, and how their losses disagree."""
    base = Job(
        engine="", model=options.model, dtype=options.dtype, batch=options.batch, seq=options.seq,
        method="lora", adapter_dtype="auto", checkpointing=False, device="cpu",
        steps=options.steps + 1, threads=options.threads,
    )  # fmt: skip
    jobs = [replace(varied(base, axis, value), engine=engine) for engine in options.engines]
    runs = run_interleaved(jobs)
    rows = [{"axis": axis, "value": value} | row(run, warmup=1) for run in runs]
    first = rows[0]["tokens_per_s"]
    for entry in rows:
        rate = entry["tokens_per_s"]
        entry["ratio"] = rate / first if rate and first else None
    return rows, compare_losses(runs, DRIFT[options.dtype])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the axes; 0 when every engine ran and their losses agree."""
    options = _parse(arguments)
    about, rows, failed = describe(), [], False
    print("| axis | value | engine | tokens/s | ratio | growth, MB |\n|---|---|---|---|---|---|")
    for axis in options.axes:
        points = []
        for value in options.values or AXES[axis]:
            found, disagreement = measure(options, axis, value)
            for entry in found:
                failed |= entry["error"] is not None
                rate, ratio, growth = (entry[n] for n in ("tokens_per_s", "ratio", "growth_mb"))
                figures = entry["error"] or f"{rate:.1f} | {ratio:.2f} | {growth:.0f}"
                print(f"| {axis} | {value} | {entry['engine']} | {figures} |", flush=True)
            if disagreement:
                failed = True
                print(f"{axis} {value}: {disagreement}", file=sys.stderr)
            rows += [about | entry for entry in found]
            points.append(found[-1])
        for bend in bends(points):
            print(f"bends the wrong way: {bend}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if failed else 0


def _axes(text: str) -> list[str]:
    wanted = text.split(",")
    for axis in wanted:
        if axis not in AXES:
            raise argparse.ArgumentTypeError(f"unknown axis {axis!r}; known: {', '.join(AXES)}")
    return wanted


def _model(text: str) -> str:
    try:
        model_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", type=_axes, default=",".join(AXES))
    parser.add_argument(
        "--values", type=lambda text: [int(v) for v in text.split(",")], help="of one axis"
    )
    parser.add_argument("--model", type=_model, default="smollm2-shape,layers=8")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--engines", type=engine_names, default="eager,fusewright")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    if options.values and len(options.axes) > 1:
        parser.error("--values are of one axis: give one with --axes")
    return options


if __name__ == "__main__":
    sys.exit(main())
