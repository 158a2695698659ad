"""The recipe of a finished run: as it was trained, to load its model, or with other keys."""

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
    "overrides_of_model_config", "load_in_4bit", "load_in_8bit", "reinit_weights",
)  # fmt: skip
"""Keys whose effect is already in the files of a whole model."""

_PRECISION = ("bf16", "fp16", "bfloat16", "float16", "float32")


def recipe_for(run: RunFolder, dtype: torch.dtype | None = None) -> Recipe:
    """The recipe that loads the model of ``run`` as it was trained, without checkpointing and data.

    ``dtype`` is that of the base's weights (bfloat16, float32); None: as they were trained, or
    float32 for those in float16 where this machine cannot compute in it.

    Raises:
        ModelError: ``run.json`` has keys that this version does not know; or the run was trained
            with code that comes with its base, and the caller does not allow that.
    """
    _require_same_code(run)
    keys = written(run.recipe)
    for name in (*_DATA, *(() if run.adapter else _DONE)):
        keys.pop(name, None)
    keys |= {"base_model": run.base_model, "gradient_checkpointing": False}
    requested = None if dtype is None else str(dtype).removeprefix("torch.")
    if not run.adapter and not run.recipe:
        requested = requested or stored_dtype(run.folder)
    if requested is None and _validated(run, keys).precision() == "float16":
        from ..model.precision import scales_losses

        requested = None if scales_losses() else "float32"
    if requested is not None:
        for name in _PRECISION:
            keys.pop(name, None)
        keys["bf16"] = requested == "bfloat16"
    return _validated(run, keys)


def recipe_with(run: RunFolder, changes: Mapping[str, Any]) -> Recipe:
    """The whole recipe of ``run``, with some keys changed; None is unset.

    Raises a ModelError if ``run.json`` has keys that this version does not know.
    """
    keys = {"base_model": run.base_model, **written(run.recipe), **changes}
    return _validated(run, {k: v for k, v in keys.items() if v is not None})


def _validated(run: RunFolder, keys: Mapping[str, Any]) -> Recipe:
    """The recipe, with the caller's consent: what the folder says allows nothing."""
    try:
        return Recipe.model_validate(keys).allowed(run.consent)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        raise ModelError(
            f"{run.folder}: run.json was written by another version: this version does not know "
            f"its recipe's {key}"
        ) from None


def _require_same_code(run: RunFolder) -> None:
    """Check that a model that was trained with its own code is not loaded as another one.

    Transformers may have another class for it, which it takes where the code is not trusted.
    """
    if not run.recipe.get("trust_remote_code") or run.consent.trust_remote_code:
        return
    from transformers import PreTrainedConfig

    source = locate(run.base_model, [Path.cwd()])
    if source.gguf_file is not None:
        return
    try:
        config, _ = PreTrainedConfig.get_config_dict(source.name)
    except (OSError, ValueError):  # loading the model explains it better
        return
    if "auto_map" in config:
        what = f"{run.folder}: its run was trained with the code that comes with {run.base_model}"
        raise ModelError(why_not_run(what, CODE_SWITCH))


def written(values: Mapping[str, Any], model: type[Keys] = Recipe) -> dict[str, Any]:
    """The keys of a recipe that are not at their defaults, as one would write them.

    ``values`` has all keys of ``model``, as in ``run.json``.
    """
    result = {}
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
        result[name] = value
    return result
