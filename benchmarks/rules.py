"""What each rewrite rule gains: it alone switched off, against all of them, in one process.

    python benchmarks/rules.py --model smollm2-shape --layers 4 --batch 4 --seq 256 --rounds 7
    python benchmarks/rules.py --workloads lora-bfloat16,qlora-bfloat16 --codegen eager --json FILE

Each workload has one model. Its variants (all rules; all rules once more; each rule that rewrote
something off, as with ``FUSEWRIGHT_DISABLE``; eager) are copies of its modules over the same
weights, and take turns in every round, in another order each time. A time is that of forward and
backward, in seconds of this process (``--wall``: by the clock), the median of the rounds; on a
shared machine, use one thread. What is called noise is the spread of the rounds' ratios of the two
variants that are alike: twice their median deviation from 1. A rule that is off and faster by more
than that is marked ``loses``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from environment import describe
from shapes import MODELS
from workload import Job, build, forward

WORKLOADS = ("lora-bfloat16", "lora-float32", "qlora-bfloat16", "full-float32")
"""Method and dtype of the base weights."""

ALL, AGAIN, EAGER = "all rules", "all rules, again", "eager"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the workloads, and print a table of each; 1 if a rule loses somewhere."""
    options = _parse(arguments)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for workload in options.workloads:
        found = measure(workload, options)
        rows += [describe() | row for row in found]
        print(table(found), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["verdict"] == "loses" for row in rows))


def measure(workload: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of one workload: a row for each variant."""
    import torch

    from fusewright import explain, optimize
    from fusewright.passes import PIPELINE

    os.environ.setdefault("FUSEWRIGHT_SMALL", "optimize")  # a small block would have no rules
    method, dtype = workload.split("-")
    name = options.model
    if options.layers:
        name = f"{options.model}, {options.layers} layers"
        MODELS[name] = dataclasses.replace(MODELS[options.model], layers=options.layers)
    job = Job(
        EAGER, name, dtype, options.batch, options.seq, method, "auto", False, "cpu", steps=1
    )  # fmt: skip
    training = build(job)
    (ids,), plain = training.batches, training.model

    def variant(without: str | None) -> Any:
        rules = [rule for rule in PIPELINE if rule.name != without]
        return optimize(_over_same_weights(plain), passes=rules, codegen=options.codegen)

    def run(model: Any) -> float:
        now = time.perf_counter if options.wall else time.process_time
        start = now()
        forward(model, ids, None).backward()
        taken = now() - start
        for parameter in plain.parameters():
            parameter.grad = None
        return taken

    variants = {EAGER: plain, ALL: variant(None), AGAIN: variant(None)}
    run(variants[ALL])
    sites = [site for site in explain(variants[ALL]).sites if site.status == "rewritten"]
    fired = {site.rule for site in sites}
    variants |= {rule.name: variant(rule.name) for rule in PIPELINE if rule.name in fired}
    torch._dynamo.config.recompile_limit = 64  # one code object serves all variants
    times = interleaved({name: lambda m=m: run(m) for name, m in variants.items()}, options.rounds)
    counts = {rule: sum(site.rule == rule for site in sites) for rule in fired}
    return [{"workload": workload, **row, "sites": counts.get(row["off"])} for row in rows(times)]


def interleaved(
    runs: dict[str, Callable[[], float]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """The times of each round; the first ones, which compile, are left out."""
    order, draw = list(runs), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        draw.shuffle(order)
        for name in order:
            taken = runs[name]()
            if number >= warmup:
                times[name].append(taken)
    return times


def rows(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """For each variant: its time, relative to all rules, and whether that is more than noise."""
    base = times[ALL]
    alike = [again / first for again, first in zip(times[AGAIN], base, strict=True)]
    noise = 2 * statistics.median(abs(ratio - 1) for ratio in alike)
    found = []
    for name, taken in times.items():
        ratio = statistics.median(t / b for t, b in zip(taken, base, strict=True))
        verdict = "gains" if ratio > 1 + noise else "loses" if ratio < 1 - noise else "noise"
        if name in (ALL, AGAIN, EAGER):
            verdict = ""
        found.append(
            {
                "off": name, "seconds": statistics.median(taken), "ratio": ratio, "noise": noise,
                "verdict": verdict,
            }
        )  # fmt: skip
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one workload as Markdown."""
    noise = rows[0]["noise"]
    lines = [
        f"{rows[0]['workload']}; noise {100 * noise:.1f}%",
        "| off | sites | seconds | relative to all rules | the rule |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["ratio"]):
        sites = "" if row["sites"] is None else row["sites"]
        lines.append(
            f"| {row['off']} | {sites} | {row['seconds']:.3f} | {row['ratio']:.3f} "
            f"| {row['verdict']} |"
        )
    return "\n".join(lines) + "\n"


def _over_same_weights(model: Any) -> Any:
    """A copy of the modules over the same parameters and buffers."""
    same = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-shape", choices=MODELS)
    parser.add_argument("--layers", type=int, default=0, help="default: those of the model")
    parser.add_argument("--workloads", type=_workloads, default=",".join(WORKLOADS))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--codegen", default="auto", choices=["auto", "eager", "inductor"])
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--wall", action="store_true", help="time by the clock")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _workloads(text: str) -> list[str]:
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in WORKLOADS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(WORKLOADS)}")
    return wanted


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
