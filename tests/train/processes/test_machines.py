"""``torchrun`` on two machines: what one process trains, and one report.

The machines are namespaces of this one, each with a network, a name and some files of its own. They
are skipped, with the reason, where such cannot be made. They share ``output_dir``, as they must,
but not the prepared rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from .machines import ADDRESSES, NAMES, CannotBeMade, two_machines
from .ranks import free_port
from .runs import Run, Runs
from .test_runs import assert_as_one, assert_said_once

pytestmark = pytest.mark.slow

PORT = 29500
LISTED = "\n".join(map(" ".join, zip(ADDRESSES, NAMES, strict=True)))
"""A list of hosts in which each has the address that the other one reaches."""
LOOPBACK = {name: f"127.0.1.1 {name}\n{LISTED}" for name in NAMES}
"""As Debian and its relatives install it: a machine finds its own name at a loopback address."""


@pytest.fixture
def runs(base: Path, tmp_path: Path) -> Runs:
    return Runs(base, tmp_path)


def _train(
    runs: Runs, endpoint: str, prefixes: Sequence[Sequence[str]], *own: Sequence[str]
) -> tuple[Run, Run]:
    """Two agents of torchrun, with a process each, which must end well: what each has printed.

    Args:
        runs: with the recipe.
        endpoint: of the rendezvous.
        prefixes: what runs a command on each machine.
        own: what each agent is told besides.
    """
    common = [
        "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "tests",
    ]  # fmt: skip
    started = [
        runs.start("run", python=[*prefix, sys.executable, *common, *more], streams=name)
        for name, prefix, more in zip(NAMES, prefixes, own or ((), ()), strict=True)
    ]
    ended = [runs.end("run", p, streams=n) for n, p in zip(NAMES, started, strict=True)]
    said = "\n".join(f"{n}: {run.text}" for n, run in zip(NAMES, ended, strict=True))
    assert [run.code for run in ended] == [0, 0], said
    return ended[0], ended[1]


def _assert_one_report(runs: Runs, first: Run, second: Run) -> None:
    """What one process trains with two passes per step, and nothing of it twice."""
    assert_as_one(first, runs.alone())
    assert_said_once(first)
    assert first.out.splitlines().count("processes: 2; each has all the weights (DDP)") == 1
    assert (second.out, second.err) == ("", "")
    reports = [str(p.relative_to(first.folder)) for p in first.folder.rglob("run.json")]
    assert reports == ["run.json"]
    assert len(first.json["ranks"]) == 2


@pytest.mark.parametrize(
    ("endpoint", "hosts"), [(ADDRESSES[0], dict.fromkeys(NAMES, LISTED)), (NAMES[0], LOOPBACK)],
    ids=["address", "name"],
)  # fmt: skip
def test_torchrun_on_two_machines(
    runs: Runs, tmp_path: Path, endpoint: str, hosts: dict[str, str]
) -> None:
    prepared = tmp_path / "prepared"
    try:
        with two_machines(tmp_path, hosts, {NAMES[1]: [prepared]}) as machines:
            found = _train(runs, f"{endpoint}:{PORT}", [m.command() for m in machines])
    except CannotBeMade as error:
        pytest.skip(f"two machines cannot be made of namespaces here: {error}")
    _assert_one_report(runs, *found)
    for folder in (prepared, tmp_path / NAMES[1] / "prepared"):  # each has its own
        assert list(folder.rglob("train.arrow")), folder


def test_two_agents_on_one_machine(runs: Runs) -> None:
    """As they are told, on two machines; and between them there is no network but loopback."""
    own = [["--local-addr", "127.0.0.1"], ["--local-addr", "127.0.0.2"]]
    _assert_one_report(runs, *_train(runs, f"127.0.0.1:{free_port()}", [[], []], *own))
