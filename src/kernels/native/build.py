"""The files of the C++ kernels: compiled for this machine's processor, kept for later processes.

They are made anew for other sources, another compiler or another processor, and kept in a folder
that only its user can write to: what is in it is executed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from ..processor import instruction_set

SOURCES = {
    "kernels": ("vectors.h", "attention_plan.h", "attention.cpp", "low_rank.cpp"),
    "delta_rule": ("vectors.h", "delta_rule.cpp"),
}
"""The sources of each library. What few models need is one of its own: it takes the compiler twice
as long as all else, and is compiled for these models alone."""

# 2026-11-28: sums of products are fused by default in GNU C++, as in Clang
FLAGS = ("-std=c++17", "-O3", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-shared")
NATIVE = ("-march=native",)
SECONDS = 120
"""How long the compiler may take."""


def built(name: str = "kernels") -> Path:
    """The file of a library of ``SOURCES``; compiled unless it is there.

    Raises RuntimeError where this machine has no compiler for it or the compiler fails, and
    ``subprocess.TimeoutExpired`` where it takes too long.
    """
    if sys.platform != "linux" or sys.byteorder != "little":
        raise RuntimeError("they are compiled on Linux only, for little-endian processors")
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError(missing_compiler())
    text = source(name)
    path = folder() / f"{name}-{_hash(_identity(compiler), text, *FLAGS, *NATIVE)}.so"
    if not path.exists():
        compile_kernels(compiler, text, path, NATIVE)
    return path


def compiler_name(*what: str) -> str:
    """A name for what this machine's compiler, if any, makes of ``what`` for this processor."""
    compiler = find_compiler()
    return _hash("" if compiler is None else _identity(compiler), *what)


def _hash(*what: str) -> str:
    # several machines may share the folder
    return hashlib.sha256("\0".join((*what, instruction_set())).encode()).hexdigest()[:32]


def find_compiler() -> str | None:
    """The compiler that Inductor takes by default: CXX's, or the usual one; None if it fails."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    path = shutil.which(os.environ.get("CXX", usual))
    if path is None:
        return None
    try:
        command = [path, "--version"]
        subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return path


def missing_compiler() -> str:
    """Why there is no compiler, and what to do; empty where there is one."""
    if find_compiler() is not None:
        return ""
    named = os.environ.get("CXX")
    if named is not None:
        return f"the C++ compiler that the variable CXX names, {named!r}, does not run"
    return "no C++ compiler was found: install g++, or let the variable CXX name another one"


def _identity(compiler: str) -> str:
    status = os.stat(compiler)
    return (
        f"{os.path.realpath(compiler)} {status.st_size} {status.st_mtime_ns} {platform.libc_ver()}"
    )


def folder() -> Path:
    """Where libraries are kept; a new temporary folder where there is no such place."""
    try:
        return kept_folder()
    except (OSError, RuntimeError):  # ``doctor`` says which: each process compiles for itself
        return Path(tempfile.mkdtemp(prefix="fusewright-"))


def kept_folder(cache: str | None = None, make: bool = True) -> Path:
    """The folder of libraries, made if need be; ``cache`` in place of PyTorch's variable.

    Without ``make`` it is only looked whether it could be.

    Raises OSError where it cannot be made or others may write to it, RuntimeError without a home.
    """
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") if cache is None else cache
    if Path(cache).name.startswith("torchinductor_"):
        cache = ""  # PyTorch's default, which it sets by itself, and which others can guess
    cache = cache or os.environ.get("XDG_CACHE_HOME", "")
    place = Path(cache or Path.home() / ".cache", "fusewright", "kernels").absolute()
    for part in (*reversed(place.parents), place) if make else ():
        if not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    there = [part for part in (place, *place.parents) if part.exists()]
    if not there[0].is_dir():
        raise NotADirectoryError(f"{there[0]} is no folder")
    if not os.access(there[0], os.W_OK):
        raise PermissionError(f"{there[0]} cannot be written to")
    for part in there:
        if not _is_private(part):
            raise PermissionError(f"others may write to {part}")
    return place


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of which other processes see all or nothing."""
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as scratch:
        file = Path(scratch, path.name)
        file.write_bytes(content)
        file.chmod(0o600)
        file.replace(path)


def is_temporary(path: Path) -> bool:
    """Whether a library is in no folder that is kept."""
    return path.parent.name != "kernels"


def _is_private(part: Path) -> bool:
    """Whether only its user and root can replace its files."""
    status = part.stat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return status.st_uid in (0, os.getuid()) and not writable


def source(name: str = "kernels") -> str:
    """All kernels of a library, as one file."""
    return "".join((Path(__file__).parent / file).read_text() for file in SOURCES[name])


def sources(*folders: Path) -> str:
    """A hash of the sources in these folders."""
    texts = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.*")):
            if path.suffix in (".py", ".cpp", ".h"):
                texts.update(path.read_bytes())
    return texts.hexdigest()


def compile_kernels(compiler: str, text: str, path: Path, flags: tuple[str, ...]) -> None:
    """Compile ``text`` into the library ``path``, of which others see all or nothing.

    Raises RuntimeError where the compiler fails, ``subprocess.TimeoutExpired`` where it is too
    slow.
    """
    with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as scratch:
        text_file, library = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.so")
        text_file.write_text(text)
        command = [compiler, *FLAGS, *flags, str(text_file), "-o", str(library)]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        if result.returncode:
            lines = result.stderr.strip().splitlines()
            lines.append(f"it ends with {result.returncode}")
            line = next((line for line in lines if "error" in line), lines[0])
            raise RuntimeError(f"{compiler} fails: {line[:200]}")
        library.replace(path)
