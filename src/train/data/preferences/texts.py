"""Rows whose prompt and answers are put into a form of text: that of ChatML, of Llama 3, or any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import DataError
from ...recipe.recipe import Dataset, PromptFormat
from ..chat.template import Messages
from ..formats.conversation import Conversation
from ..formats.fields import fields_of, kind, may_text
from ..formats.instruction import filled, require_fillable
from .rows import (
    JudgedAnswer,
    Preference,
    judgement,
    part_of,
    require_same_question,
    text_of_part,
)


@dataclass(frozen=True)
class ChatForm:
    """How a conversation is written.

    Attributes:
        turn: a message; ``{role}`` and ``{content}`` stand for what it says.
        header: what the assistant's answer comes after.
        end: what ends it.
    """

    turn: str
    header: str
    end: str

    def prompt(self, messages: Messages) -> str:
        """The text of messages, up to where the answer begins."""
        turns = (self.turn.format(role=m["role"], content=m.get("content", "")) for m in messages)
        return "".join(turns) + self.header


FORMS = {
    "chatml": ChatForm(
        "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"
    ),
    "llama3": ChatForm(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}
"""The forms, by the first part of a type's name."""

_CHOSEN, _REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response")
_PROMPTS: dict[str, Sequence[str]] = {
    "": ("prompt", "input", "question", "instruction"),
    "intel": ("question",),
    "icr": ("input",),
    "argilla": ("instruction",),
    "argilla_chat": (),
    "prompt_pairs": ("prompt",),
    "ultra": ("prompt",),
}
"""The fields that may have the prompt, by the second part of a type's name; none: the prompt is
what the answer's conversation begins with."""


class FormReader:
    """Reads rows of the types ``chatml`` and ``llama3``, and of their variants.

    Args:
        form: how the text is written.
        variant: the second part of the type's name, or nothing.
        dataset: names of fields.
        conversation: reads messages.
        labelled: rows have one answer and a label; else a better and a worse one.
    """

    def __init__(
        self,
        form: ChatForm,
        variant: str,
        dataset: Dataset,
        conversation: Conversation,
        labelled: bool = False,
    ) -> None:
        self.form, self.conversation, self.labelled = form, conversation, labelled
        self.prompts = _PROMPTS[variant]
        self.system = dataset.field_system or "system"
        chosen = (dataset.field_chosen,) if dataset.field_chosen else _CHOSEN
        rejected = (dataset.field_rejected,) if dataset.field_rejected else _REJECTED
        self.answers = [("completion",)] if labelled else [chosen, rejected]

    def read(self, row: Any, where: str) -> Preference:
        """The prompt and the answers of a row, as texts."""
        row = fields_of(row, where, self.answers[0][0])
        names = [_first(row, choice) for choice in self.answers]
        good = [True, False]
        if self.labelled:
            good = [judgement(part_of(row, "label", where), "label", where)]
        found = [self._answer(part_of(row, name, where), name, where) for name in names]
        contents = [text for _, text in found]
        require_same_question([before for before, _ in found], names, where)
        history = found[0][0]
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
        """The prompt; one that says nothing is no text at all."""
        asked = any(m["content"].strip() for m in history if m["role"] != "system")
        return self.form.prompt(history) if asked else ""

    def _prompt(self, row: Mapping[str, Any], answer: str, where: str) -> str:
        if not self.prompts:
            raise DataError(
                f"{where}: {answer!r} has no question before the answer; this type needs both in "
                "it, as messages"
            )
        return text_of_part(row, _first(row, self.prompts), where)

    def _answer(self, value: Any, name: str, where: str) -> tuple[Messages, str]:
        """The messages before an answer, and its text."""
        if isinstance(value, str):
            return [], value
        if not isinstance(value, list) or not value:
            said = "an empty list" if value == [] else kind(value)
            raise DataError(
                f"{where}: the field {name!r} must be text or a list of messages, not {said}; "
                "leave rows without an answer out"
            )
        messages = self.conversation.messages(value, f"{where}: {name!r}")
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
        form: the names of fields, and the formats of prompt and answers.
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
        asked = text_of_part(row, self.fields["prompt"], where)
        system = may_text(row, self.system, where)
        texts = [text_of_part(row, self.fields[name], where) for name in self.forms]
        good = [True, False]
        if self.labelled:
            good = [judgement(part_of(row, self.label, where), self.label, where)]
        answers = (
            JudgedAnswer(filled(form, {name: text}) if text.strip() else "", flag)
            for (name, form), text, flag in zip(self.forms.items(), texts, good, strict=True)
        )
        prompt = filled(self.prompt, {"system": system, "prompt": asked}) if asked.strip() else ""
        return Preference(where, prompt, tuple(answers))


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of the fields that a row has; else the first of the names."""
    return next((name for name in names if name in row), names[0])
