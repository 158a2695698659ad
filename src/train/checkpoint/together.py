"""A checkpoint that several processes write: complete, or absent, for all of them."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from ...errors import RecipeError
from ..processes.world import World
from . import files
from .files import CheckpointWriteError, write_error_reason
from .ownership import LOCK

_LATE = 20.0
"""Seconds after which what another machine has written must be visible."""


def write_collectively(
    world: World, folder: Path, step: int, write: Callable[[Path], None]
) -> None:
    """Make a checkpoint of what ``write`` puts into a folder; all processes call this.

    Rank 0 makes the hidden folder, all processes write into it, and rank 0 gives it its name once
    all of them have. So ``folder``, the run's, must be the same on all machines. The collectives of
    ``write`` come before anything that a full disk can make fail on one process alone.

    Raises:
        CheckpointWriteError: the disk of one of them is full, or cannot be written to. It is
            raised in all processes, and nothing is left.
    """
    if not world.several:
        with files.writing(folder, step) as part:
            write(part)
    elif world.main:
        _lead(world, folder, step, write)
    else:
        part_name = world.share(str)  # of rank 0
        if part_name:
            _write(world, Path(part_name), write)
        failed = world.share(str)
        if failed:
            raise CheckpointWriteError(failed)


def require_shared(world: World, folder: Path) -> None:
    """Raise RecipeError unless the run's folder is the same on all machines; a collective.

    Rank 0 has the lock in it.
    """
    if not world.several:
        return
    apart = world.rank != world.local_rank and not _appears(folder / LOCK)
    hosts = sorted({host for host in world.gather(socket.gethostname() if apart else "") if host})
    if hosts:
        raise RecipeError(
            f"output_dir: {folder} is not the same folder on {', '.join(hosts)} as on the machine "
            "of rank 0; name one that all machines share, where every process finds the checkpoints"
        )


def _appears(path: Path) -> bool:
    """Whether a file exists, or soon does: a network file system may show it late."""
    end = time.monotonic() + _LATE
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # asks the server
    return True


def _lead(world: World, folder: Path, step: int, write: Callable[[Path], None]) -> None:
    """Rank 0's part of ``write_collectively``."""
    failed, announced = "", False
    try:
        with files.writing(folder, step) as part:
            world.share(lambda: str(part))
            announced = True
            _write(world, part, write)
    except CheckpointWriteError as error:
        failed = str(error)
    if not announced:
        world.share(lambda: "")
    world.share(lambda: failed)
    if failed:
        raise CheckpointWriteError(failed)


def _write(world: World, part: Path, write: Callable[[Path], None]) -> None:
    """Write, and learn whether all processes could."""
    reason = None
    try:
        write(part)
    except Exception as error:
        reason = write_error_reason(error)
        if reason is None:
            raise
    world.wait_for_main()  # whose files may take longer than a collective may
    reasons = [reason for reason in world.gather(reason) if reason is not None]
    if reasons and world.main:
        raise CheckpointWriteError(reasons[0])
