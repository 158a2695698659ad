"""Checkpoints on disk: each one complete, or absent.

A checkpoint is written into a hidden folder, which gets its name once all of its files are on the
disk; to remove one, its name goes first. So whatever is called ``checkpoint-N`` can be loaded, at
whatever moment the process, or the machine, was stopped.
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
    """The path of the checkpoint of ``step`` in the run folder ``folder``."""
    return folder / f"checkpoint-{step}"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, sorted by step."""
    folders = [p for p in folder.glob("checkpoint-*") if step_of(p) is not None and p.is_dir()]
    return sorted(folders, key=lambda p: step_of(p) or 0)


@contextlib.contextmanager
def writing(folder: Path, step: int) -> Iterator[Path]:
    """Yield an empty folder, which becomes the checkpoint of ``step`` in the run's ``folder``.

    If the block raises, nothing is left of it.

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
    """Remove the oldest checkpoints of a run until ``limit`` are left; those in ``keep`` stay."""
    if limit is None:
        return
    existing = checkpoints(folder)
    extra = max(0, len(existing) - max(limit, len(set(keep) & set(existing))))
    for path in [p for p in existing if p not in keep][:extra]:
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
