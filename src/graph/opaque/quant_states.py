"""4-bit layers whose weights were made anew: they get their quantization states back.

FSDP puts a plain parameter into a layer each time that it gathers one. bitsandbytes' own forward
finds that out and mends it; a captured graph does not run that code, and TorchDynamo cannot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a layer of bitsandbytes that knows the state of its weight."""
    return "quant_state" in module.__dict__ and type(module).__module__.startswith("bitsandbytes.")


def restore_states(layers: Iterable[Any]) -> None:
    """Give each weight the state that its layer has, as bitsandbytes does before it multiplies."""
    for layer in layers:
        if getattr(layer.weight, "quant_state", None) is None and layer.quant_state is not None:
            from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

            fix_4bit_weight_quant_state_from_module(layer)
