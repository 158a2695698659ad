"""Fields of rows by name, and the errors about them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ....errors import DataError

_HINTS = {
    "messages": "chat_template", "conversations": "chat_template", "instruction": "alpaca",
    "segments": "input_output", "completion": "prompt_completion", "text": "completion",
}  # fmt: skip
"""Fields that tell the type of a row."""


def kind(value: Any) -> str:
    """The kind of a value, for a message."""
    names = {
        list: "a list", tuple: "a list", str: "text", bool: "true or false", dict: "an object",
        type(None): "null",
    }  # fmt: skip
    return names.get(type(value), "a number")


IMAGE_FIELDS = ("images", "image")
_MEDIA = (*IMAGE_FIELDS, "videos", "video", "audios", "audio")
"""Fields with what belongs to a text and is none, by the names in public datasets and in TRL."""


def fields_of(row: Any, where: str, field: str, read: Collection[str] = ()) -> Mapping[str, Any]:
    """The row as an object; raises a DataError if it is none, or has sound, say, besides text.

    ``read``: fields of that kind that are read.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be an object with the field {field!r}, not {kind(row)}")
    for name in _MEDIA:
        if name != field and name not in read and row.get(name):
            if name in IMAGE_FIELDS:
                raise DataError(
                    f"{where}: the row has {name!r}, and this type of rows is text without places "
                    "for images: set type: alpaca.chat_template for instructions, or write such "
                    "rows as messages (type: chat_template)"
                )
            raise DataError(
                f"{where}: the row has {name!r} besides text; sound and videos are not trained: "
                "leave such rows out, save frames of a video as images, or remove that field and "
                "what stands for it in the text"
            )
    return row


def need(row: Mapping[str, Any], field: str, where: str) -> Any:
    """A required field; raises a DataError that lists the fields there are, if it is missing."""
    if field in row:
        return row[field]
    has = ", ".join(repr(k) for k in row) or "no fields"
    guess = next((t for name, t in _HINTS.items() if name in row), None)
    hint = f"; is the dataset's type {guess}?" if guess else ""
    raise DataError(f"{where}: the field {field!r} is missing (the row has {has}){hint}")


def need_text(row: Mapping[str, Any], field: str, where: str) -> str:
    """A field with text in it; raises a DataError if it is missing, or something else."""
    return as_text(need(row, field, where), field, where)


def as_text(value: Any, field: str, where: str, todo: str | None = None) -> str:
    """The value of a field, which must be text; ``todo`` is the remedy in the DataError if not."""
    if not isinstance(value, str):
        hint = f"; {todo}" if todo else ""
        raise DataError(f"{where}: the field {field!r} must be text, not {kind(value)}{hint}")
    return value


def may_text(row: Mapping[str, Any], field: str, where: str) -> str:
    """As ``need_text``, but without text where the field is missing or null."""
    return "" if row.get(field) is None else need_text(row, field, where)
