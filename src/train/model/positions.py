"""The longest text that a model can read, and rows that are longer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...errors import RecipeError
from ..recipe.keys.preferences import TrlKeys
from ..recipe.preferences import rows_of
from ..recipe.recipe import Recipe
from .from_pretrained import meta_model

_COMPLETION = 512
"""Tokens of the longest completion, where the recipe does not say."""

_EXTRA = 8
"""Some tables of positions have a few rows more than there are positions."""


def positions(config: Any) -> int | None:
    """The positions that a model has by its configuration; None: not specified."""
    decoder = config.get_text_config(decoder=True)
    count = getattr(decoder, "max_position_embeddings", None)
    if not isinstance(count, int) or count <= 0:
        return None
    scaled = getattr(decoder, "rope_parameters", None) or getattr(decoder, "rope_scaling", None)
    if isinstance(scaled, dict):  # stretched: some count what that makes, others do not
        factor = scaled.get("factor")
        first = scaled.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and isinstance(first, int):
            count = max(count, int(first * factor))
    return count


def require_reach(recipe: Recipe, prepared: Any, say: Callable[[str], None]) -> None:
    """Raise a RecipeError if the model cannot read rows as long as the prepared ones.

    Lengths that it can read but has not learnt are reported with ``say``.
    """
    from .load import load_config

    config = load_config(recipe)
    if (refused := too_long(recipe, config)) is not None:
        raise RecipeError(refused)
    parts = [*([] if recipe.streams() else [prepared.train]), *prepared.validation.values()]
    if (line := beyond(recipe, config, [part.lengths for part in parts])) is not None:
        say(line)
    if rows_of(recipe) == "prompts":
        _require_room(recipe, config, max(int(part.lengths.max()) for part in parts), say)


def _require_room(recipe: Recipe, config: Any, prompt: int, say: Callable[[str], None]) -> None:
    """Raise a RecipeError if the model lacks positions for completions of the longest prompt."""
    count = positions(config)
    completion = (recipe.trl or TrlKeys()).max_completion_length or _COMPLETION
    if count is None or prompt + completion <= count:
        return
    problem = (
        f"trl.max_completion_length: prompts of up to {prompt} tokens and completions of "
        f"{completion} are more than the {count} positions of the model"
    )
    if _has_table(config, count, recipe):
        raise RecipeError(f"{problem}; set it to {max(1, count - prompt)} or less")
    say(f"{problem}; it was not trained on longer ones")


def too_long(recipe: Recipe, config: Any) -> str | None:
    """Why ``sequence_len`` is too long for a model with a table of its positions; else None."""
    count, longest = positions(config), _longest(recipe)
    if count is None or longest <= count or not _has_table(config, count, recipe):
        return None
    key = "sequence_len" if recipe.sequence_len > count else "eval_sequence_len"
    return (
        f"{key}: {longest} is more than the {count} positions that the model has; set it to {count}"
    )


def beyond(recipe: Recipe, config: Any, lengths: Iterable[Any]) -> str | None:
    """The message for rows longer than all that the model has learnt; None: there are none.

    ``lengths`` has the tokens of each row, in arrays; none of them if rows are streamed.
    """
    count = positions(config)
    if count is None or _longest(recipe) <= count:
        return None
    message = f"sequence_len: {_longest(recipe)} is more than the {count} positions of the model"
    if recipe.streams():
        return f"{message}; longer rows use positions that it was not trained on"
    longer = sum(int((part > count).sum()) for part in lengths)
    if not longer:
        return f"{message}, which is harmless: no row is longer"
    return (
        f"{message}: {longer:,} rows are longer, and use positions that it was not trained on; "
        f"sequence_len: {count} leaves them out"
    )


def _longest(recipe: Recipe) -> int:
    validated = (recipe.eval_sequence_len or 0) if recipe.validates() else 0
    return max(recipe.sequence_len, validated)


def _has_table(config: Any, known: int, recipe: Recipe) -> bool:
    """Whether the model looks its positions up; it is built without weights to see that."""
    from torch import nn

    model = meta_model(recipe, config)
    words = {model.get_input_embeddings(), model.get_output_embeddings()}
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m not in words)
    return any(known <= table.num_embeddings <= known + _EXTRA for table in tables)
