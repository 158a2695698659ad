"""Rows that are a prompt alone: completions are generated for it, and judged."""

from __future__ import annotations

import json
from typing import Any

from ....errors import DataError
from ...recipe.recipe import Dataset
from ..formats.conversation import Conversation
from ..formats.fields import fields_of, kind
from .rows import Preference, part_of, spoken

_TAKEN = (
    "prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids",
    "trainer_state", "log_extra", "log_metric", "environments", "image", "images",
)  # fmt: skip
"""What the trainer itself hands to the functions that judge completions, or reads."""


class PromptReader:
    """Reads a prompt, as text or as messages, and keeps the other fields of the row.

    Args:
        dataset: names of fields.
        conversation: reads messages.
    """

    def __init__(self, dataset: Dataset, conversation: Conversation) -> None:
        self.field, self.conversation = dataset.field_messages, conversation

    def read(self, row: Any, where: str) -> Preference:
        """The prompt of a row, and its other fields."""
        row = fields_of(row, where, "prompt")
        field = self.field if row.get(self.field) is not None else "prompt"
        value = part_of(row, field, where)
        if not isinstance(value, str) and not (isinstance(value, list) and value):
            said = "an empty list" if value == [] else kind(value)
            raise DataError(
                f"{where}: the field {field!r} must be text or a list of messages, not {said}; "
                "leave rows without a prompt out"
            )
        columns = {k: v for k, v in row.items() if k != field}
        for name, column in columns.items():
            _require_column(name, column, where)
        if isinstance(value, str) and field == "prompt" != self.field:
            return Preference(where, value, columns=columns)
        turns = [spoken(value, "user", self.conversation)] if isinstance(value, str) else value
        chat = self.conversation.chat(turns, row, f"{where}: {field!r}")
        if chat.messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the prompt in {field!r} ends with a message of the assistant; it must "
                "end with the user's: keep the answer in a field of its own, for rewards to read"
            )
        return Preference(where, chat.messages, tools=chat.tools, columns=columns)


def _require_column(name: str, value: Any, where: str) -> None:
    """See that a field can be kept, and handed to a function.

    Raises:
        DataError: it cannot.
    """
    if name in _TAKEN:
        raise DataError(
            f"{where}: the field {name!r} has a name that the trainer keeps for itself; rename it"
        )
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: the field {name!r} holds a {type(value).__name__}, which cannot be kept; "
            "convert it to text or a number, or leave it out"
        ) from None
