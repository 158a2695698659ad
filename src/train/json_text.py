"""JSON in rows, prompts and tools, with uniform error messages."""

from __future__ import annotations

import json
import re
from typing import Any

from .printable import odd_characters

_ESCAPED = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
"""Escapes of characters that no text has; most texts have none of these."""


_BETWEEN = re.compile(r"[\s,]*")
"""What is between two rows of a list."""


class BadJsonError(ValueError):
    """A text that is not JSON, or has characters that no text has.

    Attributes:
        line: where, if that is known; counted from 1.
        column: the same.
        begun: some value was whole before it.
    """

    def __init__(
        self, message: str, line: int | None = None, column: int | None = None, begun: bool = False
    ) -> None:
        super().__init__(message)
        self.line, self.column, self.begun = line, column, begun

    def of(self, what: str) -> str:
        """The message as a sentence about ``what``."""
        message = str(self)
        return f"{what} {'is' if message.startswith('not ') else 'cannot be read:'} {message}"


def parse_json(text: str) -> Any:
    """Parse ``text``.

    Raises:
        BadJsonError: it is not JSON, is nested too deep, has a key twice, or characters that no
            text has.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except BadJsonError:
        raise
    except json.JSONDecodeError as error:
        raise BadJsonError(
            f"not valid JSON: {error.msg}", error.lineno, error.colno, error.msg == "Extra data"
        ) from None
    except RecursionError:
        raise BadJsonError("not valid JSON: nested too deep") from None
    except ValueError:  # Python reads no integers of more than some thousand digits
        raise BadJsonError("not valid JSON: a number has too many digits") from None
    if _ESCAPED.search(text):
        for at, flaw in odd_characters(value):
            place = ".".join(map(str, at))
            raise BadJsonError(f"{place + ' ' if place else ''}{flaw}; replace it, or leave it out")
    return value


def row_of(text: str, bad: BadJsonError) -> int | None:
    """The number, counted from 1, of the first row of a list with the same problem as ``bad``."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    at, row = text.find("[") + 1, 1
    try:
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # 2026-11-26: may be empty
            _, at = decoder.raw_decode(text, at)
            row += 1
    except BadJsonError as error:
        return row if str(error) == str(bad) else None
    except (ValueError, RecursionError):
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that is there twice, other readers take the first, the last, or both."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise BadJsonError(f"the key {twice!r} is duplicated in one object; remove one of the two")
    return result
