"""One entry to all comparisons: measure them, make the peers' environments, write the report.

python -m benchmarks                     # what there is, and how long it takes
python -m benchmarks peers               # environments of Unsloth, Axolotl and others
python -m benchmarks run                 # measure everything, into benchmarks/results
python -m benchmarks run training step --quick --out DIR
python -m benchmarks report              # tables, README's figures and the chart from results
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # the programs beside this one import each other so

import peers  # noqa: E402  2026-12-01: once they can be found
import report  # noqa: E402  2026-12-01: as above
from suite import SUITE, Measurement, named  # noqa: E402  2026-12-01: as above


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    options = _parse(arguments)
    match options.action:
        case "peers":
            return peers.main(options.names)
        case "report":
            return report.main(options.check)
        case "run":
            try:
                chosen = named(options.names)
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
            return _run(chosen, options.out, options.quick)
    for one in SUITE:
        print(f"{one.name:<44}{one.title}, about {one.minutes} minutes")
    print(f"peers: {', '.join(f'{n} ({_state(n)})' for n in peers.PEERS)}")
    return 0


def _state(name: str) -> str:
    return "installed" if peers.python(name) else "not installed"


def _run(chosen: Sequence[Measurement], out: Path, quick: bool) -> int:
    """Measure one after the other; 1 when any of them has failed, whose file is then not new."""
    out.mkdir(parents=True, exist_ok=True)
    more = tuple(name for name in peers.PEERS if peers.python(name))
    failed = []
    for one in chosen:
        program, *given = one.command(quick, more)
        command = [sys.executable, str(HERE / program), *given]
        command += ["--json", str((out / one.name).with_suffix(".json"))]
        print(f"== {one.title}: python benchmarks/{program} {' '.join(given)}", flush=True)
        if subprocess.run(command, check=False).returncode:
            failed.append(one.name)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = __doc__ or ""
    parser = argparse.ArgumentParser("python -m benchmarks", description=text.splitlines()[0])
    actions = parser.add_subparsers(dest="action")
    run = actions.add_parser("run", help="measure, on an idle machine")
    run.add_argument("names", nargs="*", help="the beginnings of names; all, if there are none")
    run.add_argument("--out", type=Path, default=report.RESULTS, help="where files are written")
    run.add_argument("--quick", action="store_true", help="tiny sizes: no figure means anything")
    made = actions.add_parser("peers", help="make the peers' environments")
    made.add_argument("names", nargs="*", help=f"of {', '.join(peers.PEERS)}; all, if none")
    written = actions.add_parser("report", help="write what people read from the results")
    written.add_argument("--check", action="store_true", help="only say what differs from them")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
