"""Loading what a folder holds: model, adapter and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ModelError, RecipeError, first_line
from ..consent import code_refused
from ..model import tokenizer as tokenizers
from ..model.adapter_files import adapter_problem, put_adapter
from ..model.shard_files import adapter_weights
from ..recipe.preferences import head_of
from .past_recipe import recipe_for
from .run_folder import RunFolder, open_run

if TYPE_CHECKING:
    import torch


def load_tokenizer(run: RunFolder) -> Any:
    """Load the tokenizer of ``run``, with its chat template.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if run.tokenizer is None:
        return tokenizers.load_tokenizer(recipe_for(run))
    auto: Any = AutoTokenizer
    try:
        may_run = run.consent.trust_remote_code
        return auto.from_pretrained(run.tokenizer, trust_remote_code=may_run)
    except (OSError, ValueError) as error:
        said = code_refused(error) or f"cannot be loaded: {first_line(error)}"
        raise RecipeError(f"{run.tokenizer}: the tokenizer {said}") from error


def load_run(
    run: RunFolder | str | Path,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Any, Any]:
    """Load the tokenizer, then the model, with its adapter, as ``load_model_of`` does.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        ModelError: there is nothing usable, or it does not write text.
        RecipeError: the base cannot be loaded.
    """
    run = run if isinstance(run, RunFolder) else open_run(run)
    if (head := head_of(recipe_for(run))).classifies:
        raise ModelError(
            f"{run.folder} holds a model that scores texts and writes none ({head.key}); load it "
            f"with {head.auto}"
        )
    tokenizer = load_tokenizer(run)
    return load_model_of(run, device, dtype), tokenizer


def load_model_of(
    run: RunFolder,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load the model of ``run``, with its adapter.

    Args:
        run: from ``open_run``.
        device: None: the one that training would use.
        dtype: of the base's weights (bfloat16 or float32); None: as they were trained.

    Returns:
        The model, in evaluation mode.

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
    """Put the adapter in ``folder`` on its base ``model``.

    Args:
        model: the base; its vocabulary grows with the adapter's.
        folder: of the adapter.
        autocast: keep adapters of 16 bits in float32, as PEFT does.

    Raises:
        ModelError: it does not fit, or cannot be read.
    """
    said = adapter_problem(folder)
    if said is not None:
        raise ModelError(said)
    try:
        grow(model, adapter_weights(str(folder)))
    except Exception as error:  # torch and safetensors raise whatever they meet
        raise ModelError(f"{folder}: the adapter cannot be loaded: {first_line(error)}") from error
    return put_adapter(model, str(folder), autocast_adapter_dtype=autocast)


def grow(model: Any, weights: dict[str, Any]) -> None:
    """Resize the vocabulary of ``model``, in place, to that of an adapter that brings one along.

    Args:
        model: the base.
        weights: the adapter's tensors, as its file names them.
    """
    embeddings = model.get_input_embeddings()
    path = next((name for name, m in model.named_modules() if m is embeddings), None)
    for own in (f"{path}.weight", f"{path}.base_layer.weight"):
        found = weights.get(f"base_model.model.{own}")
        if found is not None and found.shape[0] != embeddings.weight.shape[0]:
            model.resize_token_embeddings(found.shape[0], mean_resizing=False)
