"""A lock that allows one run at a time in a folder.

The lock is the system's (``flock``), which takes it away from a process that ends, however it does.
So a stale lock file stops nobody: the next run takes it over, and says so. On a file system without
such locks (some network ones), the content of the file decides: a process of this machine that no
longer exists has lost its lock, and of other machines nothing can be known.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import lock_descriptor

from ...errors import RecipeError
from .ownership import LOCK, is_run

_ORPHANS = 10.0
"""Seconds that the processes of a killed run, which have its lock open too, take to end."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}
_SETTLED = 0.2
"""Seconds in which two processes that write a lock file at once have both written it."""


@dataclass(frozen=True)
class LockHolder:
    """The process that has a lock.

    Attributes:
        begun: when it was started, in seconds since 1970; tells it from a later one with this pid.
        since: date and time of the lock, UTC.
        over: whether it has released the lock, and left the file.
    """

    pid: int
    host: str
    begun: float
    since: str
    over: bool = False

    @classmethod
    def this(cls) -> LockHolder:
        """This process, now."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), psutil.Process().create_time(), now)

    @classmethod
    def read(cls, handle: int) -> LockHolder | None:
        """The content of a lock file; None if it is invalid."""
        try:
            return cls(**json.loads(os.pread(handle, 1 << 12, 0)))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, handle: int) -> None:
        """Write it into a lock file."""
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(self)).encode() + b"\n", 0)

    def gone(self) -> bool:
        """Whether the process certainly no longer exists."""
        if self.over:
            return True
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.begun) > 5
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})"


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep every other run out of ``folder``, which is created if needed.

    Folders that are still empty at the end are removed again. ``say`` reports a lock taken over.

    Raises:
        RecipeError: another process has it, or it cannot be written to.
    """
    new_folders = [p for p in (folder, *folder.parents) if not p.exists()]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, new_folders)
        handle = _taken(folder, say)
        stack.callback(os.close, handle)
        ended = False
        try:
            yield
            ended = True
        finally:
            _give_back(folder, ended)


def _taken(folder: Path, say: Callable[[str], None]) -> int:
    """Take the lock, and return the open file."""
    path, start = folder / LOCK, time.monotonic()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(f"output_dir: {folder} cannot be written to: {reason}") from None
        try:
            if not _locked(handle):
                _wait_or_refuse(folder, handle, time.monotonic() - start)
            elif _same(path, handle):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was given back, and removed, in between
    before = LockHolder.read(handle)
    LockHolder.this().write(handle)
    if before is not None:
        say(f"output_dir: the lock of {before} is taken over: that run ended without releasing it")
    return handle


def _locked(handle: int) -> bool:
    """Try to lock an open file; on file systems without locks, by its content."""
    # not by ``FileLock``: the file is also the record of who has the folder, which is read and
    # removed under its lock; and that class knows ENOSYS only of these errors
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return _claimed(handle)


def _claimed(handle: int) -> bool:
    """Take a lock file where the file system has no locks."""
    before = LockHolder.read(handle)
    if before is not None and not before.gone():
        return False
    ours = LockHolder.this()
    ours.write(handle)
    time.sleep(_SETTLED)
    return LockHolder.read(handle) == ours


def _wait_or_refuse(folder: Path, handle: int, waited: float) -> None:
    """Wait for the orphans of a killed run, so that the lock is tried again; else RecipeError."""
    holder = LockHolder.read(handle)
    if (holder is None or holder.gone()) and waited < _ORPHANS:
        time.sleep(_SETTLED)
        return
    who = f"{holder}" if holder else "another process"
    if holder is not None and holder.gone():
        who = f"what is left of {holder}"
    remedy = "let it end or stop it, or choose another folder"
    if holder is not None and holder.host != socket.gethostname():
        remedy += f" (if you are sure it has ended, remove {folder / LOCK})"
    raise RecipeError(f"output_dir: {folder} is in use by {who}; {remedy}")


def _same(path: Path, handle: int) -> bool:
    """Whether the open file is still the one at its path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(handle))
    return False


def _give_back(folder: Path, ended: bool) -> None:
    """Remove the lock file, or leave it in a folder with nothing else of the run."""
    # it says whose the folder was, which would else be taken for one of other people's files
    path = folder / LOCK
    with contextlib.suppress(OSError):
        path.unlink()
        if not ended and any(folder.iterdir()) and not is_run(folder):
            marker = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            LockHolder(**{**asdict(LockHolder.this()), "over": True}).write(marker)
            os.close(marker)


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()
