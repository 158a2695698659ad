"""Models whose linears are bitsandbytes', made as ``from_pretrained`` makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def quantize(
    model: Any, kind: str = "nf4", *, nested: bool = True, compute: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
) -> Any:  # fmt: skip
    """Replace every linear but the head; ``kind`` is ``"nf4"``, ``"fp4"`` or ``"int8"``."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").nn
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or name == "lm_head":
                continue
            size = (layer.in_features, layer.out_features, layer.bias is not None)
            if kind == "int8":
                made = bnb.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
                made.weight = bnb.Int8Params(
                    layer.weight.data, requires_grad=False, has_fp16_weights=False
                )
            else:
                options = {"compress_statistics": nested, "quant_type": kind}
                made = bnb.Linear4bit(*size, compute, quant_storage=storage, **options)
                made.weight = bnb.Params4bit(
                    layer.weight.data, requires_grad=False, quant_storage=storage, module=made,
                    **options,
                )  # fmt: skip
            made.bias = layer.bias
            setattr(parent, name, made.to("cpu"))
    mark = "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit"
    setattr(model, mark, True)  # PEFT asks for it
    return model
