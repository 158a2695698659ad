"""One file with all that a first step makes: another machine of the kind need not make it.

It holds PyTorch's artifacts (``torch.compiler.save_cache_artifacts``), the C++ kernels of Inductor
and of this package, the verdicts on rewrites, and what was raced. The last two are JSON; the others
are pickles and machine code: such a file is code, and ``load_compiled`` is called by who trusts it.
All of it is checked, for damage and for what this machine lacks, before anything is unpickled or
written; then its parts go to the folders of caches, where other processes see each whole or not at
all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import FusewrightError, first_line
from ..kernels import choice
from ..kernels.native import build
from ..kernels.native import library as native
from ..kernels.processor import instruction_set, model_name
from .codegen.cpp_compiler import proof
from .ranks import verdicts

_FORMAT = "fusewright compiled 1"
_MANIFEST, _ARTIFACTS = "manifest.json", "torch"

_NAMES = {
    "inductor": re.compile(r"\w\w/\w+(\.\w+)*\.so"),
    "kernels": re.compile(
        rf"(choice|verdict)-[0-9a-f]+\.json|({'|'.join(build.SOURCES)})-[0-9a-f]+\.so"
    ),
}
"""What may be written, by the folder of the file: nothing outside of the folders of caches."""


@dataclass(frozen=True)
class Compiled:
    """How many parts of a kind a file has."""

    graphs: int
    kernels: int
    verdicts: int
    choices: int

    def __str__(self) -> str:
        return (
            f"{self.graphs} compiled graphs, {self.kernels} libraries of C++ kernels, "
            f"{self.verdicts} verified rewrites, {self.choices} raced choices"
        )


def save_compiled(path: str | os.PathLike[str]) -> Compiled:
    """Write what this process has compiled, verified and raced so far, or read of it, to a file.

    Raises FusewrightError if the file cannot be written.
    """
    saved = torch.compiler.save_cache_artifacts()
    files = {_ARTIFACTS: saved[0]} if saved is not None else {}
    files |= {f"inductor/{name}": content for name, content in _inductor_kernels().items()}
    own = native.kept_files()
    files |= {f"kernels/{build.carried_name(name)}": content for name, content in own.items()}
    texts = verdicts.used() | choice.files()
    files |= {f"kernels/{name}": text.encode() for name, text in texts.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    manifest = {"format": _FORMAT, "made on": _machine(), "files": hashes}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {_MANIFEST: json.dumps(manifest).encode(), **files}.items():
            archive.writestr(name, content)
    try:
        build.write_whole(Path(path), buffer.getvalue())
    except OSError as error:
        raise FusewrightError(f"{path} cannot be written: {error.strerror}") from error
    return _contents(files)


def load_compiled(path: str | os.PathLike[str]) -> Compiled:
    """Put what ``save_compiled`` wrote into the folders where compilations look for it.

    Such a file is code, which PyTorch runs: load only what was made by you, or by somebody whom you
    would let log in as you.

    Raises FusewrightError if the file is damaged, or was made on a machine of another kind or with
    other versions: the message says what differs.
    """
    files = _read(Path(path))
    try:
        _place(files)
    except (OSError, RuntimeError) as error:
        raise FusewrightError(f"{path} cannot be put into the cache: {first_line(error)}") from None
    return _contents(files)


# --- the file -------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, bytes]:
    """The parts of a file, all of which are as they were written."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = json.loads(archive.read(_MANIFEST))
            if manifest["format"] != _FORMAT:
                raise FusewrightError(f"{path} was written by another version of fusewright")
            _require_same_machine(path, manifest["made on"])
            files = {name: archive.read(name) for name in manifest["files"]}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        if hashes != manifest["files"]:
            raise ValueError("a part has another hash")
    except FileNotFoundError:
        raise FusewrightError(f"{path}: there is no such file") from None
    except OSError as error:
        raise FusewrightError(f"{path} cannot be read: {error.strerror}") from error
    except _DAMAGE as error:
        raise FusewrightError(f"{path} is damaged: {first_line(error)}") from error
    for name in files:
        folder, _, inner = name.partition("/")
        if name != _ARTIFACTS and not (folder in _NAMES and _NAMES[folder].fullmatch(inner)):
            raise FusewrightError(f"{path} has a part that it cannot have: {name!r}")
    return files


