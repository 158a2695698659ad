"""Rows of preferences, whatever their type, and the readers of each type."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ....errors import DataError, RecipeError
from ...recipe.keys.row_types import (
    PREFERENCE_TYPES,
    ChatForm,
    is_function_type,
    plain_type,
    preference_types,
)
from ...recipe.preferences import RowKind
from ...recipe.recipe import Dataset, PromptFormat, Recipe
from ...user_functions import load_function, what_failed
from ..chat.template import Chat, Messages
from ..formats.conversation import Conversation
from ..formats.fields import IMAGE_FIELDS, as_text, fields_of, kind, may_text
from ..formats.instruction import filled, require_fillable
from ..images.picture import Picture


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a prompt: a text or the assistant's messages; ``good``: better or desirable."""

    content: str | Messages
    good: bool


@dataclass(frozen=True)
class Preference:
    """A prompt, and how answers to it are judged.

    Attributes:
        prompt: its text, or its messages, which do not end with the assistant's.
        answers: the better one before the worse one, as text or messages like the prompt; none in a
            row that is a prompt alone.
        tools: the functions that the assistant may call, as JSON schemas, or None.
        columns: the other fields of a prompt alone, for the functions that judge completions.
        pictures: those of the parts of type ``image`` in the prompt, in order.
    """

    where: str
    prompt: str | Messages
    answers: tuple[JudgedAnswer, ...] = ()
    tools: Any = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether the prompt or an answer is empty."""
        return _blank(self.prompt) or any(_blank(answer.content) for answer in self.answers)

    @property
    def equal(self) -> bool:
        """Whether both answers are the same."""
        return len(self.answers) == 2 and self.answers[0].content == self.answers[1].content


@dataclass(frozen=True)
class JudgedSteps:
    """An answer in steps.

    Attributes:
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
"""Fields that show the purpose of rows."""


def part_of(row: Mapping[str, Any], field: str, where: str) -> Any:
    """A required field; raises a DataError with the remedy if it is missing."""
    if field in row:
        return row[field]
    has = ", ".join(map(repr, row)) or "no fields"
    other = ""
    if any(field in fields for fields, _ in _OTHERS):
        other = next((use for fields, use in _OTHERS if fields <= set(row)), "")
    key = _NAMED_BY.get(field)
    todo = f"name the field that has it with {key}" if key else "rename the field that has it"
    hint = f"such rows are for {other}" if other else todo
    raise DataError(f"{where}: the field {field!r} is missing (the row has {has}); {hint}")


def text_of_part(
    row: Mapping[str, Any],
    field: str,
    where: str,
    todo: str = "for messages, use a type that reads them, such as chat_template",
) -> str:
    """A field with text in it; raises a DataError if it is missing, or something else.

    ``todo`` is the remedy where there is something else.
    """
    return as_text(part_of(row, field, where), field, where, todo)


def require_same_question(before: Sequence[Messages], names: Sequence[str], where: str) -> None:
    """Raise a DataError unless the answers of a row are to the same question.

    ``before`` has the messages before each answer, none where the answer is alone; ``names`` are
    the fields of the answers.
    """
    prompts = [messages for messages in before if messages]
    if len(prompts) == 2 and prompts[0] != prompts[1]:
        raise DataError(
            f"{where}: the messages before the answer differ in {names[0]!r} and {names[1]!r}; "
            "only answers to the same question are compared: leave the row out"
        )


def spoken(text: str, role: str, conversation: Conversation) -> dict[str, str]:
    """A text as a message, with the dataset's names of its fields."""
    names = conversation.mappings
    return {names.get("role", "role"): role, names.get("content", "content"): text}


def judgement(value: Any, field: str, where: str) -> bool:
    """Whether a label is good; 0 and 1 count as false and true, others raise a DataError."""
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    got = repr(value) if isinstance(value, int | float) else kind(value)
    todo = "leave rows without a label out"
    if value is not None:
        todo = "convert ratings to true (good) or false (bad) first"
    raise DataError(f"{where}: the field {field!r} must be true or false, not {got}; {todo}")


# --- messages, or plain texts --------------------------------------------------------------------


_PROMPT = "prompt"


