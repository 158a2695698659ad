"""Merging a model as a whole, by PEFT: for bases and adapters that cannot be taken in pieces."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import ModelError, first_line
from ..inference.load_run import with_adapter
from ..inference.past_recipe import recipe_for
from ..inference.run_folder import RunFolder
from ..model.load import load_model
from ..model.quantize import dequantize_linears


def merged_in_memory(run: RunFolder, dtype: torch.dtype | None, dequantize: bool) -> Any:
    """Load the base, put the adapter on it, and merge.

    Args:
        run: with an adapter, or a whole model in shards, which is only loaded.
        dtype: of the result; None: as in training.
        dequantize: make quantized weights full before the adapter is added to them; they are then
            those that the adapter was trained on, rounding included.

    Returns:
        A plain model.

    Raises:
        ModelError: PEFT cannot merge this kind of adapter, or into this kind of base.
    """
    loaded = torch.float32 if dtype is torch.float16 else dtype  # which a CPU cannot compute in
    recipe = recipe_for(run, loaded)
    if not dequantize:  # the full weights, although training saw quantized ones
        recipe = recipe.model_copy(update={"load_in_4bit": False, "load_in_8bit": False})
    model = load_model(recipe)
    if dequantize:
        dequantize_linears(model, model.dtype)
    merged = _merged(model, run, recipe.peft_autocast_adapter_dtype) if run.adapter else model
    merged.config.use_cache = True  # load_model has switched it off
    if "_weight_conversions" in vars(merged):  # those of quantized files cannot be turned round
        del merged._weight_conversions
    return merged if dtype is None or _quantized(merged) else merged.to(dtype)


def _merged(model: Any, run: RunFolder, autocast: bool) -> Any:
    """The base ``model`` with the adapter of ``run`` in its weights."""
    model = with_adapter(model, run.folder, autocast)
    _untie(model)
    try:
        return model.merge_and_unload()
    except Exception as error:  # PEFT raises whatever it meets; some kinds have no such method
        kind = type(model.base_model).__name__
        raise ModelError(f"{run.folder}: a {kind} cannot be merged: {first_line(error)}") from error


def _quantized(model: Any) -> bool:
    return getattr(model.config, "quantization_config", None) is not None


def _untie(model: Any) -> None:
    """Give embeddings and head weights of their own if only one of them is adapted.

    Otherwise merging into the one would change the other, which the adapter has left alone.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    ends: Any = (base.get_input_embeddings(), base.get_output_embeddings())
    layers: list[Any] = [
        end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends
    ]
    if layers[1] is None or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    if getattr(layers[0], "weight", None) is getattr(layers[1], "weight", None):
        layers[1].weight = nn.Parameter(layers[1].weight.detach().clone(), requires_grad=False)
        base.config.tie_word_embeddings = False
