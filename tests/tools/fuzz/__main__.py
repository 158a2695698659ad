"""``python -m tests.tools.fuzz FIRST [COUNT] [--codegen C] [--show]``: try seeds."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import time

import torch

from .compare import check, draw, script


def main() -> int:
    """Try seeds; the exit status is 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.tools.fuzz", description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("count", type=int, nargs="?", default=1)
    parser.add_argument("--codegen", choices=["eager", "inductor"], default="eager")
    parser.add_argument("--memory", choices=["speed", "min"])
    parser.add_argument("--show", action="store_true", help="print a script for each failure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: collections.Counter[str] = collections.Counter()
    start = time.time()
    for seed in range(args.first, args.first + args.count):
        program = draw(seed)
        options = {**program.options, "codegen": args.codegen}
        if args.memory:
            options["memory"] = args.memory
        program = dataclasses.replace(program, options=options)
        failure = check(program)
        if failure is not None:
            found[failure.kind] += 1
            print(f"seed {seed}: {failure.kind} at {failure.place}: {failure.detail}", flush=True)
            if args.show:
                print(script(program))
    seconds = time.time() - start
    print(f"{args.count} programs in {seconds:.0f} s, failures: {dict(found) or 'none'}")
    return bool(found)


if __name__ == "__main__":
    raise SystemExit(main())
