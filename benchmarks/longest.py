"""The longest sequence whose training step fits into a memory budget, engine by engine.

    python benchmarks/longest.py --model smollm2 --budgets 1.5GB,2GB,3GB --verify --json FILE

A budget is the whole of a process's resident memory (on a GPU: the tensors on it), the loaded model
included, as in ``optimize(model, memory=…)``. Batch 1. The peers take real steps, longer and
longer, until one needs more than the largest budget. For fusewright the planner says how long a
sequence fits; with ``--verify`` one real step of that length, in a process of its own, says whether
it was right, and shorter ones follow where it was not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from environment import describe
from fusewright.memory.budget import GB
from harness import EngineError, EngineProcess
from train_step import DRIFT, add_workload_options
from workload import Job, build

MB = 1 << 20
PEERS = ("eager", "hf+gc")
TRIES = 3
"""Real steps that may follow a prediction, each shorter than the one before."""


@dataclass
class Longest:
    """What fits into one budget.

    Attributes:
        engine: its name.
        budget: bytes.
        tokens: the longest sequence that fits; 0 if not even the shortest does.
        predicted: the planner's peak for it, in MB; None for peers.
        peak: the measured peak, in MB; None if no step of that length was taken.
        loaded: of that, the loaded model.
        first: what the planner had said before a real step was too large, if one was.
        capped: whether nothing longer was tried.
    """

    engine: str
    budget: int
    tokens: int = 0
    predicted: float | None = None
    peak: float | None = None
    loaded: float | None = None
    first: int | None = None
    capped: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every engine ran and no verified prediction was too large."""
    options = _parse(arguments)
    job = _job(options, "fusewright")
    found: list[Longest] = []
    failed = False
    for peer in PEERS:
        try:
            found += climbed(_job(options, peer), options.budgets, options.step)
        except EngineError as error:
            failed = _tell(peer, error)
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # its memory goes with it
        ours = pool.apply(outlook, (job, options.budgets, options.step, options.most))
    for one in ours:
        try:
            found.append(verified(job, one, options.step) if options.verify else one)
        except EngineError as error:
            failed = _tell(f"{one.engine} at {one.budget / GB:g} GB", error)
    if options.json:
        rows = [describe() | _row(f, options) for f in found]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(table(found, options.budgets))
    wrong = [f for f in found if f.first is not None]
    for f in wrong:
        print(f"{f.engine} at {f.budget / GB:g} GB: {f.first:,} tokens were predicted to fit")
    return 1 if wrong or failed else 0


def _tell(engine: str, error: EngineError) -> bool:
    print(f"{engine}: failed, and is left out: {error}\n{error.details}", file=sys.stderr)
    return True


def outlook(job: Job, budgets: Sequence[int], step: int, most: int) -> list[Longest]:
    """What fusewright's planner says, from one step of ``job.seq`` tokens.

    Args:
        job: the training; its sequence is what others are reckoned from.
        budgets: bytes.
        step: lengths are multiples of this.
        most: the longest length to consider.
    """
    from fusewright import optimize
    from fusewright.compiler.pipeline import planner_of
    from fusewright.memory.choice import PlanInputs, choose, peak

    training = build(job)
    model = optimize(training.model, memory="1000000GB")
    model(input_ids=training.batches[0], labels=training.batches[0]).loss.backward()
    planner = planner_of(model)
    assert planner is not None
    ways: dict[str, Callable[[Any, PlanInputs], Any]] = {
        "speed": lambda usages, _: [planner.fastest()] * len(usages),
        "min": lambda usages, s: ["input"] * len(usages),
        "budget": choose,
    }
    found = [Longest(f"fusewright:{way}", budget) for way in ways for budget in budgets]
    for tokens in range(step, most + 1, step):
        made = planner.outlook(tokens / job.seq)
        if made is None:
            raise EngineError("no block was captured, so there is no plan")
        for one in found:
            setting = dataclasses.replace(made[1], budget=one.budget)
            levels = ways[one.engine.partition(":")[2]](made[0], setting)
            needed = peak(levels, made[0], setting)
            if needed <= one.budget:
                one.tokens, one.predicted = tokens, needed / MB
                one.capped = tokens + step > most
    return found


def verified(job: Job, found: Longest, step: int) -> Longest:
    """``found`` after one real step of that length, or of a shorter one that does fit."""
    predicted = found.tokens
    engine = f"fusewright:{found.budget / GB:g}GB" if found.engine.endswith("budget") else None
    for _ in range(TRIES):
        if not found.tokens:
            break
        one = dataclasses.replace(job, engine=engine or found.engine, seq=found.tokens, steps=1)
        loaded, peaks = _peaks(one, [found.tokens], found.budget)
        # no peak: no plan of this length fits, as the planner of that process says
        if peaks and peaks[0] * MB <= found.budget:
            found.peak, found.loaded = peaks[0], loaded
            break
        over = peaks[0] * MB / found.budget if peaks else 1.0
        found.first, found.predicted, found.capped = predicted, None, False
        found.tokens = min(int(found.tokens / over), found.tokens - step) // step * step
    else:
        found.tokens = 0
    return found


