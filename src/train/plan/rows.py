"""The number of rows and tokens of a recipe, by its files."""

from __future__ import annotations

from pathlib import Path

from ..recipe.recipe import Recipe

_BYTES_PER_TOKEN = 4
"""Bytes of text for a token, with the JSON around it: assumed."""

_LINES = {".jsonl", ".csv", ".tsv"}
_TEXT = {".jsonl", ".json", ".csv", ".tsv", ".txt"}


def estimate_tokens(recipe: Recipe) -> int | None:
    """The tokens of an epoch; None where some rows are not in plain files on this machine."""
    total = 0.0
    for dataset in recipe.datasets:
        files = _files(Path(dataset.path))
        if not files or any(file.suffix not in _TEXT for file in files):
            return None
        size = sum(file.stat().st_size for file in files)
        total += size / _BYTES_PER_TOKEN * (dataset.weight or 1) / (dataset.shards or 1)
    validation = recipe.val_set_size if 0 < recipe.val_set_size < 1 else 0
    return round(total * (1 - validation)) or None


def count_rows(recipe: Recipe) -> int | None:
    """The rows of an epoch, by the lines of their files.

    None where some rows are not in files of one row a line on this machine.
    """
    total = 0.0
    for dataset in recipe.datasets:
        files = _files(Path(dataset.path))
        if not files or any(file.suffix not in _LINES for file in files):
            return None
        rows = sum(_lines(file) for file in files)
        total += rows * (dataset.weight or 1) / (dataset.shards or 1)
    validation = recipe.val_set_size
    return round(total * (1 - validation) if validation < 1 else total - validation) or None


def _lines(file: Path) -> int:
    with file.open("rb") as opened:
        return sum(1 for line in opened if line.strip()) - (file.suffix in (".csv", ".tsv"))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
