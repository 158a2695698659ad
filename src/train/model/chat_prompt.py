"""How a trained model is asked: with the template variables and the system text of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]
"""``role`` and ``content``."""

_CONVERSATIONS = ("chat_template", "sharegpt", "prompt_completion")
"""The types of rows that ``default_system_message`` is added to."""


@dataclass(frozen=True)
class ChatPrompt:
    """What prompts have besides the user's words.

    Attributes:
        variables: what the chat template reads: ``chat_template_kwargs``.
        system: the system text of prompts that have none, or None: ``default_system_message``.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> ChatPrompt:
        """As ``recipe`` trains.

        Args:
            recipe: keys and values, as in ``run.json``; any may be missing or odd.
        """
        variables, system = (
            recipe.get(key) for key in ("chat_template_kwargs", "default_system_message")
        )
        if not (isinstance(system, str) and system and _adds_system(recipe)):
            system = None
        return cls(variables if isinstance(variables, Mapping) else {}, system)

    def question(self, text: str) -> list[Message]:
        """The conversation that begins with the user's ``text``."""
        return with_system([{"role": "user", "content": text}], self.system)


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """``messages`` with a system text before them, unless they have one."""
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _adds_system(recipe: Mapping[str, Any]) -> bool:
    """Whether the rows of a dataset get ``default_system_message``."""
    for key in ("datasets", "pretraining_dataset"):
        rows = recipe.get(key)
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, Mapping) and not row.get("drop_system_message"):
                kind = str(row.get("type", "chat_template"))
                if kind.removesuffix(".load").removesuffix(".default") in _CONVERSATIONS:
                    return True
    return False