class MessageReader:
    """Reads rows of the type ``chat_template`` and of those without a type.

    The prompt is in the field ``field_messages``, or in ``prompt``, or it is what both answers
    begin with. Answers are texts, single messages, or conversations that may repeat the prompt.
    Where prompt and answers are texts and no field has messages, they stay texts.

    Args:
        labelled: rows have one answer and a label; else a better and a worse one.
        whole: answers are conversations, whose last message is the answer.
        prompts: fields of the prompt, best first; None: as described above.
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
        self.field = dataset.field_messages
        self.prompts = prompts
        if labelled:
            self.answers = [dataset.field_model or "completion"]
        else:
            self.answers = [dataset.field_chosen or "chosen", dataset.field_rejected or "rejected"]

    def read(self, row: Any, where: str) -> Preference:
        """The prompt and the answers of a row."""
        row = fields_of(row, where, self.answers[0], IMAGE_FIELDS)
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
            if any(row.get(name) for name in IMAGE_FIELDS):
                raise DataError(
                    f"{where}: the row has an image, and its prompt is plain text: write the "
                    "prompt as a list of messages, with a part of type image where it belongs"
                )
            before, texts = self._texts(prompt, values, where)
            answers = tuple(map(JudgedAnswer, texts, good))
            return Preference(where, before, answers)
        chat, contents = self._chats(prompt, field, values, row, where)
        answers = tuple(
            JudgedAnswer(content, flag) for content, flag in zip(contents, good, strict=True)
        )
        return Preference(where, chat.messages, answers, chat.tools, pictures=chat.pictures)

    def _prompt_field(self, row: Mapping[str, Any], answer: Any) -> str | None:
        """The field with the prompt, which is not the conversation that has the answer, too."""
        whole = answer if isinstance(answer, list) else None
        names = self.prompts or (self.field, _PROMPT)
        return next((n for n in names if row.get(n) is not None and row[n] != whole), None)

    def _as_messages(self, field: str | None, prompt: Any, values: list[Any]) -> bool:
        chats = field is not None and (self.prompts is not None or field == self.field)
        return chats or isinstance(prompt, list) or not all(isinstance(v, str) for v in values)

    # --- texts -----------------------------------------------------------------------------------

    def _texts(self, prompt: Any, values: list[str], where: str) -> tuple[str, list[str]]:
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
        listed = [self._messages(v, n, where) for v, n in zip(values, self.answers, strict=True)]
        if prompt is None or (isinstance(prompt, str) and self._repeats(listed)):
            count = self._shared(listed, where)
            if self.whole:
                require_same_question([m[:-1] for m in listed], self.answers, where)
            turns = self._turns(values[0])[:count]
            listed = [messages[-1:] if self.whole else messages[count:] for messages in listed]
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
        # those of the chat no longer say which pictures their parts are
        prompt = self.conversation.messages(turns, where) if chat.pictures else chat.messages
        answers = [_without(prompt, messages) for messages in listed]
        for name, messages in zip(self.answers, answers, strict=True):
            _require_assistant(messages, name, where)
            _require_text(messages, name, where)
        return replace(chat, where=where), answers

    def _turns(self, value: Any, role: str = "assistant") -> list[Any]:
        if isinstance(value, str):
            return [spoken(value, role, self.conversation)]
        return [value] if isinstance(value, dict) else list(value)

    def _messages(self, value: Any, name: str, where: str) -> Messages:
        return self.conversation.messages(self._turns(value), f"{where}: {name!r}")

    def _repeats(self, answers: list[Messages]) -> bool:
        return all(len(messages) > 1 for messages in answers)

    def _shared(self, answers: list[Messages], where: str) -> int:
        """The number of messages at the beginning of the answers that are the prompt's."""
        least = min(map(len, answers)) - 1
        if self.whole or self.labelled:
            return len(answers[0]) - 1
        first, second = answers
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
    got = "an empty list" if value == [] else kind(value)
    raise DataError(
        f"{where}: the field {name!r} must be text or a list of messages, not {got}; leave rows "
        "without an answer out"
    )


def _require_assistant(messages: Messages, name: str, where: str) -> None:
    """Raise a DataError unless all messages of an answer are the assistant's."""
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


def _require_text(messages: Messages, name: str, where: str) -> None:
    if any(isinstance(m.get("content"), list) for m in messages):
        raise DataError(
            f"{where}: {name!r} has an image in an answer, and only answers of text are compared: "
            "put images into the prompt, or leave the row out"
        )


