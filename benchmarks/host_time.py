"""Microseconds of the host in one call of each op, and of a Llama's block, without a GPU.

    python benchmarks/host_time.py [--against CHECKOUT] [--only CASE,...] [--write docs/kernels.md]

Ops choose as they do on a GPU, on tiny CPU tensors, and their kernels, compiled for an H100, are
launched by a driver that does nothing (``stub_driver.py``): what is left is Python, Triton's part
of it included, PyTorch's dispatcher and autograd, and the arithmetic of tiny tensors. To tell these
apart, the ATen operators of a case are recorded, and called again one by one: ``operators`` is
that, ``ours`` is the rest of forward and backward. Time is the thread's own, so that other
processes count less; the median of all samples is taken, one of each case in turn: the block is
that of transformers (``eager``), ours, and ours with Inductor for the rest. With ``--against``, the
same cases run in another checkout of this repository, in turn, and a cell says what it was there
and what it is here.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_CALLS, _SAMPLES = 10, 15


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--only", type=lambda t: t.split(","), default=[], help="cases")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, help="put the table into this file")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(options.only)
    found = _in_turn([*filter(None, [options.against]), ROOT], options.only, options.rounds)
    text = "\n".join(table(found))
    print(text)
    if options.write:
        from kernel_code import put

        put(options.write, "host", text)
    if options.json:
        from environment import describe

        options.json.write_text(json.dumps(describe() | {"us": found}, indent=1) + "\n")
    return 0


def table(found: Sequence[dict[str, dict[str, float]]]) -> Iterator[str]:
    """Markdown.

    Args:
        found: case -> what it took in each checkout, the older one first.
    """
    heads = ("forward", "backward", "operators", "ours")
    yield f"| case | {' | '.join(heads)} |"
    yield f"|---|{'---|' * len(heads)}"
    for case in found[-1]:
        cells = [" → ".join(f"{side[case][h]:.0f}" for side in found) for h in heads]
        yield f"| {case} | {' | '.join(cells)} |"


def _in_turn(
    checkouts: Sequence[Path], only: Sequence[str], rounds: int
) -> list[dict[str, dict[str, float]]]:
    """The medians of each checkout, whose processes work in turn."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_worker(path, only)) for path in checkouts]
        samples: list[dict[str, dict[str, list[float]]]] = [{} for _ in workers]
        for _ in range(rounds):
            for worker, own in zip(workers, samples, strict=True):
                for case, values in _ask(worker).items():
                    for name, value in values.items():
                        own.setdefault(case, {}).setdefault(name, []).append(value)
    return [
        {case: {k: statistics.median(v) for k, v in values.items()} for case, values in own.items()}
        for own in samples
    ]


@contextlib.contextmanager
def _worker(checkout: Path, only: Sequence[str]) -> Iterator[Any]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "fusewright").symlink_to(checkout.resolve() / "src")
        path = os.pathsep.join([folder, str(ROOT / "benchmarks")])
        command = [sys.executable, str(Path(__file__).resolve()), "--worker"]
        with subprocess.Popen(
            [*command, *(("--only", ",".join(only)) if only else ())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        ) as process:
            try:
                yield process
            finally:
                process.communicate("")


def _ask(worker: Any) -> dict[str, dict[str, float]]:
    worker.stdin.write("\n")
    worker.stdin.flush()
    for line in worker.stdout:  # libraries print, too
        if line.startswith("{"):
            made: dict[str, dict[str, float]] = json.loads(line)
            return made
    raise RuntimeError("a worker has ended")


# -- in a worker -----------------------------------------------------------------------------------


def _work(only: Sequence[str]) -> int:
    """Measure all cases for each line that comes in."""
    import torch

    from host_cases import cases, launching_nothing, operators

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with launching_nothing():
        calls = dict(cases(only))
        floors = {case: operators(call) for case, call in calls.items()}
        gc.collect()
        gc.freeze()
        gc.disable()
        for _ in sys.stdin:
            print(json.dumps(_measure(calls, floors)))
            sys.stdout.flush()
            gc.collect()
    return 0


def _measure(
    calls: dict[str, Any], floors: dict[str, list[list[Callable[[], Any]]]]
) -> dict[str, dict[str, float]]:
    """Medians of each case, in microseconds."""
    times: dict[str, dict[str, list[float]]] = {case: defaultdict(list) for case in calls}
    for _ in range(_SAMPLES):
        for case, call in calls.items():
            for name, value in _sample(call, floors[case]).items():
                times[case][name].append(value)
    found = {}
    for case, samples in times.items():
        us = {name: statistics.median(values) for name, values in samples.items()}
        both = us["forward"] + us["backward"]
        found[case] = us | {"ours": both - us["operators"]}
    return found


def _sample(call: Any, floor: list[list[Callable[[], Any]]]) -> dict[str, float]:
    import torch

    def us(run: Callable[[], None]) -> float:
        began = time.thread_time_ns()
        run()
        return (time.thread_time_ns() - began) / _CALLS / 1e3

    outs: list[Any] = []

    def forward() -> None:
        outs.extend(call.forward() for _ in range(_CALLS))

    def backward() -> None:
        while call.backward is not None and outs:
            call.backward(outs.pop())

    def operators() -> None:
        for operator in itertools.chain(*floor * _CALLS):
            operator()

    found = {"forward": us(forward), "backward": us(backward)}
    outs.clear()
    call.clear()
    with torch.no_grad():
        return found | {"operators": us(operators)}


if __name__ == "__main__":
    sys.exit(main())
