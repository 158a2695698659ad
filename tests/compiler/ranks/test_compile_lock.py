"""Processes of one machine that compile the same graph: one does, the others wait, none forever."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.runtime import cache_dir_utils  # noqa: F401  # before processes are forked

from fusewright.compiler.ranks import compile_lock
from fusewright.compiler.ranks.compile_lock import first_one_compiles, lock_folder

from ...load import stretched
from ...train.processes.ranks import values

_CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compile_lock, "has_peers", lambda: True)


def _graph(function: Any = torch.sin) -> fx.GraphModule:
    return fx.symbolic_trace(lambda x: function(x) + 1)


EXAMPLES = [torch.zeros(3)]


class _Other:
    """Another process that compiles a graph, until it is let go or killed."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.begun, self.end = _CONTEXT.Event(), _CONTEXT.Event()
        self.process = _CONTEXT.Process(target=self._run, args=(graph,), daemon=True)
        self.process.start()
        assert self.begun.wait(stretched(30))

    def _run(self, graph: fx.GraphModule) -> None:
        with first_one_compiles(graph, EXAMPLES):
            self.begun.set()
            self.end.wait(stretched(30))


def _waits(graph: Any, examples: Any, limit: float = 0.3) -> bool:
    """Whether a process is kept from compiling for ``limit`` seconds."""
    entered = _CONTEXT.Event()

    def run() -> None:
        with first_one_compiles(graph, examples):
            entered.set()

    process = _CONTEXT.Process(target=run, daemon=True)
    process.start()
    waits = not entered.wait(limit)
    process.terminate()
    process.join()
    return waits


def test_who_waits_for_whom() -> None:
    other = _Other(_graph())
    assert _waits(_graph(), EXAMPLES)
    assert not _waits(_graph(torch.cos), EXAMPLES, stretched(30))
    assert not _waits(_graph(), [torch.zeros(3, dtype=torch.float64)], stretched(30))
    assert not _waits(_graph().forward, EXAMPLES, stretched(30))  # what is no graph is not locked
    other.end.set()
    other.process.join()
    assert not _waits(_graph(), EXAMPLES, stretched(30))


def test_a_process_that_was_forked_meanwhile_keeps_no_lock() -> None:
    """As the workers of a data loader: they have the open file, too."""
    with first_one_compiles(_graph(), EXAMPLES):
        forked = _CONTEXT.Process(target=time.sleep, args=(60,), daemon=True)
        forked.start()
    assert not _waits(_graph(), EXAMPLES, stretched(30))
    assert forked.is_alive()
    forked.kill()


def test_a_process_that_is_killed_leaves_no_lock() -> None:
    other = _Other(_graph())
    other.process.kill()
    other.process.join()
    assert not _waits(_graph(), EXAMPLES, stretched(30))


def test_a_process_that_hangs_is_waited_for_until_patience_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_lock, "PATIENCE", 0.2)
    other = _Other(_graph())
    begun = time.monotonic()
    with first_one_compiles(_graph(), EXAMPLES):
        assert 0.2 <= time.monotonic() - begun < 10
        assert other.process.is_alive()
    other.end.set()
    other.process.join()


def test_those_that_have_waited_go_on_side_by_side() -> None:
    other = _Other(_graph())
    barrier = _CONTEXT.Barrier(2)

    def run() -> None:
        with first_one_compiles(_graph(), EXAMPLES):
            barrier.wait(stretched(20))

    waiting = [_CONTEXT.Process(target=run, daemon=True) for _ in range(2)]
    for process in waiting:
        process.start()
    time.sleep(0.5)
    other.end.set()
    for process in waiting:
        process.join(stretched(30))
        assert process.exitcode == 0


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    folder = lock_folder()
    assert folder is not None
    assert folder.stat().st_mode & 0o077 == 0
    folder.chmod(0o777)
    assert lock_folder() is None
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert lock_folder() is None
    folder.unlink()
    folder.touch()
    assert lock_folder() is None


def test_without_inductors_cache_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    with config.patch(fx_graph_cache=False):
        assert lock_folder() is None
    with config.patch(force_disable_caches=True):
        assert lock_folder() is None


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    folder = lock_folder()
    assert folder is not None
    target = tmp_path / "target"
    (folder / compile_lock._name(_graph(), EXAMPLES)).symlink_to(target)
    with first_one_compiles(_graph(), EXAMPLES):
        assert not target.exists()


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_on_a_file_system_without_locks_nobody_waits(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    begun = time.monotonic()
    with first_one_compiles(_graph(), EXAMPLES), first_one_compiles(_graph(), EXAMPLES):
        assert time.monotonic() - begun < 10


def test_one_process_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with first_one_compiles(_graph(), EXAMPLES):
        assert list(tmp_path.iterdir()) == []


def _compiled(world: Any, folder: str) -> tuple[int, int, float]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    torch.set_num_threads(1)
    from torch._dynamo.utils import counters

    from fusewright.compiler.codegen.inductor import inductor

    def run(graph: fx.GraphModule, examples: list[Tensor]) -> Any:
        return inductor(graph, examples)

    x = torch.ones(3, requires_grad=True)
    y = torch.compile(lambda x: torch.sin(x) * 2, backend=run)(x)
    y.sum().backward()
    found = counters["inductor"]
    assert x.grad is not None
    return found["fxgraph_cache_miss"], found["fxgraph_cache_hit"], float(x.grad[0])


@pytest.mark.slow
def test_inductor_compiles_a_graph_once_for_two_ranks(tmp_path: Path) -> None:
    ranks = values(_compiled, str(tmp_path))
    # forward and backward
    assert sorted(r[:2] for r in ranks) == [(0, 2), (2, 0)]
    assert ranks[0][2] == ranks[1][2]
