"""The recipe of a run that is over, from its ``run.json``: to load its model, or to read rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from ...errors import ModelError, RecipeError
from ..keys.base import Keys, nested
from ..recipe import Recipe
from ..yamlfile import load_recipe
from .runfolder import Run, stored_dtype

if TYPE_CHECKING:
    import torch

_DATA = ("datasets", "test_datasets", "pretraining_dataset")
_DONE = (
    "base_model_config", "tokenizer_config", "tokenizer_type", "revision_of_model",
    "special_tokens", "tokens", "added_tokens_overrides", "resize_token_embeddings_to_32x",
    "overrides_of_model_config", "load_in_4bit", "load_in_8bit",
)  # fmt: skip
"""What was done to the base of a whole model: its files have it."""

_PRECISION = ("bf16", "fp16", "bfloat16", "float16", "float32")


def recipe_for(run: Run, dtype: torch.dtype | None = None) -> Recipe:
    """The recipe that loads the model of ``run`` as it was trained, checkpointing left out.

    Args:
        run: from ``open_run``.
        dtype: of the base's weights (bfloat16, float16, float32); None: as they were trained.

    Returns:
        A recipe whose ``base_model`` is the run's, and that says nothing about data.

    Raises:
        ModelError: ``run.json`` has keys that this version does not know.
    """
    keys = written(run.recipe)
    for name in (*_DATA, *(() if run.adapter else _DONE)):
        keys.pop(name, None)
    keys |= {"base_model": run.base_model, "gradient_checkpointing": False}
    asked = None if dtype is None else str(dtype).removeprefix("torch.")
    if not run.adapter and not run.recipe:
        asked = asked or stored_dtype(run.folder)
    if asked is not None:
        for name in _PRECISION:
            keys.pop(name, None)
        keys |= {"bf16": asked == "bfloat16", "fp16": asked == "float16"}
    try:
        return Recipe.model_validate(keys)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ModelError(
            f"{run.folder}: run.json was written by another version: its recipe's {key} is not "
            "what this one knows"
        ) from None


def recipe_with(run: Run, changes: Mapping[str, Any]) -> Recipe:
    """The whole recipe of ``run`` with some keys changed, checked like a new one.

    Raises:
        RecipeError: it has mistakes, or its datasets are not there.
    """
    keys = {"base_model": run.base_model, **written(run.recipe), **changes}
    try:
        return load_recipe({k: v for k, v in keys.items() if v is not None})
    except RecipeError as error:
        raise RecipeError(f"{run.folder}: {error}") from None


def written(values: Mapping[str, Any], model: type[Keys] = Recipe) -> dict[str, Any]:
    """The keys of a recipe that are not at their defaults, as one would write them.

    Args:
        values: all keys, as in ``run.json``.
        model: what they are the keys of.
    """
    kept = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        optional = field is not None and not field.is_required()
        if value is None or (optional and value == to_jsonable_python(field.default)):
            continue
        inner = nested(field.annotation) if field else None
        if inner and isinstance(value, list):
            value = [written(v, inner) if isinstance(v, dict) else v for v in value]
        elif inner and isinstance(value, dict):
            value = written(value, inner)
        kept[name] = value
    return kept