def _without(prompt: Messages, messages: Messages) -> Messages:
    for count in range(min(len(prompt), len(messages) - 1), 0, -1):
        if prompt[-count:] == messages[:count]:
            return messages[count:]
    return messages


def _common_words(first: str, second: str) -> str:
    """The common beginning of two texts, up to the last space."""
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


# --- texts in the form of ChatML, Llama 3 or others ----------------------------------------------


_CHOSEN, _REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")


class FormReader:
    """Reads rows of the types ``chatml`` and ``llama3``, and of their variants.

    Args:
        prompts: the fields that may have the prompt; none: the prompt is what the answer's
            conversation begins with.
        labelled: rows have one answer and a label; else a better and a worse one.
    """

    def __init__(
        self,
        form: ChatForm,
        prompts: Sequence[str],
        dataset: Dataset,
        conversation: Conversation,
        labelled: bool = False,
    ) -> None:
        self.form, self.conversation, self.labelled = form, conversation, labelled
        self.prompts = prompts
        self.system = dataset.field_system or "system"
        fields = (dataset.field_chosen,) if dataset.field_chosen else _CHOSEN
        rejected = (dataset.field_rejected,) if dataset.field_rejected else _REJECTED
        self.answers = [("completion",)] if labelled else [fields, rejected]

    def read(self, row: Any, where: str) -> Preference:
        """The prompt and the answers of a row, as texts."""
        row = fields_of(row, where, self.answers[0][0])
        names = [_first(row, choice) for choice in self.answers]
        good = [True, False]
        if self.labelled:
            good = [judgement(part_of(row, "label", where), "label", where)]
        parsed = [self._answer(part_of(row, name, where), name, where) for name in names]
        contents = [text for _, text in parsed]
        require_same_question([before for before, _ in parsed], names, where)
        history = parsed[0][0]
        if len(history) == 1 and any(name in row for name in self.prompts):
            history = []  # the same question again
        if not history:
            history = [{"role": "user", "content": self._prompt(row, names[0], where)}]
        system = may_text(row, self.system, where)
        if system and history[0]["role"] != "system":
            history.insert(0, {"role": "system", "content": system})
        answers = (
            JudgedAnswer(content + self.form.end if content.strip() else "", flag)
            for content, flag in zip(contents, good, strict=True)
        )
        return Preference(where, self._written(history), tuple(answers))

    def _written(self, history: Messages) -> str:
        """The prompt; an empty one is no text at all."""
        has_question = any(m["content"].strip() for m in history if m["role"] != "system")
        if not has_question:
            return ""
        turn = self.form.turn
        turns = (turn.format(role=m["role"], content=m.get("content", "")) for m in history)
        return "".join(turns) + self.form.header

    def _prompt(self, row: Mapping[str, Any], answer: str, where: str) -> str:
        if not self.prompts:
            raise DataError(
                f"{where}: {answer!r} has no question before the answer; this type needs both in "
                "it, as messages"
            )
        return text_of_part(row, _first(row, self.prompts), where)

    def _answer(self, value: Any, name: str, where: str) -> tuple[Messages, str]:
        if isinstance(value, str):
            return [], value
        if not isinstance(value, list) or not value:
            got = "an empty list" if value == [] else kind(value)
            raise DataError(
                f"{where}: the field {name!r} must be text or a list of messages, not {got}; "
                "leave rows without an answer out"
            )
        messages = self.conversation.messages(value, f"{where}: {name!r}")
        if any(isinstance(m.get("content"), list) for m in messages):
            raise DataError(
                f"{where}: {name!r} has an image, which this type cannot write; use "
                "type: chat_template"
            )
        if any(m.get("tool_calls") or m.get("function_call") for m in messages):
            raise DataError(
                f"{where}: {name!r} has tool_calls, which this type cannot write; use "
                "type: chat_template, with a template that writes them"
            )
        if messages[-1]["role"] != "assistant":
            raise DataError(
                f"{where}: {name!r} ends with a message of the role {messages[-1]['role']!r}; it "
                "must end with the assistant's answer: remove what comes after that, or leave the "
                "row out"
            )
        return messages[:-1], messages[-1].get("content", "")


