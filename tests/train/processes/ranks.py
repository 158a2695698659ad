"""A function in several processes of one run, as a launcher would start them.

The processes are forks of one that has imported what they need, so that a test of two takes a
second.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch.multiprocessing
from torch.distributed import TCPStore

from fusewright.train.processes import world as world_module
from fusewright.train.processes.world import World, joined

from ...load import Limit, stretched

LIMIT = 60.0
"""Seconds after which a test's processes are killed, on an idle machine."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "fusewright.train.checkpoint.write",
        "fusewright.train.run",
        "transformers.models.llama.modeling_llama",
        "peft",
        "pytest",
    ]
)

Work = Callable[..., Any]


class Ended(NamedTuple):
    """How a process has ended: with a value, an exception (its class and text), or by a signal."""

    value: Any
    error: str = ""
    said: str = ""
    seconds: float = 0.0


def run_ranks(
    work: Work,
    *given: Any,
    size: int = 2,
    local: int | None = None,
    dealt: bool = False,
    agent: bool = True,
    timeout: float | None = None,
    patience: float = 0.3,
    until: Path | None = None,
    limit: float = LIMIT,
) -> list[Ended]:
    """Call ``work(world, *given)`` in several processes.

    Args:
        work: a function of a module.
        given: besides the world.
        size: how many processes.
        local: how many of them are on each machine, as they are told; None: all.
        dealt: whether machines get their processes one by one, as under ``mpirun --map-by node``.
        agent: whether the store is the launcher's; if not, rank 0 has it.
        timeout: seconds of a collective; None: 30 on an idle machine.
        patience: what a failing process waits for the words of another one.
        until: a file; once it is there, the launcher is gone, and with it the store.
        limit: seconds after which they are killed, on an idle machine.
    """
    _wait_for_imports()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
    port = store.port if store is not None else free_port()
    options = {"TORCHELASTIC_USE_AGENT_STORE": str(agent), "MASTER_PORT": str(port)}
    started = []
    for rank in range(size):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        environ = {**options, **_place(rank, size, local or size, dealt)}
        arguments = (theirs, environ, timeout or stretched(30.0), patience, work, given)
        process = _CONTEXT.Process(target=_rank, args=arguments, daemon=True)
        process.start()
        theirs.close()
        started.append((process, ours))
    end = Limit(limit)
    while until is not None and not until.exists() and end.left():
        time.sleep(0.02)
    if until is not None:
        del store
    found = []
    for process, pipe in started:
        while process.is_alive() and end.left():
            process.join(min(1.0, end.left()))
        if process.exitcode is None:
            process.kill()
            process.join()
            found.append(Ended(None, "hung"))
        elif process.exitcode < 0:
            found.append(Ended(None, f"signal {-process.exitcode}"))
        else:
            found.append(Ended(*pipe.recv()))
    return found


@functools.cache
def _wait_for_imports() -> None:
    """Let the process that is forked import first: on a busy machine, longer than a limit."""
    first = _CONTEXT.Process(target=os.getpid)
    first.start()
    first.join()


def run_bare(work: Callable[..., None], *given: Any, size: int = 2) -> None:
    """Call ``work(rank, *given)`` in processes that are told nothing of each other."""
    torch.multiprocessing.start_processes(work, given, nprocs=size, start_method="forkserver")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _place(rank: int, size: int, local: int, dealt: bool) -> dict[str, str]:
    own = rank // (size // local) if dealt else rank % local
    return {
        "MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(own), "LOCAL_WORLD_SIZE": str(local),
    }  # fmt: skip


def _rank(
    pipe: Connection,
    environ: Mapping[str, str],
    timeout: float,
    patience: float,
    work: Work,
    given: tuple[Any, ...],
) -> None:
    os.environ.update(environ)
    warnings.simplefilter("ignore")
    world_module._TIMEOUT_S = patience
    begun = time.monotonic()
    value, error, said = None, "", ""
    try:
        with joined(timeout) as world:
            value = work(world, *given)
    except BaseException as raised:
        error, said = type(raised).__name__, str(raised)
    pipe.send((value, error, said, time.monotonic() - begun))


def values(work: Work, *given: Any, **options: Any) -> list[Any]:
    """What ``work`` returns, by rank; none of them may fail."""
    ended = run_ranks(work, *given, **options)
    assert [e.error for e in ended] == [""] * len(ended), ended
    return [e.value for e in ended]


def alone() -> World:
    """A world of one process."""
    return World()
