"""Rows whose prompts and answers are messages, or the plain texts that TRL's trainers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import DataError
from ...recipe.recipe import Dataset
from ..chat.template import Chat, Messages
from ..formats.conversation import Conversation
from ..formats.fields import fields_of, kind
from .rows import JudgedAnswer, Preference, judgement, part_of, require_same_question, spoken

_PROMPT = "prompt"


class MessageReader:
    """Reads rows of the type ``chat_template`` and of those without a type.

    The prompt is in the field ``field_messages``, or in ``prompt``, or it is what both answers
    begin with. Answers are texts, single messages, or conversations that may repeat the prompt.
    Where prompt and answers are texts and no field has messages, they stay texts.

    Args:
        dataset: names of fields.
        conversation: reads messages.
        labelled: rows have one answer and a label; else a better and a worse one.
        whole: answers are conversations, whose last message is the answer.
        prompts: where the prompt is, best first; None: as above.
    """

    def __init__(
        self,
        dataset: Dataset,
        conversation: Conversation,
        labelled: bool = False,
        whole: bool = False,
        prompts: Sequence[str] | None = None,
    ) -> None:
        self.conversation, self.labelled, self.whole = conversation, labelled, whole
        self.asked = dataset.field_messages
        self.prompts = prompts
        if labelled:
            self.answers = [dataset.field_model or "completion"]
        else:
            self.answers = [dataset.field_chosen or "chosen", dataset.field_rejected or "rejected"]

    def read(self, row: Any, where: str) -> Preference:
        """The prompt and the answers of a row."""
        row = fields_of(row, where, self.answers[0])
        values = [part_of(row, name, where) for name in self.answers]
        for name, value in zip(self.answers, values, strict=True):
            _require_answer(value, name, where)
        good = [True, False]
        if self.labelled:
            good = [judgement(part_of(row, "label", where), "label", where)]
        field = None if self.whole else self._prompt_field(row, values[0])
        prompt = row.get(field) if field is not None else None
        if prompt is not None and not isinstance(prompt, str | list):
            raise DataError(
                f"{where}: the field {field!r} must be text or a list of messages, not "
                f"{kind(prompt)}; leave rows without a prompt out"
            )
        if not self._as_messages(field, prompt, values):
            before, texts = self._texts(prompt, values, where)
            answers = tuple(map(JudgedAnswer, texts, good))
            return Preference(where, before, answers)
        chat, contents = self._chats(prompt, field, values, row, where)
        answers = tuple(
            JudgedAnswer(content, flag) for content, flag in zip(contents, good, strict=True)
        )
        return Preference(where, chat.messages, answers, chat.tools)

    def _prompt_field(self, row: Mapping[str, Any], answer: Any) -> str | None:
        """The field with the prompt, which is not the conversation that has the answer, too."""
        whole = answer if isinstance(answer, list) else None
        names = self.prompts or (self.asked, _PROMPT)
        return next((n for n in names if row.get(n) is not None and row[n] != whole), None)

    def _as_messages(self, field: str | None, prompt: Any, values: list[Any]) -> bool:
        """Whether a row is a conversation, not a text that goes on."""
        asked = field is not None and (self.prompts is not None or field == self.asked)
        return asked or isinstance(prompt, list) or not all(isinstance(v, str) for v in values)

    # --- texts -----------------------------------------------------------------------------------

    def _texts(self, prompt: Any, values: list[str], where: str) -> tuple[str, list[str]]:
        """The prompt, and the answers behind it."""
        if isinstance(prompt, str):
            return prompt, values
        if self.labelled:
            raise DataError(_no_prompt(where, self.answers[0]))
        common = _common_words(*values)
        if not common.strip():
            raise DataError(
                f"{where}: {self.answers[0]!r} and {self.answers[1]!r} do not begin alike, so "
                f"there is no prompt: put it into the field {_PROMPT!r}"
            )
        return common, [value[len(common) :] for value in values]

    # --- messages --------------------------------------------------------------------------------

    def _chats(
        self,
        prompt: Any,
        field: str | None,
        values: list[Any],
        row: Mapping[str, Any],
        where: str,
    ) -> tuple[Chat, list[Messages]]:
        """The prompt as a conversation, and the messages of each answer."""
        found = [self._messages(v, n, where) for v, n in zip(values, self.answers, strict=True)]
        if prompt is None or (isinstance(prompt, str) and self._repeats(found)):
            count = self._shared(found, where)
            if self.whole:
                require_same_question([m[:-1] for m in found], self.answers, where)
            turns = self._turns(values[0])[:count]
            found = [messages[-1:] if self.whole else messages[count:] for messages in found]
            field = self.answers[0]
        else:
            turns = self._turns(prompt, "user")
        if not turns:
            raise DataError(_no_prompt(where, self.answers[0]))
        chat = self.conversation.chat(turns, row, f"{where}: {field!r}")
        if chat.messages[-1]["role"] == "assistant":
            raise DataError(
                f"{where}: the prompt in {field!r} ends with a message of the assistant; it must "
                "end with the user's, and the answers come after it"
            )
        answers = [_without(chat.messages, messages) for messages in found]
        for name, messages in zip(self.answers, answers, strict=True):
            _require_assistant(messages, name, where)
        return Chat(where, chat.messages, chat.tools), answers

    def _turns(self, value: Any, role: str = "assistant") -> list[Any]:
        """Messages as a row has them."""
        if isinstance(value, str):
            return [spoken(value, role, self.conversation)]
        return [value] if isinstance(value, dict) else list(value)

    def _messages(self, value: Any, name: str, where: str) -> Messages:
        return self.conversation.messages(self._turns(value), f"{where}: {name!r}")

    def _repeats(self, found: list[Messages]) -> bool:
        """Whether the answers are whole conversations."""
        return all(len(messages) > 1 for messages in found)

    def _shared(self, found: list[Messages], where: str) -> int:
        """How many messages the answers begin with that are the prompt's."""
        least = min(map(len, found)) - 1
        if self.whole or self.labelled:
            return len(found[0]) - 1
        first, second = found
        same = (i for i in range(least) if first[i] != second[i])
        count = next(same, least)
        while count and first[count - 1]["role"] == "assistant":
            count -= 1
        if count == 0:
            raise DataError(
                f"{where}: {self.answers[0]!r} and {self.answers[1]!r} do not begin with the same "
                f"message, so there is no prompt: put it into the field {_PROMPT!r}"
            )
        return count


