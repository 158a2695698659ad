"""Checkpoints on disk: each one is there whole, or not at all.

A checkpoint is written into a hidden folder, which gets its name once all of its files are on the
disk; one that has to go loses its name first. So whatever is called ``checkpoint-N`` can be loaded,
at whatever moment the process, or the machine, was stopped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

_NAME = re.compile(r"checkpoint-(\d+)")
REMAINS = re.compile(r"\.checkpoint-\d+\.(part|old)")
"""Folders that a killed process was writing or removing."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_WRITERS = ("inline_container", "iostream error", "No space left", "File too large", "Quota exc")
"""What torch and safetensors say in place of the system's error number."""


class CheckpointWriteError(Exception):
    """A checkpoint could not be written, which in nearly all cases means that the disk is full."""


def step_of(folder: Path) -> int | None:
    """The optimizer step of a checkpoint, by its name; None: it is none."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def place(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is in the run folder ``folder``."""
    return folder / f"checkpoint-{step}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, by their steps."""
    found = [p for p in folder.glob("checkpoint-*") if step_of(p) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p) or 0)


@contextlib.contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Yield an empty folder; what is written into it becomes the checkpoint of ``step``.

    If the block raises, nothing is left of it.

    Args:
        folder: of the run.
        step: the optimizer step.

    Raises:
        CheckpointWriteError: the disk is full, or cannot be written to.
    """
    part = folder / f".checkpoint-{step}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        for path in part.rglob("*"):
            _to_disk(path)
        _to_disk(part)
        target = place(folder, step)
        if target.exists():
            discard(target)
        part.rename(target)
        _to_disk(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        reason = write_error_reason(error)
        if reason is not None:
            raise CheckpointWriteError(reason) from error
        raise


def discard(path: Path) -> None:
    """Remove a checkpoint."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def rotate(folder: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Remove the oldest checkpoints until ``limit`` are left; those in ``keep`` stay.

    Args:
        folder: of the run.
        limit: how many may stay; None: all.
        keep: the newest and the best one.
    """
    if limit is None:
        return
    there = checkpoints(folder)
    extra = max(0, len(there) - max(limit, len(set(keep) & set(there))))
    for path in [p for p in there if p not in keep][:extra]:
        discard(path)


def clean(folder: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in folder.glob(".checkpoint-*"):
        if REMAINS.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def write_error_reason(error: BaseException) -> str | None:
    """The reason, if ``error`` says that a file could not be written; else None."""
    if not isinstance(error, Exception):  # a signal
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return "the disk is full" if error.errno in _FULL else (error.strerror or str(error))
    return "the disk is full" if any(word in str(error) for word in _WRITERS) else None


def _to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
