"""Whether a folder is a run's, or holds other files, which no run may touch."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..report import model_card as card
from .files import REMAINS, checkpoints

LOCK = ".fusewright.lock"
"""The file that says which process writes into a folder (see ``lock``)."""

PART = ".results.part"
"""Where the results are written before they are moved to their places."""

RESULTS = (
    "run.json", "loss.png", "report.html", "eval.json", "eval_tasks.json",
    "adapter_model.safetensors", "adapter_config.json",
    "model.safetensors", "model.safetensors.index.json",
)  # fmt: skip

_HARMLESS = frozenset({
    ".gitignore", ".gitkeep", ".DS_Store", "lost+found", "runs", LOCK, card.NAME,
})  # fmt: skip
"""What may be in a folder that counts as empty.

``runs`` is TensorBoard's, from its start; a model card of the user's own is left as it is.
"""

_MARKER = "fusewright.json"
_FEW = 3


def foreign_files(folder: Path) -> list[str]:
    """The files in a folder that no run has written; empty if the folder is a run's."""
    if not folder.is_dir() or is_run(folder):
        return []
    return sorted(p.name for p in folder.iterdir() if p.name not in _HARMLESS and not _is_log(p))


def is_run(folder: Path) -> bool:
    """Whether a run of ours has written into ``folder``."""
    if (folder / LOCK).is_file() or (folder / PART).is_dir():
        return True
    if any(REMAINS.fullmatch(path.name) for path in folder.glob(".checkpoint-*")):
        return True
    if any((path / _MARKER).is_file() for path in checkpoints(folder)):
        return True
    about = _json(folder / "run.json")
    return isinstance(about, dict) and {"recipe", "status", "output_dir"} <= about.keys()


def _json(path: Path) -> Any:
    """What a file has; None if it is not there, or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def results(folder: Path) -> Iterator[Path]:
    """The files and folders of an earlier run."""
    yield from (folder / name for name in RESULTS if (folder / name).exists())
    if (folder / card.NAME).exists() and card.is_generated(folder / card.NAME):
        yield folder / card.NAME
    yield from checkpoints(folder)
    for pattern in ("model-*-of-*.safetensors", "nan-batch-*", "completions/completions_*.parquet"):
        yield from sorted(folder.glob(pattern))
    yield from (path for path in sorted(folder.glob("eval-*.json")) if _is_evaluation(path))


def _is_evaluation(path: Path) -> bool:
    """Whether ``fusewright eval`` wrote a file: rows of the user's may be named alike."""
    about = _json(path)
    return isinstance(about, dict) and {"run", "results", "versions", "machine"} <= about.keys()


def link_in(folder: Path) -> Path | None:
    """A link under a name that a run writes to: it would write somewhere else."""
    names = [*RESULTS, card.NAME, PART, "completions", *(f"{name}.part" for name in RESULTS)]
    paths = [folder / name for name in names]
    for pattern in ("nan-batch-*", "eval-*.json", "eval-*.json.part"):
        paths += folder.glob(pattern)
    return next((p for p in paths if p.is_symlink()), None)


def few(names: list[str]) -> str:
    """A few of many names, as text."""
    more = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")


def _is_log(path: Path) -> bool:
    """Whether this process prints into it."""
    try:
        status = os.stat(path)
        ours = [os.fstat(stream.fileno()) for stream in (sys.__stdout__, sys.__stderr__) if stream]
    except (OSError, ValueError):
        return False
    return any(os.path.samestat(status, one) for one in ours)
