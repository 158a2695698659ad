"""Reading the rows of a recipe's datasets. Every complaint has file and line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from .recipe import Dataset

T = TypeVar("T")


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        where: file and line, for messages.
        messages: ``{"role": ..., "content": ...}`` in order; at least one is the assistant's.
    """

    where: str
    messages: list[dict[str, str]]


def read_chats(datasets: Sequence[Dataset]) -> list[Chat]:
    """Read every row of ``datasets``, in order, building what has a builder and is not there yet.

    Raises:
        DataError: an unreadable file, a row that is not JSON or lacks a field, or no rows at all.
    """
    chats: list[Chat] = []
    for dataset in datasets:
        path = Path(dataset.path)
        if dataset.builder:
            _build(Path(dataset.builder), path)
        before = len(chats)
        chats += [_chat(row, where, dataset) for where, row in _rows(path)]
        if len(chats) == before:
            raise DataError(f"{path}: the dataset is empty")
    return chats


def split(items: Sequence[T], size: float, seed: int) -> tuple[list[T], list[T]]:
    """Shuffle ``items`` and hold some out.

    Args:
        items: anything.
        size: a share below 1, or a number of items.
        seed: of the shuffle.

    Returns:
        The items to train on, and those held out.

    Raises:
        DataError: nothing would be left to train on, or nothing would be held out.
    """
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    count = round(len(shuffled) * size) if size < 1 else round(size)
    if count >= len(shuffled) or (size > 0 and count == 0):
        left = max(0, len(shuffled) - count)
        raise DataError(
            f"val_set_size: {size:g} of {len(shuffled)} rows leaves {left} to train on and "
            f"{len(shuffled) - left} to validate on"
        )
    return shuffled[count:], shuffled[:count]


def _build(builder: Path, path: Path) -> None:
    """Make ``path`` when it is missing or older than its builder.

    The builder runs in a process of its own, so that what it imports does not stay here.
    """
    if path.exists() and path.stat().st_mtime >= builder.stat().st_mtime:
        return
    done = subprocess.run(
        [sys.executable, str(builder), str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode or not path.exists():
        said = (done.stderr or done.stdout).strip().splitlines()
        raise DataError(
            f"{builder}: did not build {path} (exit code {done.returncode})"
            + (f": {said[-1]}" if said else "")
        )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``(where, row)``; blank lines of a JSONL file are passed over."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if path.suffix == ".json":
        try:
            rows = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
        if not isinstance(rows, list):
            raise DataError(f"{path}: must be a list of rows")
        yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, start=1))
        return
    for i, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {i}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {i}: not valid JSON: {error.msg} (column {error.colno})"
            ) from None


def _chat(row: Any, where: str, dataset: Dataset) -> Chat:
    field = dataset.field_messages
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object with the field {field!r}, not {_kind(row)}")
    if field not in row:
        has = ", ".join(repr(k) for k in row) or "no fields"
        raise DataError(f"{where}: the field {field!r} is missing (the row has {has})")
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: the field {field!r} must be a list of messages")
    names: dict[str, str] = {"role": "role", "content": "content"}
    names.update({key: name for key, name in dataset.message_property_mappings.items()})
    messages = []
    for i, turn in enumerate(turns, start=1):
        message = {}
        for key, name in names.items():
            value = turn.get(name) if isinstance(turn, dict) else None
            if not isinstance(value, str):
                raise DataError(f"{where}: message {i} needs the field {name!r}, with text in it")
            message[key] = value
        messages.append(message)
    if all(m["role"] != "assistant" for m in messages):
        roles = ", ".join(dict.fromkeys(m["role"] for m in messages))
        raise DataError(f"{where}: no message has the role 'assistant' (only {roles})")
    return Chat(where, messages)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
