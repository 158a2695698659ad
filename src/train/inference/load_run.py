"""Loads the result of a run: its recipe, its model with the adapter, its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ...errors import ModelError, RecipeError, first_line
from ..consent import CODE_SWITCH, code_refused, why_not_run
from ..data.images.reading import no_images
from ..model import tokenizer as tokenizers
from ..model.adapter_files import adapter_problem, put_adapter
from ..model.files import adapter_weights
from ..model.processor import with_processor
from ..processing import Processing
from ..recipe.keys.base import Keys, aliases, is_default, nested
from ..recipe.locate import locate
from ..recipe.preferences import head_of
from ..recipe.recipe import Recipe
from .run_folder import RunFolder, open_run, stored_dtype

if TYPE_CHECKING:
    import torch


# --- models, adapters and tokenizers -------------------------------------------------------------


def load_tokenizer(run: RunFolder) -> Any:
    """Load the tokenizer of ``run``, with its chat template; raises a RecipeError if it cannot."""
    from transformers import AutoTokenizer

    if run.tokenizer is None:
        return tokenizers.load_tokenizer(recipe_for(run))
    auto: Any = AutoTokenizer
    try:
        may_run = run.consent.trust_remote_code
        return auto.from_pretrained(run.tokenizer, trust_remote_code=may_run)
    except (OSError, ValueError) as error:
        problem = code_refused(error) or f"cannot be loaded: {first_line(error)}"
        raise RecipeError(f"{run.tokenizer}: the tokenizer {problem}") from error


def load_processing(run: RunFolder) -> Processing:
    """The same with the processor of its base, where that reads images."""
    return with_processor(recipe_for(run), load_tokenizer(run))


def load_run(
    run: RunFolder | str | Path,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """Load the tokenizer, then the model in evaluation mode; returns the model and the tokenizer.

    Raises:
        ModelError: there is nothing usable, or it does not write text.
        RecipeError: the base cannot be loaded.
    """
    run = run if isinstance(run, RunFolder) else open_run(run)
    _require_writing(run)
    tokenizer = load_tokenizer(run)
    return load_model_of(run, device, dtype), tokenizer


def load_to_answer(run: RunFolder, images: bool = False) -> tuple[Any, Processing]:
    """The same with the processor of images, where the base has one.

    ``images``: there are some, so that a ModelError is raised, before the weights are loaded, if
    they cannot be read.
    """
    _require_writing(run)
    processing = load_processing(run)
    if images and processing.processor is None:
        raise ModelError(f"{run.folder}: {no_images(processing).why}")
    return load_model_of(run), processing


def _require_writing(run: RunFolder) -> None:
    if (head := head_of(recipe_for(run))).classifies:
        raise ModelError(
            f"{run.folder} holds a model that scores texts and writes none ({head.key}); load it "
            f"with {head.auto}"
        )


def load_model_of(
    run: RunFolder,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load the model of ``run``, with its adapter, in evaluation mode.

    ``device`` is by default the one that training would use. ``dtype`` is that of the base's
    weights (bfloat16 or float32), by default the one they were trained in.

    Raises:
        ModelError: there is nothing usable, or the adapter does not fit its base.
        RecipeError: the base cannot be loaded.
    """
    from ..model.load import load_model
    from ..model.precision import device_for_training

    recipe = recipe_for(run, dtype)
    model = load_model(recipe)
    if run.adapter:
        model = with_adapter(model, run.folder, recipe.peft_autocast_adapter_dtype)
    return model.to(device or device_for_training()).eval()


def with_adapter(model: Any, folder: Path, autocast: bool = True) -> Any:
    """Put the adapter in ``folder`` on ``model``; the vocabulary grows with the adapter's.

    ``autocast`` keeps adapters of 16 bits in float32, as PEFT does. Raises a ModelError if the
    adapter does not fit, or cannot be read.
    """
    problem = adapter_problem(folder)
    if problem is not None:
        raise ModelError(problem)
    try:
        grow(model, adapter_weights(str(folder)))
    except Exception as error:  # torch and safetensors raise anything
        raise ModelError(f"{folder}: the adapter cannot be loaded: {first_line(error)}") from error
    return put_adapter(model, str(folder), autocast_adapter_dtype=autocast)


def grow(model: Any, weights: dict[str, Any]) -> None:
    """Resize the vocabulary of ``model``, in place, to that of an adapter that brings one along.

    ``weights`` are the adapter's tensors, by the names in its file.
    """
    embeddings = model.get_input_embeddings()
    path = next((name for name, m in model.named_modules() if m is embeddings), None)
    for name_in_base in (f"{path}.weight", f"{path}.base_layer.weight"):
        weight = weights.get(f"base_model.model.{name_in_base}")
        if weight is not None and weight.shape[0] != embeddings.weight.shape[0]:
            model.resize_token_embeddings(weight.shape[0], mean_resizing=False)


# --- recipes of finished runs --------------------------------------------------------------------


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