_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, AttributeError,
    NotImplementedError, RuntimeError,
)  # fmt: skip
"""What the readers of zip files and JSON raise, the last two of flags that no such file has."""


def _place(files: dict[str, bytes]) -> None:
    places = {"inductor": Path(_inductor_folder()), "kernels": build.kept_folder()}
    for name, content in files.items():
        if name == _ARTIFACTS:
            continue
        folder, _, inner = name.partition("/")
        target = places[folder] / inner
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            build.write_whole(target, content)
    # last: with them a graph counts as compiled, and its kernels are looked for
    if _ARTIFACTS in files and torch.compiler.load_cache_artifacts(files[_ARTIFACTS]) is None:
        raise RuntimeError("PyTorch cannot read its artifacts")
    if any(name.startswith("inductor/") for name in files):
        proof().touch(mode=0o600)  # to the compiler there


def _contents(files: dict[str, bytes]) -> Compiled:
    artifacts = files.get(_ARTIFACTS)
    graphs = 0
    if artifacts is not None:
        from torch.compiler._cache import CacheArtifactManager

        read = CacheArtifactManager.deserialize(artifacts) or {}
        graphs = len(read.get("inductor", []))
    names = [Path(name).name for name in files]
    return Compiled(
        graphs,
        sum(name.endswith(".so") for name in names),
        sum(name.startswith("verdict-") for name in names),
        sum(name.startswith("choice-") for name in names),
    )


def _inductor_folder() -> str:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def _inductor_kernels() -> dict[str, bytes]:
    """The C++ kernels that Inductor has loaded: their places in its folder, and their content."""
    from torch._inductor import codecache

    names = ("CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache")
    caches = [getattr(codecache, name).cache for name in names if hasattr(codecache, name)]
    folder, kernels = Path(_inductor_folder()), {}
    for key in {key for cache in caches for key in cache}:
        for file in (folder / key[1:3]).glob(f"{key}*.so"):
            with contextlib.suppress(OSError):  # another process has emptied the folder
                kernels[str(file.relative_to(folder))] = file.read_bytes()
    return kernels


# --- whether it fits this machine -----------------------------------------------------------------


def _machine() -> dict[str, str]:
    """What must be equal where compiled code is run again."""
    sources, pytorch, python, *_ = verdicts.environment()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "fusewright": sources.split()[-1][:16],
        "PyTorch": pytorch.removeprefix("torch "),
        "Python": python.removeprefix("python "),
        "Triton": choice.triton_version() or "none",
        "C library": " ".join(platform.libc_ver()),
        "processor": model_name(),
        "instructions": instruction_set(),
        "GPUs": ", ".join(sorted({torch.cuda.get_device_name(i) for i in gpus})) or "none",
    }


def _require_same_machine(path: Path, there: dict[str, str]) -> None:
    here = _machine()
    differing = [name for name in here if here[name] != there.get(name)]
    if "processor" in differing and "instructions" in differing:
        differing.remove("instructions")  # whose names say it
    if not differing:
        return
    what = "; ".join(_difference(name, str(there.get(name)), here[name]) for name in differing)
    raise FusewrightError(f"{path} was made for another machine: {what}. Make one here")


def _difference(name: str, there: str, here: str) -> str:
    if name != "instructions":
        return f"{name} is {there} there, and {here} here"
    only_there, only_here = set(there.split()), set(here.split())
    only_there, only_here = only_there - only_here, only_here - only_there
    sides = (("there", only_there), ("here", only_here))
    return "instructions of the processor: " + ", ".join(
        f"only {side} {' '.join(sorted(words)[:6])}" for side, words in sides if words
    )
