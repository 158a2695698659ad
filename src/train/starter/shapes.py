"""What a row is, by the fields that it has: the type of dataset that reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import DataError

_LISTS = ("messages", "conversations", "conversation")
_ROLES, _CONTENTS = ("role", "from", "speaker", "author"), ("content", "value", "text", "message")
_ASKED = ("instruction", "question", "query", "prompt", "INSTRUCTION", "input")
_ANSWERED = ("output", "response", "answer", "completion", "RESPONSE", "target")
_SYSTEMS = ("system", "system_prompt")
_TEXTS = ("text", "content", "document")


@dataclass(frozen=True)
class Shape:
    """What one row is.

    Attributes:
        kind: in words, e.g. ``chat``; rows of several kinds are not one dataset.
        keys: what the entry of ``datasets`` must say so that it is read so.
        answers: it is read as its better answer, of a pair.
    """

    kind: str
    keys: tuple[tuple[str, Any], ...] = field(default=())
    answers: bool = False

    def entry(self) -> dict[str, Any]:
        """The keys, as a mapping."""
        return {key: dict(v) if isinstance(v, tuple) else v for key, v in self.keys}


def shape_of(row: Any, where: str) -> Shape:
    """The shape of a row.

    Raises:
        DataError: it has none of the fields that tell it.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: must be an object with named fields, such as messages or text")
    for test in (_preference, _tokenized, _chat, _segments, _prompt, _instruction, _text):
        found = test(row)
        if found is not None:
            return found
    has = ", ".join(map(repr, row)) or "no fields"
    raise DataError(
        f"{where}: no known format has these fields ({has}). Known are: messages; instruction and "
        "output; prompt and completion; text; segments; input_ids and labels; prompt, chosen and "
        "rejected. Rename the fields, or spell the format out in datasets: type, with "
        "field_instruction, field_output and format"
    )


def _preference(row: Mapping[str, Any]) -> Shape | None:
    if not {"chosen", "rejected"} <= set(row):
        return None
    asked = next((name for name in _ASKED if name in row), None)
    kind = "preference pairs"
    if asked is None and isinstance(row["chosen"], list):  # the whole conversation, twice
        keys = (("type", "chat_template"), *_names("chosen", row["chosen"]))
        return Shape(kind, keys, answers=True)
    if asked is None:
        return Shape(kind, (("type", "completion"), ("field", "chosen")), answers=True)
    if isinstance(row["chosen"], list) and not isinstance(row[asked], list):
        keys = (("type", "chat_template"), *_names("chosen", row["chosen"]))
        return Shape(kind, keys, answers=True)  # TRL's older form: the prompt is in it, too
    keys = (("type", "prompt_completion"), ("field_human", asked), ("field_model", "chosen"))
    return Shape(kind, keys, answers=True)


def _tokenized(row: Mapping[str, Any]) -> Shape | None:
    return Shape("already tokenized") if "input_ids" in row else None


def _chat(row: Mapping[str, Any]) -> Shape | None:
    name = next((name for name in _LISTS if name in row), None)
    name = name or next((n for n, v in row.items() if _is_chat(v)), None)
    if name is None:
        return None
    return Shape("chat", (("type", "chat_template"), *_names(name, row[name])))


def _is_chat(value: Any) -> bool:
    """Whether it is a list of messages, whatever its name."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    first = value[0]
    return any(r in first for r in _ROLES) and any(c in first for c in _CONTENTS)


def _names(name: str, messages: Any) -> list[tuple[str, Any]]:
    """The keys that say where the messages are, and what their fields are called."""
    keys: list[tuple[str, Any]] = [] if name in _LISTS else [("field_messages", name)]
    first = messages[0] if isinstance(messages, list) and messages else {}
    if not isinstance(first, Mapping):
        return keys
    role = next((r for r in _ROLES if r in first), "role")
    content = next((c for c in _CONTENTS if c in first), "content")
    if (role, content) not in (("role", "content"), ("from", "value")):
        keys.append(("message_property_mappings", (("role", role), ("content", content))))
    return keys


def _segments(row: Mapping[str, Any]) -> Shape | None:
    return Shape("segments", (("type", "input_output"),)) if "segments" in row else None


def _prompt(row: Mapping[str, Any]) -> Shape | None:
    if {"prompt", "completion"} <= set(row):
        return Shape("prompt and completion", (("type", "prompt_completion"),))
    return None


def _instruction(row: Mapping[str, Any]) -> Shape | None:
    asked = next((name for name in _ASKED if name in row), None)
    answered = next((name for name in _ANSWERED if name in row), None)
    if asked is None or answered is None:
        return None
    system = next((name for name in _SYSTEMS if name in row), None)
    keys = [("type", "alpaca_w_system.load_instruct" if system else "alpaca")]
    named = {"instruction": asked, "output": answered, "system": system or "system"}
    keys += [(f"field_{usual}", own) for usual, own in named.items() if usual != own]
    return Shape("instruction and answer (alpaca)", tuple(keys))


def _text(row: Mapping[str, Any]) -> Shape | None:
    name = next((name for name in _TEXTS if isinstance(row.get(name), str)), None)
    if name is None:
        return None
    keys = (("type", "completion"), *([] if name == "text" else [("field", name)]))
    return Shape("text (completion)", keys)
