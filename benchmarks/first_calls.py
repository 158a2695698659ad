"""Seconds of the first call of every architecture that transformers has, two layers of each.

    python benchmarks/first_calls.py --json FILE
    python benchmarks/first_calls.py bailing_hybrid kimi_linear

A call is a forward and a backward pass of the optimized model, in eager code: capture, rewriting
and verification are in it, building the model and importing PyTorch, Transformers and what else
the model needs are not (a call of the model before it is optimized sees to that). Each model has
its own process, and they run one after another. The models are those of the tests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environment import describe

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every model was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="architectures; without any, all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT))
    if options.one:
        print(json.dumps(measure(options.one)))
        return 0
    from tests.models import architectures

    rows = [_in_process(name) for name in options.names or architectures.names()]
    rows.sort(key=lambda row: -row.get("seconds", 0.0))
    if options.json:
        options.json.write_text(json.dumps([describe() | row for row in rows], indent=2) + "\n")
    for row in rows:
        print(_line(row))
    return int(any("error" in row for row in rows))


def _in_process(name: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"model": name, "error": lines[-1] if lines else f"ended with {done.returncode}"}
    row = {"model": name, **json.loads(done.stdout.splitlines()[-1])}
    print(_line(row), file=sys.stderr, flush=True)
    return row


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['model']:28} {row['error']}"
    return (
        f"{row['model']:28} {row['seconds']:6.1f} s, {row['processor']:6.1f} s of the processor; "
        f"eager {row['eager']:.2f} s"
    )


def measure(name: str) -> dict[str, float]:
    """Seconds of the first optimized call, and of the call before it."""
    from fusewright import optimize
    from tests.models import architectures

    model = architectures.build(name)
    inputs = architectures.step_inputs(model)
    eager, _ = _call(model, inputs)
    optimize(model, codegen="eager")
    seconds, processor = _call(model, inputs)
    return {"seconds": seconds, "processor": processor, "eager": eager}


def _call(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    start, processor = time.perf_counter(), time.process_time()
    model(**inputs).loss.backward()
    return time.perf_counter() - start, time.process_time() - processor


if __name__ == "__main__":
    sys.exit(main())
