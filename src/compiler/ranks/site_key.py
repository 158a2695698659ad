"""What two processes must have in common to share the verdict on a rewrite, as text."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ...graph import facts
from ...kernels.native import library as native
from ...kernels.processor import processor
from ...rewrite.engine import Candidate
from ...rewrite.verify import structure

_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")
"""In the text of an object that only this process has."""

_DEVICE = re.compile(r"type=\\*'(\w+)\\*', index=(\d+)|\b(cuda|xpu|hpu|mps):(\d+)")
"""A device in a text; its quotes may be escaped."""


def site_key(candidate: Candidate, traced: bool) -> str | None:
    """The formula, its replacement, and everything around them that the verdict depends on.

    That is the structure by which one process remembers verdicts (graph, shapes, dtypes, layouts,
    and the settings that it is verified under), the graph of the replacement, the versions of
    PyTorch and of this package, and the kinds of processor and GPU. Devices are numbered as they
    are met: each rank has its own GPU.

    Args:
        candidate: a match that is ready to be verified.
        traced: whether the form that ops have under a compiler is verified, too.

    Returns:
        The text; None if it names something that no other process can know, such as a function
        that was made in a call of another one.
    """
    rule = type(candidate.rule)
    replacement = [
        (n.op, portable_name(n.target), str(n.args), str(n.kwargs))
        for n in candidate.replacement().nodes
    ]
    text = repr(
        (
            structure(candidate, portable_name),
            f"{rule.__module__}.{rule.__qualname__}",
            replacement,
            traced,
            _devices(candidate),
            _has_native_kernels(),
            environment(),
            processor(),
        )
    )
    return None if _ADDRESS.search(text) else _DEVICE.sub(_numbered(), text)


def portable_name(target: Any) -> str:
    """The name by which any process can import ``target``; else its own text."""
    if not callable(target) or isinstance(target, str):
        return str(target)
    try:
        name = fx.node._get_qualified_name(target)
        module, _, attribute = name.rpartition(".")
        return name if getattr(_imported(module), attribute) is target else str(target)
    except Exception:  # it has no name, or another function has it
        return str(target)


def _imported(name: str) -> Any:
    """A module, or a class in one, by its full name."""
    if name in sys.modules:
        return sys.modules[name]
    outer, _, attribute = name.rpartition(".")
    return getattr(_imported(outer), attribute) if outer else None


@functools.cache
def environment() -> tuple[str, ...]:
    """The versions, the sources of the ops and of the verification, and the architecture."""
    root, sources = Path(__file__).parents[2], hashlib.sha256()
    for room in ("graph", "kernels", "passes", "rewrite"):
        for path in sorted((root / room).rglob("*.*")):
            if path.suffix in (".py", ".cpp", ".h"):
                sources.update(path.read_bytes())
    return (
        f"fusewright {sources.hexdigest()}",
        f"torch {torch.__version__} {torch.version.git_version}",
        f"python {platform.python_version()}",
        platform.machine(),
    )


def _has_native_kernels() -> bool | None:
    """Whether ops in bf16 on the CPU run their kernels in C++; None where nobody has asked."""
    if not (native.has_started() or torch.is_autocast_enabled("cpu")):
        return None
    return native.problem() is None


def _devices(candidate: Candidate) -> list[str]:
    """The kinds of GPU that the formula runs on."""
    tensors = [t for n in candidate.inputs if (t := facts.tensor(n)) is not None]
    found = {t.device for t in tensors if t.device.type == "cuda"}
    return [torch.cuda.get_device_name(d) for d in sorted(found, key=str)]


def _numbered() -> Callable[[re.Match[str]], str]:
    """Replaces each device by its kind and the number by which it is first met."""
    known: dict[str, int] = {}

    def name(match: re.Match[str]) -> str:
        kind, index = match[1] or match[3], match[2] or match[4]
        return f"{kind} {known.setdefault(f'{kind}:{index}', len(known))}"

    return name
