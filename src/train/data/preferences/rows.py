"""What a row of preferences says, whatever its type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ....errors import DataError
from ..chat.template import Messages
from ..formats.conversation import Conversation
from ..formats.fields import as_text, kind


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a prompt.

    Attributes:
        content: its text, or its messages, all of them the assistant's.
        good: whether it is the better one of two, or desirable.
    """

    content: str | Messages
    good: bool


@dataclass(frozen=True)
class Preference:
    """A prompt, and how answers to it are judged.

    Attributes:
        where: file and line, for messages.
        prompt: its text, or its messages, which do not end with the assistant's.
        answers: the better one before the worse one; none in a row that is a prompt alone. They are
            text where the prompt is, and messages where it is that.
        tools: the functions that the assistant may call, as JSON schemas, or None.
        columns: the other fields of a prompt alone, for the functions that judge completions.
    """

    where: str
    prompt: str | Messages
    answers: tuple[JudgedAnswer, ...] = ()
    tools: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        """Whether the prompt, or an answer, says nothing."""
        return _blank(self.prompt) or any(_blank(answer.content) for answer in self.answers)

    @property
    def equal(self) -> bool:
        """Whether both answers are the same."""
        return len(self.answers) == 2 and self.answers[0].content == self.answers[1].content


@dataclass(frozen=True)
class JudgedSteps:
    """An answer in steps.

    Attributes:
        where: file and line, for messages.
        prompt: the text before it.
        steps: the text of each step, with what separates it from the next.
        labels: the class of each step; None: it is not trained.
    """

    where: str
    prompt: str
    steps: tuple[str, ...]
    labels: tuple[int | None, ...]


class PreferenceReader(Protocol):
    """Reads rows of one type."""

    def read(self, row: Any, where: str) -> Preference | JudgedSteps:
        """The content of a row; raises a DataError that has ``where`` in it."""
        ...


def _blank(content: str | Messages) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not any(str(m.get("content") or "").strip() or m.get("tool_calls") for m in content)


_NAMED_BY = {
    "chosen": "field_chosen", "rejected": "field_rejected", "completion": "field_model",
}  # fmt: skip
"""The keys of a dataset that name a field, by its usual name."""

_OTHERS = (
    ({"chosen", "rejected"}, "rl: dpo, orpo, simpo, cpo or reward_model"),
    ({"completion", "label"}, "rl: kto"),
    ({"completions", "labels"}, "process_reward_model"),
)
"""Fields that tell what rows are for."""


def part_of(row: Mapping[str, Any], field: str, where: str) -> Any:
    """A field that must be there.

    Raises:
        DataError: it is missing; the message says what to do.
    """
    if field in row:
        return row[field]
    has = ", ".join(map(repr, row)) or "no fields"
    other = ""
    if any(field in fields for fields, _ in _OTHERS):
        other = next((use for fields, use in _OTHERS if fields <= set(row)), "")
    named = _NAMED_BY.get(field)
    todo = f"name the field that has it with {named}" if named else "rename the field that has it"
    hint = f"such rows are for {other}" if other else todo
    raise DataError(f"{where}: the field {field!r} is missing (the row has {has}); {hint}")


def text_of_part(
    row: Mapping[str, Any],
    field: str,
    where: str,
    todo: str = "for messages, use a type that reads them, such as chat_template",
) -> str:
    """A field with text in it; ``todo`` says what helps where there is something else.

    Raises:
        DataError: it is missing, or something else.
    """
    return as_text(part_of(row, field, where), field, where, todo)


def require_same_question(before: Sequence[Messages], names: Sequence[str], where: str) -> None:
    """See that the answers of a row are to the same question.

    Args:
        before: the messages before each answer; none where the answer is alone.
        names: the fields of the answers.
        where: file and line, for the error.

    Raises:
        DataError: they are not.
    """
    asked = [messages for messages in before if messages]
    if len(asked) == 2 and asked[0] != asked[1]:
        raise DataError(
            f"{where}: the messages before the answer differ in {names[0]!r} and {names[1]!r}; "
            "only answers to the same question are compared: leave the row out"
        )


def spoken(text: str, role: str, conversation: Conversation) -> dict[str, str]:
    """A text as a message, in the names that the messages of the dataset have."""
    names = conversation.mappings
    return {names.get("role", "role"): role, names.get("content", "content"): text}


def judgement(value: Any, field: str, where: str) -> bool:
    """A label that says whether something is good; 0 and 1 are taken for false and true.

    Raises:
        DataError: it is something else.
    """
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    said = repr(value) if isinstance(value, int | float) else kind(value)
    todo = "leave rows without a label out"
    if value is not None:
        todo = "convert ratings to true (good) or false (bad) first"
    raise DataError(f"{where}: the field {field!r} must be true or false, not {said}; {todo}")
