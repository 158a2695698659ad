"""The recipe of a run that is over, from its ``run.json``: to load its model, or to read rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...errors import ModelError
from ..consent import CODE_SWITCH, why_not_run
from ..recipe.keys.base import Keys, aliases, is_default, nested
from ..recipe.locate import locate
from ..recipe.recipe import Recipe
from .run_folder import RunFolder, stored_dtype

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


def recipe_for(run: RunFolder, dtype: torch.dtype | None = None) -> Recipe:
    """The recipe that loads the model of ``run`` as it was trained, checkpointing left out.

    Args:
        run: from ``open_run``.
        dtype: of the base's weights (bfloat16, float32); None: as they were trained, or float32 for
            those in float16 where this machine cannot compute in it.

    Returns:
        A recipe whose ``base_model`` is the run's, and that says nothing about data.

    Raises:
        ModelError: ``run.json`` has keys that this version does not know; or the run was trained
            with code that comes with its base, and the caller does not allow that.
    """
    _require_same_code(run)
    keys = written(run.recipe)
    for name in (*_DATA, *(() if run.adapter else _DONE)):
        keys.pop(name, None)
    keys |= {"base_model": run.base_model, "gradient_checkpointing": False}
    asked = None if dtype is None else str(dtype).removeprefix("torch.")
    if not run.adapter and not run.recipe:
        asked = asked or stored_dtype(run.folder)
    if asked is None and _validated(run, keys).precision() == "float16" and not _has_gpu():
        asked = "float32"
    if asked is not None:
        for name in _PRECISION:
            keys.pop(name, None)
        keys["bf16"] = asked == "bfloat16"
    return _validated(run, keys)


def recipe_with(run: RunFolder, changes: Mapping[str, Any]) -> Recipe:
    """The whole recipe of ``run``, with some keys changed; None is unset.

    Raises:
        ModelError: ``run.json`` has keys that this version does not know.
    """
    keys = {"base_model": run.base_model, **written(run.recipe), **changes}
    return _validated(run, {k: v for k, v in keys.items() if v is not None})


def _validated(run: RunFolder, keys: Mapping[str, Any]) -> Recipe:
    """The recipe, with the word of who calls: what the folder says allows nothing."""
    try:
        return Recipe.model_validate(keys).allowed(run.consent)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ModelError(
            f"{run.folder}: run.json was written by another version: this version does not know "
            f"its recipe's {key}"
        ) from None


def _require_same_code(run: RunFolder) -> None:
    """See that a model that was trained with its own code is not loaded as another one.

    Transformers may have a class of its own for it, which it takes where the code is not trusted.
    """
    if not run.recipe.get("trust_remote_code") or run.consent.trust_remote_code:
        return
    from transformers import PreTrainedConfig

    source = locate(run.base_model, [Path.cwd()])
    if source.gguf_file is not None:
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.name)
    except (OSError, ValueError):  # said with more words where the model is loaded
        return
    if "auto_map" in config:
        what = f"{run.folder}: its run was trained with the code that comes with {run.base_model}"
        raise ModelError(why_not_run(what, CODE_SWITCH))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def written(values: Mapping[str, Any], model: type[Keys] = Recipe) -> dict[str, Any]:
    """The keys of a recipe that are not at their defaults, as one would write them.

    Args:
        values: all keys, as in ``run.json``.
        model: what they are the keys of.
    """
    kept = {}
    for older, value in values.items():
        name = aliases(model).get(older, older)
        field = model.model_fields.get(name)
        if value is None or (field and is_default(field, value)):
            continue
        inner = nested(field.annotation) if field else None
        if inner and isinstance(value, list):
            value = [written(v, inner) if isinstance(v, dict) else v for v in value]
        elif inner and isinstance(value, dict):
            value = written(value, inner)
        kept[name] = value
    return kept
