"""Loads the result of a run: its model with the adapter, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError, RecipeError, first_line
from ..consent import code_refused
from ..data.images.reading import no_images
from ..model import tokenizer as tokenizers
from ..model.adapter_files import adapter_problem, put_adapter
from ..model.files import adapter_weights
from ..model.processor import with_processor
from ..processing import Processing
from ..recipe.preferences import head_of
from .run_folder import RunFolder, open_run
from .run_recipe import recipe_for

if TYPE_CHECKING:
    import torch


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
