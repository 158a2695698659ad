"""Characters that no text has: they come from damaged files, and no tokenizer takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_ODD = re.compile("[\x00\ud800-\udfff]")


def odd_character(text: str) -> str | None:
    """What is wrong with ``text``: a NUL, or half of a character; None if nothing is."""
    found = _ODD.search(text)
    if found is None:
        return None
    code = ord(found[0])
    what = f"half of a character (\\u{code:04x})"
    if not code:
        what = "a NUL"
    elif 0xDC80 <= code <= 0xDCFF:  # as words of the command line come
        what = "a byte that is not UTF-8"
    return f"is not text: character {found.start() + 1} is {what}"


def odd_characters(
    value: Any, at: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where in nested data there is text with such characters, and what is wrong with it.

    Args:
        value: text, numbers, lists and mappings.
        at: where it is itself.
    """
    if isinstance(value, str):
        said = odd_character(value)
        if said is not None:
            yield at, said
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and (said := odd_character(key)) is not None:
                yield at, f"has a name that {said}"
            yield from odd_characters(inner, (*at, key))
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from odd_characters(inner, (*at, i))
