"""Training steps of a large model: engines times batches, each engine's model loaded once.

    python benchmarks/step_matrix.py --device cuda --method qlora --json FILE

What ``gpu.sh steps`` runs. Unlike ``train_step.py``, whose engines take steps in turn, one engine
has the GPU at a time: two copies of such a model and what their steps keep do not fit. Engines are
taken in the order of ``--engines``, workloads in that of ``--workloads``; what ``--seconds`` does
not suffice for is skipped, and the file has whatever was measured by then. An engine whose process
a workload has ended is loaded again for the next one.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import is_ours
from environment import describe, write_whole
from harness import EngineError, EngineProcess, say
from shapes import MODELS
from train_step import DRIFT, engine_names, max_relative_difference
from workload import Job

WORKER = Path(__file__).resolve().parent / "matrix_worker.py"

PACKAGES = {"liger": "liger_kernel", "unsloth": "unsloth"}
"""Engine -> the package that it needs; asked before a model is loaded for it."""


@dataclass(frozen=True)
class Workload:
    """What one step is of.

    Attributes:
        name: in tables and files.
        batch: sequences.
        seq: tokens per sequence.
        sample: tokens of each sample of a pack; 0 where a sequence is one sample.
        autocast: the dtype of autocast, or None.
    """

    name: str
    batch: int
    seq: int
    sample: int = 0
    autocast: str | None = None


def workload(name: str) -> Workload:
    """By name: ``1x2048``, or ``pack-8192`` (of samples of 512); with autocast ``-autocast``."""
    match = re.fullmatch(r"(?:(\d+)x|pack-)(\d+)(-autocast)?", name)
    if match is None:
        raise argparse.ArgumentTypeError(f"{name!r} is no workload: 1x2048 or pack-8192-autocast")
    batch, seq, autocast = match.groups()
    length = int(seq)
    sample = 0 if batch else min(512, max(length // 3, 1))
    return Workload(name, int(batch or 1), length, sample, "bfloat16" if autocast else None)


def _workloads(text: str) -> list[Workload]:
    return [workload(name) for name in text.split(",")]


SMOKE = "1x32-autocast,pack-48"


def main(
    arguments: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic
) -> int:
    """Measure; 0 when what is ours ran with all its kernels, and losses agree."""
    options = _parse(arguments)
    end = clock() + options.seconds - options.spare
    environment = describe()
    rows: list[dict[str, Any]] = []
    for number, engine in enumerate(options.engines):
        share = _weight(engine) / sum(map(_weight, options.engines[number:]))
        for row in measure(engine, options, clock, clock() + share * (end - clock())):
            rows.append(environment | row)
            say(line(rows[-1], rows))
            if options.json:
                write_whole(options.json, json.dumps(rows, indent=2) + "\n")
    print(table(rows))
    found = problems(rows)
    print("\n".join(found) or f"losses agree within {DRIFT['bfloat16']:g} (relative)")
    return 1 if found else 0


def _missing(engine: str) -> str:
    """Why an engine cannot run here, as far as is known without a model."""
    package = PACKAGES.get(engine)
    there = package is None or importlib.util.find_spec(package) is not None
    return "" if there else f"{package} is not installed"


def _weight(engine: str) -> float:
    """An engine's part of the time that is left. Ours compiles."""
    if _missing(engine):
        return 1e-9
    return 2.0 if is_ours(engine) else 1.0


def measure(
    engine: str, options: argparse.Namespace, clock: Callable[[], float], end: float
) -> Iterator[dict[str, Any]]:
    """One row for each workload; without figures, it says why.

    Args:
        engine: its name.
        options: of the command line.
        clock: tells the seconds.
        end: when no further workload is begun.
    """
    common = {
        "engine": engine, "method": options.method, "model": options.model, "dtype": options.dtype,
        "device": options.device,
    }  # fmt: skip
    wanted = options.workloads
    if reason := _missing(engine) or ("no time left" if clock() >= end else ""):
        yield from (common | {"workload": w.name, "skipped": reason} for w in wanted)
        return
    job = Job(
        engine=engine, model=options.model, dtype=options.dtype, batch=1, seq=1,
        method=options.method, adapter_dtype="auto", checkpointing=False, device=options.device,
        steps=1,
    )  # fmt: skip
    left = list(enumerate(wanted))
    while left:  # again, in a process of its own, where a workload has ended the last one
        say(f"{engine}: loading {job.model}")
        with EngineProcess(job, WORKER, options.cache) as process:
            begun, error = clock(), ""
            try:
                process.load()
            except EngineError as failure:
                error = str(failure)
                say(f"{engine}: failed: {failure}\n{failure.details}")
            common |= {"load_s": clock() - begun, **process.run.setting}
            ended = False
            while left and not ended:
                number, wanted_now = left.pop(0)
                row = common | {"workload": wanted_now.name, "autocast": wanted_now.autocast}
                if "EngineUnavailableError" in error:
                    yield row | {"skipped": error}
                elif error:
                    yield row | {"error": error}
                elif clock() >= end:
                    yield row | {"skipped": "no time left"}
                else:
                    try:
                        reply = process.ask(_request(wanted_now, number, engine, options))
                    except EngineError as failure:
                        reply = {"failed": str(failure), "fallbacks": {}, "ended": True}
                    yield row | figures(reply, wanted_now, options.device)
                    ended = bool(reply.get("ended"))


