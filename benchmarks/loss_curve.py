"""Does fusewright train like eager? The losses of both from one seed, step by step.

    python benchmarks/loss_curve.py --dtype float32 --steps 20 --json FILE

Exit status 1 when any step's losses differ by more than ``--tolerance`` (relative).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from environment import describe
from harness import run_interleaved
from train_step import add_workload_options, max_relative_difference
from workload import Job


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the two loss curves."""
    options = _parse(arguments)
    fields = {name: value for name, value in vars(options).items() if name in Job.__annotations__}
    runs = run_interleaved([Job(engine=name, **fields) for name in ("eager", "fusewright")])
    failed = [f"{run.job.engine}: {run.error}" for run in runs if run.error]
    if failed:
        print("\n".join(failed))
        return 1
    eager, ours = runs
    worst = max_relative_difference(eager.losses, ours.losses)
    passed = worst <= options.tolerance
    print(f"{'step':>5}{'eager':>12}{'fusewright':>12}{'relative':>12}")
    for number, (a, b) in enumerate(zip(eager.losses, ours.losses, strict=True), 1):
        print(f"{number:>5}{a:>12.6f}{b:>12.6f}{abs(a - b) / abs(a):>12.2e}")
    print(f"largest relative difference {worst:.2e}, allowed {options.tolerance:g}")
    if options.json:
        result = (
            fields
            | describe()
            | {
                "eager": eager.losses,
                "fusewright": ours.losses,
                "max_relative_difference": worst,
                "tolerance": options.tolerance,
                "passed": passed,
            }
        )
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if passed else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_workload_options(parser)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=1e-3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
