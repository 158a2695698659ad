"""Whole training steps (forward, backward, optimizer, zero_grad) of several engines, side by side.

    python benchmarks/train_step.py --model smollm2 --dtype bfloat16 --batch 4 --seq 256 \
        --engines eager,compile,fusewright --json FILE

Each engine has its own process and its own empty compile cache; the steps interleave. The JSON
file is a list with one object per engine; README.md beside this file explains its fields.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines import ENGINES, is_ours, known
from environment import describe
from harness import Run, run_interleaved
from shapes import MODELS
from workload import Job

DRIFT = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 2e-2}
"""How far engines' losses may drift apart, relative, over the steps of one benchmark."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every engine ran and their losses agree."""
    options = _parse(arguments)
    jobs = [_job(options, engine) for engine in options.engines]
    runs = run_interleaved(jobs)
    environment = describe()
    rows = [environment | row(run, options.warmup) for run in runs]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    drift = DRIFT[options.autocast or options.dtype]
    disagreement = compare_losses(runs, drift)
    print(disagreement or f"losses agree within {drift:g} (relative)")
    return 1 if disagreement or any(run.error for run in runs) else 0


def row(run: Run, warmup: int) -> dict[str, Any]:
    """One engine's figures; those that a failed engine lacks are None.

    Args:
        run: what the engine did.
        warmup: steps, the first included, that the median leaves out.
    """
    job, timed = run.job, run.steps[warmup:]
    complete = run.error is None
    median = statistics.median(step["seconds"] for step in timed) if complete else None
    figures: dict[str, Any] = {
        "engine": job.engine,
        "tokens_per_s": job.batch * job.seq / median if median else None,
        "first_step_s": run.seconds[0] if complete else None,
        "loss": run.losses[-1] if complete else None,
        "step_s": median,
    }
    last = run.steps[-1]["peak"] if complete else {}
    for kind, growth in (("rss_mb", "growth_mb"), ("gpu_mb", "growth_gpu_mb")):
        if kind == "rss_mb" or job.device == "cuda":
            peak, loaded = last.get(kind), run.loaded.get(kind)
            figures |= {f"peak_{kind}": peak, f"loaded_{kind}": loaded}
            figures[growth] = peak - loaded if complete else None
    figures |= {"activation_mb": run.activation_mb, "plan": run.plan}
    return (
        figures
        | run.setting
        | {
            "error": run.error,
            "losses": run.losses,
            "all_step_s": run.seconds,
            "warmup": warmup,
            "steps": len(timed),
            "model": job.model,
            "dtype": job.dtype,
            "batch": job.batch,
            "seq": job.seq,
            "method": job.method,
            "adapter_dtype": job.adapter_dtype,
            "lora_dropout": job.lora_dropout,
            "checkpointing": job.checkpointing,
            "memory": (job.engine.partition(":")[2] or job.memory) if is_ours(job.engine) else None,
            "flat": job.flat and is_ours(job.engine),
            "autocast": job.autocast,
            "device": job.device,
        }
    )


def compare_losses(runs: Sequence[Run], tolerance: float) -> str | None:
    """Say which engine's losses differ from the first complete engine's, or return None."""
    complete = [run for run in runs if run.error is None]
    for run in complete[1:]:
        worst = max_relative_difference(complete[0].losses, run.losses)
        if not worst <= tolerance:
            names = f"{run.job.engine} and {complete[0].job.engine}"
            return f"LOSSES DISAGREE: {names} by {worst:.2e} (relative; allowed {tolerance:g})"
    return None