def _request(workload: Workload, number: int, engine: str, options: argparse.Namespace) -> str:
    """The worker's line; the first workload is profiled."""
    traced = number == 0 and engine in (options.engines[0], "fusewright")
    name = f"{options.trace}-{engine}.json.gz" if options.trace and traced else ""
    return json.dumps(
        dataclasses.asdict(workload)
        | {"seed": number, "warmup": options.warmup, "steps": options.steps}
        | {"profile": traced, "trace": name}
    )


def figures(reply: dict[str, Any], workload: Workload, device: str) -> dict[str, Any]:
    """A row's figures, from the worker's reply."""
    if "failed" in reply:
        return {"error": reply["failed"], "fallbacks": reply["fallbacks"]}
    kind = "gpu_mb" if device == "cuda" else "rss_mb"
    median = statistics.median(reply["all_step_s"])
    loaded = reply["loaded"][kind]
    return {
        "tokens_per_s": workload.batch * workload.seq / median,
        "step_s": median,
        "loaded_mb": loaded,
        "growth_mb": reply["steady_peak"][kind] - loaded,
        "first_step_growth_mb": reply["first_peak"][kind] - loaded,
        **{k: reply[k] for k in ("first_step_s", "all_step_s", "losses", "fallbacks")},
        **{k: reply.get(k) for k in ("free_step_s", "planned", "profile")},
    }


def line(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A row as text, with its ratio to the first engine's of the same workload."""
    start = f"{row['method']:<7}{row['engine']:<16}{row['workload']:<20}"
    for kind in ("skipped", "error"):
        if kind in row:
            return f"{start}{kind}: {row[kind]}"
    base = next((r for r in rows if r["workload"] == row["workload"] and "step_s" in r), row)
    text = f"{start}{row['tokens_per_s']:>10.1f} tokens/s{base['step_s'] / row['step_s']:>7.2f}x"
    text += f"{row['growth_mb']:>10.0f} MB over {row['loaded_mb']:.0f}"
    text += f", first step {row['first_step_s']:.1f} s and {row['first_step_growth_mb']:.0f} MB"
    if row["free_step_s"]:
        text += f"; running freely {row['free_step_s'] * 1e3:.1f} ms a step"
    if planned := row["planned"]:
        text += f"; planned {planned['predicted_mb']:.0f} MB, took {planned['measured_mb']:.0f}"
    if found := row["profile"]:
        text += f"; idle {found['idle_ms']:.1f} of {found['idle_ms'] + found['busy_ms']:.1f} ms"
        text += f" in {found['gaps']} gaps between {found['kernels']} kernels"
    return text


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as text, and the longest gaps of the profiled steps."""
    lines = [line(row, rows) for row in rows]
    for row in rows:
        for gap in (row.get("profile") or {}).get("longest", ()):
            text = f"idle {gap['us']:.0f} us after {gap['after'][:60]}, before {gap['before'][:60]}"
            lines.append(f"{row['engine']} {row['workload']}: {text}")
    return "\n".join(lines)


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What makes the run fail: ours or the first engine in error, losses that differ, fallbacks.

    Another engine's error is a figure: plain eager may not have the memory for a workload.
    """
    found = []
    for row in rows:
        where = f"{row['engine']}, {row['workload']}"
        if "error" in row and is_ours(row["engine"]):
            found.append(f"{where}: {row['error']}")
        found += [
            f"{where}: without its kernel: {n}: {r}" for n, r in row.get("fallbacks", {}).items()
        ]
        base = next((r for r in rows if r["workload"] == row["workload"] and "losses" in r), row)
        if base is not row and "losses" in row:
            apart = max_relative_difference(base["losses"][:1], row["losses"][:1])
            if not apart <= DRIFT["bfloat16"]:
                names = f"{row['engine']} and {base['engine']} on {row['workload']}"
                found.append(f"LOSSES DISAGREE: {names} by {apart:.2e} (relative)")
    if not any("step_s" in row for row in rows):
        found.append("no engine ran")
    return list(dict.fromkeys(found))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-8b", choices=list(MODELS))
    parser.add_argument("--method", default="lora", choices=["lora", "qlora", "full"])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=list(DRIFT))
    parser.add_argument(
        "--engines", type=engine_names, default="hf,fusewright,hf+gc,liger,unsloth",
        help="the first one is the base of the ratios",
    )  # fmt: skip
    parser.add_argument(
        "--workloads", type=_workloads, default="1x2048-autocast,pack-8192-autocast,1x2048",
        help="what matters most first; autocast is to bf16, or to fp16 where --dtype is",
    )  # fmt: skip
    parser.add_argument("--cache", type=Path, help="folder of compiled code, shared by all engines")
    parser.add_argument("--warmup", type=int, default=1, help="steps after the first one")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--seconds", type=float, default=300, help="for everything")
    parser.add_argument(
        "--spare", type=float, default=15, help="of these, to end the last workload"
    )
    parser.add_argument("--trace", default="", help="how the files of profiled steps begin")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, short sequences")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.model, options.steps, options.spare = "tiny-llama", 2, 0.0
        options.workloads = _workloads(SMOKE)
        options.engines = [e for e in options.engines if e != "hf+gc"]
    if options.dtype == "float16":
        options.workloads = [
            dataclasses.replace(w, autocast=w.autocast and options.dtype) for w in options.workloads
        ]
    return options


if __name__ == "__main__":
    sys.exit(main())
