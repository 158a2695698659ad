"""The prompts of ``fusewright generate``, from the command line, a pipe or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

from ...errors import DataError, RecipeError
from ..json_text import BadJsonError, parse_json
from ..model.chat_prompt import Message, with_system
from ..printable import odd_character

_KEYS = ("role", "content")


def read_prompts(path: Path, system: str | None = None) -> list[list[Message]]:
    """Read a file of prompts.

    Args:
        path: ``.jsonl``, each line a text, ``{"prompt": ...}`` or ``{"messages": [...]}``; any
            other file: each line is a prompt. Blank lines are passed over.
        system: a system text for those that have none.

    Raises:
        DataError: it cannot be read, or a line has another form; the message has file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: cannot be read: byte {error.start + 1} is not UTF-8; save it as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    found = [
        _messages(line, path, number) if path.suffix == ".jsonl" else [_user(line)]
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise DataError(f"{path}: the file has no prompts")
    return [with_system(messages, system) for messages in found]


def read_prompt(prompt: str | None, stdin: TextIO) -> str:
    """The prompt of the command line, or of ``stdin`` when it is ``-`` or left out of a pipe.

    Raises:
        RecipeError: there is none.
    """
    if prompt == "-" or (prompt is None and not stdin.isatty()):
        try:
            prompt = stdin.read().strip()
        except UnicodeDecodeError:
            raise RecipeError("standard input is not UTF-8: save the prompt as UTF-8") from None
    if not prompt:
        raise RecipeError("there is no prompt: write one, or - to read it from standard input")
    if (said := odd_character(prompt)) is not None:
        raise RecipeError(f"the prompt {said}: write it as UTF-8")
    return prompt


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _messages(line: str, path: Path, number: int) -> list[Message]:
    where = f"{path}, line {number}"
    try:
        row: Any = parse_json(line)
    except BadJsonError as error:
        column = f" (column {error.column})" if error.column else ""
        raise DataError(f"{where}: {error}{column}") from None
    if isinstance(row, dict):
        row = row.get("prompt", row.get("messages"))
    if isinstance(row, str):
        return [_user(row)]
    turns = row if isinstance(row, list) else []
    right = (isinstance(t, dict) and all(isinstance(t.get(k), str) for k in _KEYS) for t in turns)
    if not turns or not all(right):
        raise DataError(
            f'{where}: must be a text, {{"prompt": "..."}} or {{"messages": [{{"role": "user", '
            '"content": "..."}]}'
        )
    if turns[-1]["role"] == "assistant":  # a row of training data: its question is answered again
        turns = turns[:-1]
    if not turns:
        raise DataError(f"{where}: it ends with an answer, so there is nothing to answer")
    return [{key: turn[key] for key in _KEYS} for turn in turns]
