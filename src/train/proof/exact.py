"""The same model in a higher precision: what rounding is measured by."""

from __future__ import annotations

import functools
from typing import Any

import psutil
import torch
from torch import nn

from ...errors import RecipeError
from ...rewrite.verify_exact import Wide
from ..model.quantize import dequantize_linears
from ..recipe.recipe import Recipe

_ROOM = 0.6
"""The share of the free memory that a model in fp64 may take, with gradients and optimizer."""

NO_ROOM = "there is not enough memory for the model in float64"


def exact_dtype(model: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The dtype that is exact beside the one a model computes in.

    Args:
        model: as it is loaded.
        dtype: that it computes in.

    Returns:
        fp32 for 16 bits and where activations are quantized (LLM.int8()), else fp64.
    """
    low = dtype != torch.float32 or _rounds_activations(model)
    return torch.float32 if low else torch.float64


def make_exact(model: Any, recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """Make a loaded model compute in ``dtype``, with the weights that it has.

    Quantized weights become the numbers that they stand for. In fp64, what the model's code asks
    for in fp32 (norms, rotary embeddings) is computed in fp64, too.

    Args:
        model: plain or with adapters, in place.
        recipe: that it is trained by.
        dtype: from ``exact_dtype``.

    Returns:
        The recipe to train it by.

    Raises:
        RecipeError: ``NO_ROOM``.
    """
    wide = dtype == torch.float64
    if wide and not _fits(model):
        raise RecipeError(NO_ROOM)
    _dequantize(model)
    model.to(dtype)
    changed: dict[str, Any] = {
        "bf16": False, "bfloat16": False, "fp16": False, "float16": False, "float32": True,
        "load_in_4bit": False, "load_in_8bit": False, "tf32": False,
    }  # fmt: skip
    if wide:
        # what is computed again in backward would be computed outside of the mode
        model.gradient_checkpointing_disable()
        changed["gradient_checkpointing"] = False
        model.forward = _widened(model.forward)
    return recipe.model_copy(update=changed)


def _widened(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Wide():
            return forward(*args, **kwargs)

    return call


def _fits(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 8 * (weights + 3 * trained) <= _ROOM * free


def _rounds_activations(model: nn.Module) -> bool:
    return any(type(module).__name__ == "Linear8bitLt" for module in model.modules())


def _dequantize(model: Any) -> None:
    """Make every quantized linear a plain one, without a rounding to the computation's dtype."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if (state := getattr(weight, "quant_state", None)) is not None:
            state.dtype = torch.float32
    dequantize_linears(model, torch.float32)
