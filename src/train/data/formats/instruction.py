"""Rows that hold an instruction and its answer, put into the words of Alpaca and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ....errors import RecipeError
from ...recipe.recipe import Dataset, PromptFormat
from .fields import fields_of, may_text, need_text
from .segments import Segments

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)


_CONCISE = (
    "Below is an instruction from a USER that describes a task, paired with an input that provides "
    "further context. The ASSISTANT writes a response that concisely and appropriately completes "
    "the request.\n\n",
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response "
    "that appropriately and concisely completes the request.\n\n",
)


@dataclass(frozen=True)
class Style:
    """The text around the fields; ``{system}``, ``{instruction}`` and ``{input}`` stand for them.

    Attributes:
        system: how the system message is written, where there is one.
        turn: the prompt of a row with an input.
        bare: the prompt of a row without one.
    """

    system: str
    turn: str
    bare: str


STYLES = {
    "instruct": Style(
        "{system}\n\n",
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
    ),
    "chat": Style(
        "SYSTEM: {system}\n",
        "USER: {instruction}\n{input}\nASSISTANT:",
        "USER: {instruction}\nASSISTANT:",
    ),
    "chatml": Style(
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    "phi": Style(
        "<|system|>\n{system}<|end|>\n",
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
    ),
    "tldr": Style(
        "{system}",
        "USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:",
        "USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:",
    ),
    "orca": Style(
        "### System:\n{system}\n",
        "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
        "### Human:\n{instruction}\n### Assistant:\n",
    ),
}


@dataclass(frozen=True)
class Fields:
    """The names of a row's fields; an empty one means that the row has no such field."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = ""


@dataclass(frozen=True)
class Prompt:
    """One type of row.

    Attributes:
        fields: where things are.
        style: the text around them.
        defaults: the system messages of rows with and without an input that have none themselves.
        answer: what every answer begins with, before the row's own.
    """

    fields: Fields
    style: Style
    defaults: tuple[str, str] = (_WITH_INPUT, _WITHOUT_INPUT)
    answer: str = ""

    def read(self, row: Any, where: str) -> Segments:
        """The prompt, which is not trained, and the answer, which is, with the end of the text.

        Raises:
            DataError: a field is missing, or has no text in it.
        """
        row = fields_of(row, where, self.fields.instruction)
        instruction = need_text(row, self.fields.instruction, where)
        given = may_text(row, self.fields.input, where) if self.fields.input else ""
        output = need_text(row, self.fields.output, where)
        system = may_text(row, self.fields.system, where) if self.fields.system else ""
        if not system:
            system = self.defaults[0] if given else self.defaults[1]
        head = filled(self.style.system, {"system": system}) if system else ""
        form = self.style.turn if given else self.style.bare
        prompt = head + filled(form, {"instruction": instruction, "input": given})
        return Segments(where, ((prompt, False), (self.answer + output, True)), bos=True, eos=True)


_NONE = ("", "")
_WITH_SYSTEM = Fields(system="system")
_ORCA = Fields("question", "", "response", "system_prompt")
_TEACHER = Fields(output="response")
_JEOPARDY = Fields("question", "category", "answer")
_OASST = Fields("INSTRUCTION", "", "RESPONSE")

PROMPTS: dict[str, Prompt] = {
    "alpaca": Prompt(Fields(), STYLES["instruct"]),
    "alpaca_instruct": Prompt(Fields(), STYLES["instruct"]),
    "alpaca_instruct.load_no_prompt": Prompt(Fields(), STYLES["instruct"], _NONE),
    "alpaca_chat": Prompt(Fields(), STYLES["chat"]),
    "alpaca_chat.load_qa": Prompt(Fields("question", "", "answer"), STYLES["chat"], _CONCISE),
    "alpaca_chat.load_no_prompt": Prompt(Fields(), STYLES["chat"], _NONE),
    "alpaca_chat.load_concise": Prompt(Fields(), STYLES["chat"], _CONCISE),
    "alpaca_chat.load_camel_ai": Prompt(
        Fields("message_1", "", "message_2"), STYLES["chat"], _CONCISE
    ),
    "alpaca_w_system": Prompt(_WITH_SYSTEM, STYLES["chat"], _NONE),
    "alpaca_w_system.load_chat": Prompt(_WITH_SYSTEM, STYLES["chat"], _NONE),
    "alpaca_w_system.load_instruct": Prompt(_WITH_SYSTEM, STYLES["instruct"], _NONE),
    "alpaca_w_system.load_open_orca": Prompt(_ORCA, STYLES["orca"], _NONE),
    "alpaca_w_system.load_open_orca_chatml": Prompt(_ORCA, STYLES["chatml"], _NONE),
    "gpteacher": Prompt(_TEACHER, STYLES["instruct"]),
    "oasst": Prompt(_OASST, STYLES["instruct"]),
    "jeopardy": Prompt(_JEOPARDY, STYLES["instruct"], answer="what is "),
    "summarizetldr": Prompt(Fields("article", "", "summary"), STYLES["tldr"], _NONE),
}
"""The types, by Axolotl's names."""

for _name in ("alpaca", "gpteacher", "oasst", "jeopardy"):
    for _style in ("instruct", "chat", "chatml", "phi"):
        PROMPTS[f"{_name}:{_style}"] = replace(PROMPTS[_name], style=STYLES[_style])


_PROMPT = ("instruction", "input")
"""What may be filled into the prompt of a row."""


def named(name: str, dataset: Dataset) -> Prompt:
    """The prompt of a type; the dataset's own field names and prompt win.

    Raises:
        RecipeError: ``input_format`` names something that a row does not have.
    """
    prompt = PROMPTS[name]
    own = {
        "instruction": dataset.field_instruction or dataset.field_human,
        "input": dataset.field_input,
        "output": dataset.field_output or dataset.field_model,
        "system": dataset.field_system,
    }
    fields = replace(prompt.fields, **{k: v for k, v in own.items() if v})
    style = prompt.style
    if form := dataset.input_format:
        require_fillable("input_format", form, _PROMPT)
        style = replace(style, turn=form, bare=form)
    return replace(prompt, fields=fields, style=style)


def spelled_out(form: PromptFormat) -> Prompt:
    """The prompt of a type that the recipe spells out.

    Raises:
        RecipeError: a format names something that a row does not have.
    """
    turn = form.format if form.format is not None else "{instruction} {input}"
    bare = form.no_input_format if form.no_input_format is not None else turn
    style = Style(form.system_format or "{system}", turn, bare)
    require_fillable("type.system_format", style.system, ("system",))
    require_fillable("type.format", turn, _PROMPT)
    require_fillable("type.no_input_format", bare, _PROMPT)
    fields = Fields(
        form.field_instruction or "instruction",
        form.field_input or "input",
        form.field_output or "output",
        form.field_system or "system",
    )
    return Prompt(fields, style, (form.system_prompt or "",) * 2)


def require_fillable(key: str, text: str, known: Sequence[str]) -> None:
    """See that a format asks only for the fields that there are.

    Raises:
        RecipeError: it does not, or its braces do not match.
    """
    try:
        filled(text, dict.fromkeys(known, ""))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        shown = " and ".join(f"{{{k}}}" for k in known)
        raise RecipeError(
            f"datasets: {key}: only {shown} can be filled in, and {text!r} has something else "
            f"({error}); write other braces twice"
        ) from None


def filled(form: str, values: Mapping[str, str]) -> str:
    """A format with values for what it asks for in braces."""
    return form.format(**values)
