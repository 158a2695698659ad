"""Quantization-aware training by torchao's quantizers: Axolotl's ``qat``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...errors import RecipeError, first_line
from ..recipe.keys.precision import QatKeys
from ..recipe.recipe import Recipe
from .merge_aware import rounds


def fake_quantize(model: Any, recipe: Recipe) -> None:
    """Let the linear layers of a model round weights and inputs as the recipe says, in place.

    The head, too, as in Axolotl. Parameters stay what they are, and what is saved is plain.
    ``nvfp4`` is ``merge_aware``'s. Raises a RecipeError if a layer does not fit.
    """
    qat = recipe.qat
    if qat is None or recipe.rounds_as() is not None:
        return
    from torchao.quantization import quantize_

    wholes = (nn.Linear, nn.Embedding) if qat.quantize_embedding else (nn.Linear,)
    size = qat.group_size or 128
    for path, layer in model.named_modules():
        if isinstance(layer, wholes) and qat.weight_dtype in ("int4", "mxfp4"):
            columns = layer.weight.shape[1]
            if columns % size:
                raise RecipeError(
                    f"qat.group_size: {size} does not divide the {columns} inputs of {path}"
                )
    try:
        quantize_(model, _config(qat))
        if qat.quantize_embedding:
            alone = qat.model_copy(update={"activation_dtype": None})
            quantize_(model, _config(alone), filter_fn=lambda m, _: isinstance(m, nn.Embedding))
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise RecipeError(f"qat: torchao refuses these settings: {first_line(error)}") from error
    for module in model.modules():
        if rounds(module):
            module.enabled = not recipe.rounds_after()


def _config(qat: QatKeys) -> Any:
    """The configuration of torchao, with Axolotl's choices."""
    from torchao.quantization import qat as ao
    from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig

    fp8 = torch.float8_e4m3fn
    inputs: Any = None
    if qat.weight_dtype == "mxfp4":
        from torchao.prototype.qat import MXFakeQuantizeConfig

        weights = inputs = MXFakeQuantizeConfig(dtype=torch.float4_e2m1fn_x2, block_size=32)
    elif qat.weight_dtype == "float8_e4m3fn":
        weights = inputs = ao.Float8FakeQuantizeConfig(dtype=fp8)
    else:
        # those of 8 bits are for kernels that multiply in 16; torchao's default is FP8
        dtype = torch.bfloat16 if qat.activation_dtype == "int8" else fp8
        size = qat.group_size or 128
        weights = Int4WeightFakeQuantizeConfig(group_size=size, activation_dtype=dtype)
        if qat.activation_dtype == "int8":
            inputs = ao.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        elif qat.activation_dtype is not None:
            inputs = ao.Float8FakeQuantizeConfig(dtype=fp8)
    return ao.QATConfig(weight_config=weights, activation_config=inputs)
