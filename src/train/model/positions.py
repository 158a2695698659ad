"""How long a text the model has learnt to read, and rows that are longer."""

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
    """The positions that a model knows, by its configuration; None: it does not say."""
    decoder = config.get_text_config(decoder=True)
    known = getattr(decoder, "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:
        return None
    scaled = getattr(decoder, "rope_parameters", None) or getattr(decoder, "rope_scaling", None)
    if isinstance(scaled, dict):  # stretched: some count what that makes, others do not
        factor = scaled.get("factor")
        first = scaled.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and isinstance(first, int):
            known = max(known, int(first * factor))
    return known


def require_reach(recipe: Recipe, prepared: Any, say: Callable[[str], None]) -> None:
    """See that the model can read rows as long as those of a run, and say what it has not learnt.

    Args:
        recipe: of the run.
        prepared: its rows.
        say: prints a line.

    Raises:
        RecipeError: it has no such positions.
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
    """See that the model has positions for completions of the longest prompt.

    Raises:
        RecipeError: it has no such positions.
    """
    known = positions(config)
    completion = (recipe.trl or TrlKeys()).max_completion_length or _COMPLETION
    if known is None or prompt + completion <= known:
        return
    said = (
        f"trl.max_completion_length: prompts of up to {prompt} tokens and completions of "
        f"{completion} are more than the {known} positions of the model"
    )
    if _has_table(config, known, recipe):
        raise RecipeError(f"{said}; set it to {max(1, known - prompt)} or less")
    say(f"{said}; it was not trained on longer ones")


def too_long(recipe: Recipe, config: Any) -> str | None:
    """Why ``sequence_len`` cannot be, for a model with a table of its positions; else None."""
    known, longest = positions(config), _longest(recipe)
    if known is None or longest <= known or not _has_table(config, known, recipe):
        return None
    key = "sequence_len" if recipe.sequence_len > known else "eval_sequence_len"
    return (
        f"{key}: {longest} is more than the {known} positions that the model has; set it to {known}"
    )


def beyond(recipe: Recipe, config: Any, lengths: Iterable[Any]) -> str | None:
    """What to say of rows that are longer than all that the model has learnt; None: of none.

    Args:
        recipe: of the run.
        config: of the model.
        lengths: the tokens of each row, in arrays; none of them if rows are streamed.
    """
    known = positions(config)
    if known is None or _longest(recipe) <= known:
        return None
    said = f"sequence_len: {_longest(recipe)} is more than the {known} positions of the model"
    if recipe.streams():
        return f"{said}; longer rows use positions that it was not trained on"
    longer = sum(int((part > known).sum()) for part in lengths)
    if not longer:
        return f"{said}, which is harmless: no row is longer"
    return (
        f"{said}: {longer:,} rows are longer, and use positions that it was not trained on; "
        f"sequence_len: {known} leaves them out"
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