class SpelledOutReader:
    """Reads rows of a type that the recipe writes as keys.

    Args:
        labelled: rows have one answer and a label; else a better and a worse one.

    Raises:
        RecipeError: a format names something that a row does not have.
    """

    def __init__(self, form: PromptFormat, labelled: bool = False) -> None:
        self.labelled = labelled
        self.prompt = form.prompt_format or "{prompt}"
        self.fields = {"prompt": form.field_prompt or "prompt"}
        self.system = form.field_system or "system"
        label = form.field_label
        self.label = label if isinstance(label, str) else "label"
        if labelled:
            self.fields["completion"] = form.field_completion or "completion"
            self.forms = {"completion": form.completion_format or "{completion}"}
        else:
            self.fields["chosen"] = form.field_chosen or "chosen"
            self.fields["rejected"] = form.field_rejected or "rejected"
            self.forms = {
                "chosen": form.chosen_format or "{chosen}",
                "rejected": form.rejected_format or "{rejected}",
            }
        require_fillable("type.prompt_format", self.prompt, ("system", "prompt"))
        for name, text in self.forms.items():
            require_fillable(f"type.{name}_format", text, (name,))

    def read(self, row: Any, where: str) -> Preference:
        """The prompt and the answers of a row, as texts."""
        row = fields_of(row, where, self.fields["prompt"])
        question = text_of_part(row, self.fields["prompt"], where)
        system = may_text(row, self.system, where)
        texts = [text_of_part(row, self.fields[name], where) for name in self.forms]
        good = [True, False]
        if self.labelled:
            good = [judgement(part_of(row, self.label, where), self.label, where)]
        answers = (
            JudgedAnswer(filled(form, {name: text}) if text.strip() else "", flag)
            for (name, form), text, flag in zip(self.forms.items(), texts, good, strict=True)
        )
        prompt = (
            filled(self.prompt, {"system": system, "prompt": question}) if question.strip() else ""
        )
        return Preference(where, prompt, tuple(answers))


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the fields that a row has; else the first of the names."""
    return next((name for name in names if name in row), names[0])


# --- prompts without answers ----------------------------------------------------------------------


_RESERVED = (
    "prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids",
    "trainer_state", "log_extra", "log_metric", "environments", "image", "images",
)  # fmt: skip
"""Names that the trainer itself reads, or passes to the functions that judge completions."""


class PromptReader:
    """Reads a prompt, as text or as messages, and keeps the other fields of the row."""

    def __init__(self, dataset: Dataset, conversation: Conversation) -> None:
        self.field, self.conversation = dataset.field_messages, conversation

    def read(self, row: Any, where: str) -> Preference:
        """The prompt of a row, and its other fields."""
        row = fields_of(row, where, "prompt")
        field = self.field if row.get(self.field) is not None else "prompt"
        value = part_of(row, field, where)
        if not isinstance(value, str) and not (isinstance(value, list) and value):
            got = "an empty list" if value == [] else kind(value)
            raise DataError(
                f"{where}: the field {field!r} must be text or a list of messages, not {got}; "
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
    """Raise a DataError unless a field can be kept, and passed to a function."""
    if name in _RESERVED:
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


# --- answers in labelled steps -------------------------------------------------------------------


class StepReader:
    """Reads a prompt, the steps of an answer to it, and the label of each.

    Args:
        classes: the number of labels, from 0.
    """

    def __init__(self, dataset: Dataset, classes: int) -> None:
        separator = dataset.step_separator
        self.separator = "\n" if separator is None else separator
        self.last_only, self.classes = bool(dataset.train_on_last_step_only), classes

    def read(self, row: Any, where: str) -> JudgedSteps:
        """The steps of a row, each with the separator behind it."""
        row = fields_of(row, where, "completions")
        prompt = text_of_part(row, "prompt", where, "write messages as one text")
        steps, labels = part_of(row, "completions", where), part_of(row, "labels", where)
        for name, value in (("completions", steps), ("labels", labels)):
            if not isinstance(value, list) or not value:
                got = "an empty list" if value == [] else kind(value)
                raise DataError(
                    f"{where}: the field {name!r} must be a list with an item for each step, not "
                    f"{got}; split an answer into its steps, or leave the row out"
                )
        if len(steps) != len(labels):
            raise DataError(
                f"{where}: there are {len(steps)} 'completions' and {len(labels)} 'labels'; each "
                "step needs one label: add those that are missing, or leave the row out"
            )
        for i, step in enumerate(steps, start=1):
            if not isinstance(step, str):
                raise DataError(
                    f"{where}: step {i} in 'completions' must be text, not {kind(step)}"
                )
        classes = [self._class(label, i, where) for i, label in enumerate(labels, start=1)]
        targets = [
            None if self.last_only and i < len(classes) - 1 else c for i, c in enumerate(classes)
        ]
        return JudgedSteps(where, prompt, tuple(s + self.separator for s in steps), tuple(targets))

    def _class(self, label: Any, i: int, where: str) -> int:
        if isinstance(label, int) and 0 <= int(label) < self.classes:
            return int(label)
        valid = "true or false" if self.classes == 2 else f"a number from 0 to {self.classes - 1}"
        got = repr(label) if isinstance(label, int | float) else kind(label)
        raise DataError(
            f"{where}: label {i} in 'labels' must be {valid}, not {got}; convert ratings first"
        )


# --- rows that a function of the recipe changes --------------------------------------------------


class OwnTypeReader:
    """Reads rows of a type that is a function, in the form that Axolotl calls it.

    ``function(recipe)`` returns what changes a row, ``change(row, tokenizer=None) -> row``, alone
    or in a pair with ``{"remove_columns": [names]}`` (or ``"__all__"``): fields that the row loses.

    Args:
        recipe: passed to the function as a mapping; it has the caller's permission.

    Raises:
        RecipeError: the function cannot be loaded, or is not allowed.
    """

    def __init__(self, name: str, inner: PreferenceReader, recipe: Recipe) -> None:
        self.name, self.inner, self.recipe = name, inner, recipe
        self._load()

    def _load(self) -> None:
        function = load_function(self.name, "datasets: type", self.recipe.consent)
        try:
            change = function(self.recipe.model_dump(mode="json"))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the code raises, SystemExit among it
            reason = what_failed(error, function)
            raise RecipeError(f"datasets: type: {self.name} {reason}") from error
        options: Any = {}
        if isinstance(change, tuple) and len(change) == 2:
            change, options = change
        if not callable(change) or not isinstance(options, Mapping):
            raise RecipeError(
                f"datasets: type: {self.name} must return a function that changes a row, not "
                f"{kind(change)}"
            )
        self.change: Callable[..., Any] = change
        self.removed = options.get("remove_columns") or ()

    def read(self, row: Any, where: str) -> Preference | JudgedSteps:
        """The content of a row, after the function has changed it."""
        row = fields_of(row, where, "prompt")
        try:
            changed = self.change(dict(row), tokenizer=None)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the code raises
            raise DataError(f"{where}: {self.name} {what_failed(error, self.change)}") from error
        if not isinstance(changed, Mapping):
            raise DataError(f"{where}: {self.name} must return an object, not {kind(changed)}")
        rest = {} if self.removed == "__all__" else row
        rest = {name: value for name, value in rest.items() if name not in self.removed}
        return self.inner.read({**rest, **changed}, where)

    def __getstate__(self) -> dict[str, Any]:
        """Other processes load the function again: what it returns cannot be pickled."""
        return {k: v for k, v in vars(self).items() if k not in ("change", "removed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._load()


# --- the reader of a dataset ---------------------------------------------------------------------


def reader_of(
    dataset: Dataset, recipe: Recipe, rows: RowKind, conversation: Conversation, classes: int = 2
) -> PreferenceReader:
    """The reader of a dataset's rows; raises a RecipeError if there is no such type.

    ``classes`` is the number of labels of judged steps.
    """
    labelled = rows == "labelled"
    if isinstance(dataset.type, PromptFormat):
        return SpelledOutReader(dataset.type, labelled)
    name = plain_type(dataset.type)
    if is_function_type(dataset.type, rows):
        plain = dataset.model_copy(update={"type": "chat_template"})
        inner = reader_of(plain, recipe, rows, conversation, classes)
        return OwnTypeReader(dataset.type, inner, recipe)
    if rows == "steps" and name in ("chat_template", "stepwise_supervised"):
        return StepReader(dataset, classes)
    types = preference_types(rows)
    if name not in types:
        raise RecipeError(f"datasets: type: {dataset.type!r} is not one of {', '.join(types)}")
    if rows == "prompts":
        return PromptReader(dataset, conversation)
    row_type = PREFERENCE_TYPES[name]
    if row_type.form is not None:
        return FormReader(row_type.form, row_type.prompts or (), dataset, conversation, labelled)
    return MessageReader(dataset, conversation, labelled, row_type.whole, row_type.prompts)
