"""What ``memory=`` may say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

GB = 2**30
"""Bytes in a gigabyte of memory, as GPUs, operating systems and Slurm count; shown as GiB."""


@dataclass(frozen=True)
class Budget:
    """A parsed ``memory=``.

    ``mode``: ``"speed"`` keeps all, ``"min"`` as little as possible, ``"auto"`` fits into the
    memory that the device has, ``"bytes"`` into ``bytes``.
    """

    text: str
    mode: Literal["speed", "auto", "min", "bytes"]
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a mode, or a size such as ``"8GB"`` or ``"7.5 GB"``; ValueError for others."""
        if text in ("speed", "auto", "min"):
            return cls(text, text)  # type: ignore[arg-type]  # 2026-11-25: narrowed by the line above
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?Gi?B", text) if isinstance(text, str) else None
        if match is None or not float(match[1]):
            raise ValueError(
                f"memory={text!r} is not one of 'speed', 'auto', 'min' or a size in GB as in "
                "'8GB' or '0.5GB' (the whole of what the training process may use on its device)"
            )
        return cls(text, "bytes", int(float(match[1]) * GB))


def gigabytes(size: float) -> str:
    """``2.35 GiB``, for so many bytes."""
    return f"{size / GB:,.2f} GiB"