def climbed(job: Job, budgets: Sequence[int], step: int) -> list[Longest]:
    """What fits for an engine without a planner: real steps of one process, longer and longer."""
    lengths = list(range(step, job.seq + 1, step))
    loaded, peaks = _peaks(dataclasses.replace(job, steps=len(lengths)), lengths, max(budgets))
    found = [Longest(job.engine, budget, loaded=loaded) for budget in budgets]
    for one in found:
        for tokens, peak in zip(lengths, peaks, strict=False):
            if peak * MB <= one.budget:
                one.tokens, one.peak, one.capped = tokens, peak, tokens == lengths[-1]
    return found


def _peaks(job: Job, lengths: Sequence[int], enough: int) -> tuple[float, list[float]]:
    """Memory when loaded, and the peaks of steps of those lengths until one needs ``enough``.

    In MB. Fewer peaks than that where fusewright says that no plan fits.

    Raises:
        EngineError: the engine failed in another way; that says nothing about what fits.
    """
    kind = "gpu_mb" if job.device == "cuda" else "rss_mb"
    peaks: list[float] = []
    with EngineProcess(job) as process:
        try:
            process.load()
            for tokens in lengths:
                process.step(tokens)
                peaks.append(process.run.steps[-1]["peak"][kind])
                print(f"{job.engine}: {tokens} tokens, {peaks[-1]:.0f} MB", file=sys.stderr)
                if peaks[-1] * MB > enough:
                    break
        except EngineError as error:
            if not str(error).startswith("OptimizeError"):
                raise
            print(f"{job.engine}: {lengths[len(peaks)]} tokens: {error}", file=sys.stderr)
    return process.run.loaded.get(kind, 0.0), peaks


def table(found: Sequence[Longest], budgets: Sequence[int]) -> str:
    """The lengths as a table in Markdown, with the measured peak of each."""
    head = " | ".join(f"{b / GB:g} GB" for b in budgets)
    lines = [f"| longest sequence | {head} |", "|---" * (len(budgets) + 1) + "|"]
    for engine in dict.fromkeys(f.engine for f in found):
        own = {f.budget: f for f in found if f.engine == engine}
        cells = [_cell(own[b]) if b in own else "failed" for b in budgets]
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(f: Longest) -> str:
    if not f.tokens:
        return "none"
    length = f"{'at least ' if f.capped else ''}{f.tokens:,}"
    if f.peak is None:
        return f"{length} (predicted)"
    return f"{length} ({f.peak * MB / GB:.2f} GB)"


def _row(f: Longest, options: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "dtype", "method", "adapter_dtype", "device", "step", "most", "verify")
    return {
        "engine": f.engine,
        "budget_gb": f.budget / GB,
        "longest": f.tokens,
        "capped": f.capped,
        "predicted_mb": f.predicted,
        "peak_mb": f.peak,
        "loaded_mb": f.loaded,
        "predicted_longest": f.first or (f.tokens if f.predicted is not None else None),
    } | {n: getattr(options, n) for n in names}


def _job(options: argparse.Namespace, engine: str) -> Job:
    ours = engine == "fusewright"
    return Job(
        engine=engine,
        model=options.model,
        dtype=options.dtype,
        batch=1,
        seq=min(options.reference, options.most) if ours else options.most,
        method=options.method,
        adapter_dtype=options.adapter_dtype,
        checkpointing=options.checkpointing,
        device=options.device,
        steps=1,
        threads=options.threads,
        lora_dropout=options.lora_dropout,
        flat=options.flat,
    )


def _budgets(text: str) -> list[int]:
    from fusewright.memory.budget import Budget

    try:
        found = [Budget.parse(part).bytes for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if None in found:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes only, as in 1.5GB,2GB")
    return sorted(b for b in found if b is not None)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_workload_options(parser)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DRIFT))
    parser.add_argument("--budgets", type=_budgets, default="1.5GB,2GB,3GB")
    parser.add_argument("--step", type=int, default=256, help="lengths are multiples of this")
    parser.add_argument("--most", type=int, default=8192, help="the longest length tried")
    parser.add_argument(
        "--reference", type=int, default=1024, help="the length that predictions start from"
    )
    parser.add_argument("--verify", action="store_true", help="take a real step of each length")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
