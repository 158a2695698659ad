"""What was read of logits: how often a tile was enough, and what made a real tensor, and where."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

_HERE = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
_INSIDE = (_HERE + os.sep, os.path.dirname(torch.__file__) + os.sep)
_READERS = tuple(os.path.join(_HERE, room, "") for room in ("auditing", "train"))
"""What of this package reads logits for itself, as a caller's code does."""


@dataclass(eq=False)
class Reads:
    """The reads of one model's lazy logits."""

    tiles: Counter[str] = field(default_factory=Counter)  # what was computed in tiles -> how often
    # (what was asked, of which kind of values, by whom) -> how often that made a tensor of rows x
    # vocabulary
    tensors: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    # a trainer's own fused head that computes in our tiles now -> how often it did
    heads: Counter[str] = field(default_factory=Counter)

    def note_tiles(self, name: str) -> None:
        """Remember that ``name`` was computed in tiles."""
        self.tiles[name] += 1

    def note_tensor(self, func: Any, kind: str) -> None:
        """Remember that ``func`` made a real tensor."""
        name = getattr(func, "__name__", str(func)).split(".")[0]
        if name == "__get__":
            name = getattr(func.__self__, "__name__", name)
        if len(self.tensors) < _MOST:
            self.tensors[name, kind, _caller()] += 1

    def note_head(self, name: str) -> None:
        """Remember that a trainer's fused head computed in tiles of ours."""
        self.heads[name] += 1

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing: the calls are not the user's."""
        counters: list[Counter[Any]] = [self.tiles, self.tensors, self.heads]
        before = [counter.copy() for counter in counters]
        try:
            yield
        finally:
            for counter, counts in zip(counters, before, strict=True):
                counter.clear()
                counter.update(counts)

    def describe(self) -> str:
        """The reads that tiles answered, in a line; empty if there were none."""
        parts = [f"{name} {count}x" for name, count in sorted(self.tiles.items())]
        parts += [f"{name} {count}x" for name, count in sorted(self.heads.items())]
        return f"in tiles: {', '.join(parts)}" if parts else ""

    def reasons(self) -> list[str]:
        """What made real tensors, a sentence each."""
        return [
            f"{_KINDS.get(kind, 'the logits')} were made as a real tensor by {name} at {where} "
            f"({count}x)"
            for (name, kind, where), count in self.tensors.items()
        ]


_MOST = 64
_KINDS = {"log_probs": "the log-probabilities of all tokens"}


def _caller() -> str:
    """File and line of the code that is running, outside what answers reads."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _answers(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return "an unknown place"
    parts = frame.f_code.co_filename.replace(os.sep, "/").split("/")
    return f"{'/'.join(parts[-2:])}:{frame.f_lineno}"


def _answers(file: str) -> bool:
    return file.startswith(_INSIDE) and not file.startswith(_READERS)
