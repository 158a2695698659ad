"""Characters that no text has, and those that control a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_ODD = re.compile("[\x00\ud800-\udfff]")

_CONTROL = re.compile(r"[^\t\n\x20-\x7e\x85\xa0-\U0010ffff]|[\ud800-\udfff\ufffe\uffff]")

_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tabs and line breaks, and those that change the writing direction."""


def printable(text: str) -> str:
    r"""The text with ``\ufffd`` for what no text file may hold, but a model's answer can.

    Those are control characters other than tabs and line breaks, and halves of characters.
    """
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


def shown(text: str) -> str:
    r"""``text`` for a terminal, with control characters as escapes such as ``\x1b``."""
    return _ACTS.sub(_escape, text)


def shown_json(text: str) -> str:
    """As ``shown`` for JSON, whose meaning stays the same."""
    return _ACTS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def odd_character(text: str) -> str | None:
    """The problem with ``text``: a NUL, or a lone surrogate; None if there is none."""
    match = _ODD.search(text)
    if match is None:
        return None
    code = ord(match[0])
    what = f"a lone surrogate (\\u{code:04x})"
    if not code:
        what = "a NUL"
    elif 0xDC80 <= code <= 0xDCFF:  # as words of the command line come
        what = "a byte that is not UTF-8"
    return f"is not text: character {match.start() + 1} is {what}"


def odd_characters(
    value: Any, at: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """The places in nested data of text with such characters, below ``at``, and the problems."""
    if isinstance(value, str):
        problem = odd_character(value)
        if problem is not None:
            yield at, problem
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and (problem := odd_character(key)) is not None:
                yield at, f"has a name that {problem}"
            yield from odd_characters(inner, (*at, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from odd_characters(inner, (*at, i))
