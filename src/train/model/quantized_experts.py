"""Frozen weights of experts in 4 or 8 bits: bare parameters, which are no linear layers.

Such a parameter (experts, out, in) looks like one in the dtype of computation, for transformers and
for PEFT. Its numbers are unpacked whenever an operation reads them; one that takes a single expert
unpacks only that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ..recipe.recipe import Recipe


def quantize_experts(model: nn.Module, recipe: Recipe, config: Any) -> None:
    """Quantize the bare weights of experts of a loaded model in place.

    These are the frozen parameters of three dimensions in modules that have "expert" in their
    names: what Axolotl quantizes, too.

    Args:
        model: on the device that quantizes.
        recipe: which says whether to.
        config: the ``BitsAndBytesConfig`` of the linear layers.

    Raises:
        RecipeError: the model has no such weights.
    """
    if not recipe.quantize_moe_experts:
        return
    found = bare_experts(model)
    if not found:
        raise RecipeError(
            "quantize_moe_experts: the model has no bare weights of experts; leave it out: its "
            "linear layers are quantized"
        )
    for module, name, parameter in found:
        packed = _four(parameter, config) if config.load_in_4bit else _eight(parameter)
        setattr(module, name, nn.Parameter(packed, requires_grad=False))


def bare_experts(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The bare weights of a model's experts: the module, the name in it, and the parameter."""
    return [
        (module, name, parameter)
        for path, module in model.named_modules()
        if "expert" in path.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]


def _four(weights: Tensor, config: Any) -> PackedExperts:
    from bitsandbytes.functional import quantize_4bit

    nested, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type
    parts = [
        quantize_4bit(w, compress_statistics=nested, quant_type=kind) for w in weights.detach()
    ]
    return PackedExperts([p for p, _ in parts], [s for _, s in parts], weights)


def _eight(weights: Tensor) -> PackedExperts:
    from bitsandbytes.functional import int8_vectorwise_quant

    parts = [int8_vectorwise_quant(w.to(torch.float16))[:2] for w in weights.detach()]
    return PackedExperts([p for p, _ in parts], [s for _, s in parts], weights)


class PackedExperts(Tensor):
    """Weights (experts, out, in) of which each expert's are packed.

    Args:
        packed: the packed numbers of each expert.
        states: what unpacks them: bitsandbytes' ``QuantState``, or the scales of the rows.
        like: the weights as they were, for their shape, dtype and device.
    """

    packed: list[Tensor]
    states: list[Any]

    @staticmethod
    def __new__(cls: Any, packed: list[Tensor], states: list[Any], like: Tensor) -> PackedExperts:
        """Make the tensor, which has no numbers of its own."""
        made: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # 2026-11-27
            cls, like.shape, dtype=like.dtype, device=like.device, requires_grad=False
        )
        made.packed, made.states = packed, states
        return made  # type: ignore[no-any-return]  # 2026-11-27: torch has no type for it

    def expert(self, number: int) -> Tensor:
        """The weights (out, in) of one expert."""
        packed, state = self.packed[number], self.states[number]
        if isinstance(state, Tensor):
            from bitsandbytes.functional import int8_vectorwise_dequant

            unpacked: Tensor = int8_vectorwise_dequant(packed, state)
        else:
            from bitsandbytes.functional import dequantize_4bit

            unpacked = dequantize_4bit(packed, state)
        return unpacked.to(self.dtype)

    def unpacked(self) -> Tensor:
        """All weights."""
        return torch.stack([self.expert(i) for i in range(len(self.packed))])

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # 2026-11-27

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # 2026-11-27: torch has it for instances
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on unpacked numbers; what only looks at the tensor keeps it packed."""
        first = args[0] if args else None
        aten = torch.ops.aten
        if isinstance(first, PackedExperts):
            if func in (aten.detach.default, aten.alias.default):
                return PackedExperts(first.packed, first.states, first)
            if func is aten.select.int and args[1] == 0:
                return first.expert(args[2])
        plain = torch.utils._pytree.tree_map_only(
            PackedExperts, PackedExperts.unpacked, (args, kwargs or {})
        )
        return func(*plain[0], **plain[1])