def max_relative_difference(expected: Sequence[float], actual: Sequence[float]) -> float:
    """The largest difference of two loss curves, step by step, relative to ``expected``.

    NaN anywhere gives NaN, which no tolerance allows.
    """
    differences = [abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True)]
    return next((d for d in differences if d != d), max(differences))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The figures as text, with ratios to the first row (eager, unless left out)."""
    on_gpu = rows[0]["device"] == "cuda"
    peak, growth = ("peak_gpu_mb", "growth_gpu_mb") if on_gpu else ("peak_rss_mb", "growth_mb")
    head = f"{'engine':<16}{'tokens/s':>10}{'ratio':>8}{'first step':>12}"
    head += f"{peak:>14}{'ratio':>8}{growth:>16}{'ratio':>8}"
    lines = [head + f"{'activation_mb':>16}{'ratio':>8}{'loss':>10}"]
    for entry in rows:
        if entry["error"]:
            lines.append(f"{entry['engine']:<16}{entry['error']}")
            continue
        cells = f"{entry['engine']:<16}{entry['tokens_per_s']:>10.1f}"
        cells += f"{_ratio('tokens_per_s', entry, rows[0])}{entry['first_step_s']:>10.1f} s"
        cells += f"{entry[peak]:>14.0f}{_ratio(peak, entry, rows[0])}"
        cells += f"{entry[growth]:>16.0f}{_ratio(growth, entry, rows[0])}"
        cells += f"{entry['activation_mb']:>16.1f}{_ratio('activation_mb', entry, rows[0])}"
        lines.append(cells + f"{entry['loss']:>10.4f}")
    lines += [f"{entry['engine']}: {entry['plan']}" for entry in rows if entry["plan"]]
    return "\n".join(lines)


def _ratio(name: str, entry: dict[str, Any], base: dict[str, Any]) -> str:
    return f"{entry[name] / base[name]:>8.2f}" if base[name] else f"{'-':>8}"


def _job(options: argparse.Namespace, engine: str) -> Job:
    return Job(
        engine=engine,
        model=options.model,
        dtype=options.dtype,
        batch=options.batch,
        seq=options.seq,
        method=options.method,
        adapter_dtype=options.adapter_dtype,
        checkpointing=options.checkpointing,
        device=options.device,
        steps=options.warmup + options.steps,
        threads=options.threads,
        memory=options.memory,
        lora_dropout=options.lora_dropout,
        flat=options.flat,
        autocast=options.autocast,
    )


def engine_names(text: str) -> list[str]:
    """Parse ``--engines``."""
    wanted = text.split(",")
    for name in wanted:
        if not known(name):
            names = ", ".join(ENGINES)
            raise argparse.ArgumentTypeError(
                f"unknown engine {name!r}; known: {names}, fusewright:MEMORY"
            )
    return wanted


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is trained, shared with ``loss_curve.py``."""
    parser.add_argument("--model", default="smollm2", choices=["smollm2", *MODELS])
    parser.add_argument("--method", default="lora", choices=["full", "lora", "qlora"])
    parser.add_argument(
        "--adapter-dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="auto is PEFT's default: fp32 adapters over half-precision weights",
    )
    parser.add_argument("--lora-dropout", type=float, default=0.0, help="default 0")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing in every engine"
    )
    parser.add_argument(
        "--memory",
        default="speed",
        help="of the engine fusewright: speed, auto, min or <N>GB (default speed); "
        "fusewright:MEMORY has its own",
    )
    parser.add_argument(
        "--flat",
        action="store_true",
        help="fusewright's engines step small tensors as one, as its trainer does with adapters",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, help="file for the figures")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_workload_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DRIFT))
    parser.add_argument(
        "--autocast",
        choices=["bfloat16", "float16"],
        help="lower forward to it, in every engine; with --dtype float32, what trainers call bf16",
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--engines", type=engine_names, default="eager,compile,fusewright")
    parser.add_argument("--steps", type=int, default=7, help="timed steps (default 7)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default 2)")
    options = parser.parse_args(arguments)
    if options.warmup < 1 or options.steps < 1:
        parser.error("--warmup and --steps must be at least 1 (the first step is never timed)")
    return options


if __name__ == "__main__":
    sys.exit(main())
