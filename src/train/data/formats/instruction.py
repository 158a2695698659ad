"""Rows with an instruction and its answer, in the prompts of Alpaca and its relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ....errors import RecipeError
from ...recipe.keys.row_types import Fields, Style, Wording
from ...recipe.recipe import Dataset, PromptFormat
from .fields import fields_of, may_text, need_text
from .segments import Segments


class Prompt(Wording):
    """Reads rows with one wording of the prompt."""

    def read(self, row: Any, where: str) -> Segments:
        """The prompt, which is not trained, and the answer, which is, with the end of the text.

        Raises a DataError if a field is missing, or has no text in it.
        """
        row = fields_of(row, where, self.fields.instruction)
        instruction = need_text(row, self.fields.instruction, where)
        input_text = may_text(row, self.fields.input, where) if self.fields.input else ""
        output = need_text(row, self.fields.output, where)
        system = may_text(row, self.fields.system, where) if self.fields.system else ""
        if not system:
            system = self.defaults[0] if input_text else self.defaults[1]
        head = filled(self.style.system, {"system": system}) if system else ""
        form = self.style.turn if input_text else self.style.bare
        prompt = head + filled(form, {"instruction": instruction, "input": input_text})
        return Segments(where, ((prompt, False), (self.answer + output, True)), bos=True, eos=True)


_PROMPT = ("instruction", "input")
"""The fields that the format of a prompt may use."""


def worded(wording: Wording, dataset: Dataset) -> Prompt:
    """The reader of a wording; the dataset's field names and prompt take precedence.

    Raises a RecipeError if ``input_format`` names something that a row does not have.
    """
    overrides = {
        "instruction": dataset.field_instruction or dataset.field_human,
        "input": dataset.field_input,
        "output": dataset.field_output or dataset.field_model,
        "system": dataset.field_system,
    }
    fields = replace(wording.fields, **{k: v for k, v in overrides.items() if v})
    style = wording.style
    if form := dataset.input_format:
        require_fillable("input_format", form, _PROMPT)
        style = replace(style, turn=form, bare=form)
    return Prompt(fields, style, wording.defaults, wording.answer)


def spelled_out(form: PromptFormat) -> Prompt:
    """The prompt of a type in the recipe; raises a RecipeError for unknown fields."""
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
    """Raise a RecipeError if a format asks for unknown fields, or its braces do not match."""
    try:
        filled(text, dict.fromkeys(known, ""))
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        fields = " and ".join(f"{{{k}}}" for k in known)
        raise RecipeError(
            f"datasets: {key}: only {fields} can be filled in, and {text!r} has something else "
            f"({error}); write other braces twice"
        ) from None


def filled(form: str, values: Mapping[str, str]) -> str:
    """A format with values in place of the names in braces."""
    return form.format(**values)
