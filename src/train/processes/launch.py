"""``fusewright train --nproc N``: the same command in several processes of this machine.

It is ``torchrun --standalone`` with three differences: a signal reaches every process once and
waits as long as saving takes, one message says which process has ended and why, and processors are
divided among the processes instead of giving each a single thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from ...errors import RecipeError
from .launchers import placement
from .signals import heeded
from .world import PARENT

_MESSAGE_TIMEOUT_S = 10.0
"""Seconds that the other processes get to end with their own message, once one has failed."""
_SAVING = 15.0
"""Seconds between SIGTERM and SIGKILL after that: they may be saving."""


@dataclass(frozen=True)
class _Ended:
    """A process that has failed: its rank, its process id, and its exit code."""

    rank: int
    pid: int
    code: int

    def reason(self) -> str | None:
        """What killed it; None: it ended by itself, and has said why."""
        if self.code >= 0:
            return None
        name = signal.Signals(-self.code).name
        hint = " (the system does that when memory is short)" if name == "SIGKILL" else ""
        return f"rank {self.rank} (process {self.pid}) was killed by {name}{hint}"

    @property
    def exit_code(self) -> int:
        """As a shell reports it."""
        return self.code if self.code >= 0 else 128 - self.code


def number_of_processes(nproc: str | None, alone: bool = False) -> int:
    """How many processes ``train`` starts; 1: it does the work itself.

    ``nproc`` is the value of ``--nproc``: a number, or ``gpu`` for one per GPU. None: one per GPU
    where there are several, unless a launcher has started this process, or the recipe is for one
    process (``alone``).

    Raises:
        RecipeError: it is neither, or a launcher is there already.
    """
    launched = placement(os.environ).size > 1 or "RANK" in os.environ
    if nproc is None:
        return 1 if launched or alone else max(1, _gpus())
    if launched:
        raise RecipeError(
            "--nproc: a launcher (torchrun, accelerate, deepspeed, srun) has started this process "
            "already; leave --nproc out, and give the number to the launcher"
        )
    if nproc in ("gpu", "auto"):
        if not (gpus := _gpus()) and nproc == "gpu":
            raise RecipeError("--nproc: there is no GPU here; give a number of processes")
        return max(1, gpus)
    if not nproc.isdecimal() or not int(nproc):
        raise RecipeError(f"--nproc: {nproc} is neither a number of processes nor gpu")
    return int(nproc)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def launch(number: int, arguments: Sequence[str]) -> int:
    """Run ``fusewright ARGUMENTS`` in ``number`` processes, until all have ended.

    Returns:
        The exit code: 0, or that of the first process that failed.

    Raises:
        RecipeError: there are GPUs, but not one for each.
    """
    if 0 < (gpus := _gpus()) < number:
        raise RecipeError(
            f"--nproc: {number} processes need as many GPUs, and there are {gpus} here; "
            "CUDA_VISIBLE_DEVICES= hides them, to train on the CPU"
        )
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # 2026-11-27: not in its list

    # the ranks meet at a store of this process, as under torchrun: no port can be taken in between
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # -P: as for the installed command, no module is taken from the current folder
    command = [sys.executable, "-P", "-m", "fusewright.cli", *arguments]
    children: list[subprocess.Popen[bytes]] = []
    with _forwarding(children):
        for rank in range(number):
            environ = rank_environment(rank, number, store.port)
            # in its own session: what a terminal sends comes once, through this process
            children.append(subprocess.Popen(command, env=environ, start_new_session=True))
        return _wait(children)


def rank_environment(rank: int, number: int, port: int) -> dict[str, str]:
    """The environment variables of one of several processes that this one starts.

    ``port`` is that of the store of this process, at which they meet.
    """
    threads = max(1, (os.cpu_count() or 1) // number)
    return {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        PARENT: str(os.getpid()),
        "RANK": str(rank), "WORLD_SIZE": str(number),
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


@contextlib.contextmanager
def _forwarding(children: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass signals on to the processes, which decide what they mean; stop those that are left."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)  # one to stop in order, one to stop at once, and then by force
        _signal(children, number if len(came) <= 2 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in heeded()}
    try:
        yield
    finally:
        _signal(children, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all of them; only briefly once one has failed."""
    first: _Ended | None = None
    since, announced = 0.0, False
    while any(child.poll() is None for child in children):
        first = _cause(first, children, announced)
        if first is not None:
            since = since or time.monotonic()
            waited = time.monotonic() - since
            if waited > _MESSAGE_TIMEOUT_S and not announced:
                announced = True
                _signal(children, signal.SIGTERM)
            if waited > _MESSAGE_TIMEOUT_S + _SAVING:
                _signal(children, signal.SIGKILL)
        time.sleep(0.1)
    first = _cause(first, children, announced)
    if first is None:
        return 0
    if (reason := first.reason()) is not None:
        resume = "; start the run again with auto_resume_from_checkpoints: true to resume"
        print(f"fusewright: {reason}, and the others were stopped{resume}", file=sys.stderr)
    return first.exit_code


def _cause(
    first: _Ended | None, children: Sequence[subprocess.Popen[bytes]], announced: bool
) -> _Ended | None:
    """The process that made the others end; ``first`` was it at the last check."""
    failure = _failed(children)
    killed = failure is not None and failure.code == -signal.SIGKILL
    if first is None or (killed and not announced):  # nobody here has killed it by then
        return failure
    return first


def _failed(children: Sequence[subprocess.Popen[bytes]]) -> _Ended | None:
    """A process that has failed; one that was killed comes before those that failed after it."""
    failures = [
        _Ended(rank, child.pid, child.returncode)
        for rank, child in enumerate(children)
        if child.poll() not in (None, 0)
    ]
    return min(failures, key=lambda ended: (ended.code >= 0, ended.rank), default=None)