def _require_answer(value: Any, name: str, where: str) -> None:
    if isinstance(value, str | dict) or (isinstance(value, list) and value):
        return
    said = "an empty list" if value == [] else kind(value)
    raise DataError(
        f"{where}: the field {name!r} must be text or a list of messages, not {said}; leave rows "
        "without an answer out"
    )


def _require_assistant(messages: Messages, name: str, where: str) -> None:
    """See that an answer is the assistant's.

    Raises:
        DataError: another one speaks in it.
    """
    other = next((m["role"] for m in messages if m["role"] != "assistant"), None)
    if other is None:
        return
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: {name!r} ends with a message of the role {messages[-1]['role']!r}; it must "
            "end with the assistant's answer: remove what comes after that, or leave the row out"
        )
    raise DataError(
        f"{where}: {name!r} has a message of the role {other!r} behind the prompt; only the "
        "assistant's last answer is compared: put what comes before it into the prompt"
    )


def _without(prompt: Messages, messages: Messages) -> Messages:
    """An answer without the messages of the prompt that it repeats."""
    for count in range(min(len(prompt), len(messages) - 1), 0, -1):
        if prompt[-count:] == messages[:count]:
            return messages[count:]
    return messages


def _common_words(first: str, second: str) -> str:
    """What two texts begin with, up to the last space."""
    pairs = enumerate(zip(first, second, strict=False))
    count = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    while count and not first[count - 1 : count].isspace():
        count -= 1
    return first[:count].rstrip(" ")


def _no_prompt(where: str, answers: str) -> str:
    return (
        f"{where}: there is no prompt: put it into the field {_PROMPT!r} or 'messages', or as "
        f"messages before the answer in {answers!r}"
    )
