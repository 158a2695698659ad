"""Base models whose files hold their weights in few bits, as other libraries store them.

What is asked before the weights are loaded, what is checked once they are, and how they stay packed
where the library would unpack them at the first call. The compiler needs none of this: it sees the
formulas of any library (``kernels/linear/formula.py``).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import RecipeError
from ...packages import install_extra
from ...upstream import changed
from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class Packing:
    """How many bytes the linear layers of a checkpoint take.

    Each weight has ``bits``, and each group of ``group`` weights (0: each row) ``scale`` bits of
    scales and zero points. Layers with ``plain`` in their names are left as they are.
    """

    bits: int
    group: int = 0
    scale: int = 16
    plain: tuple[str, ...] = ()

    def nbytes(self, weight: Tensor) -> tuple[int, int]:
        """The bytes of a weight (out, in), and those of its scales."""
        groups = -(-weight.numel() // (self.group or max(weight.shape[-1], 1)))
        return -(-weight.numel() * self.bits // 8), -(-groups * self.scale // 8)

    def has(self, name: str) -> bool:
        """Whether the layer of this name, of a model with adapters or without, is stored so."""
        name = name.replace(".base_layer", "").removeprefix("base_model.model.")
        return not any(
            re.match(p[3:], name) if p.startswith("re:") else p in name for p in self.plain
        )


def _of_groups(saved: dict[str, Any]) -> Packing:
    width, group = int(saved["bits"]), max(int(saved.get("group_size") or 0), 0)
    return Packing(width, group, 16 + width, _left(saved))


def _left(saved: dict[str, Any]) -> tuple[str, ...]:
    return tuple(saved.get("modules_to_not_convert") or saved.get("ignore") or ())


def _of_compressed(saved: dict[str, Any]) -> Packing:
    weights = [g["weights"] for g in saved["config_groups"].values()]
    bits = max(int(w["num_bits"]) for w in weights)
    group = min(int(w.get("group_size") or 0) for w in weights)
    blocks = weights[0].get("block_structure")
    return Packing(bits, math.prod(blocks) if blocks else max(group, 0), 16, _left(saved))


def _of_blocks(saved: dict[str, Any]) -> Packing:
    return Packing(8, math.prod(saved.get("weight_block_size") or (0,)), 32, _left(saved))


def _of_hqq(saved: dict[str, Any]) -> Packing:
    given = saved["quant_config"]["weight_quant_params"]
    return Packing(int(given["nbits"]), int(given["group_size"]), 32, tuple(saved["skip_modules"]))


def packing(config: Any) -> Packing | None:
    """How a model's configuration says that its weights are stored; None: in a dtype of torch.

    Raises a RecipeError where that is not known.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    name = method_of(saved)
    read = STORED.get(name, StoredMethod()).packing
    try:
        given = saved if isinstance(saved, dict) else saved.to_dict()
        known = None if read is None else read(given)
    except (KeyError, TypeError, ValueError):  # a form of another release
        known = None
    if known is not None:
        return known
    raise RecipeError(
        f"base_model: its weights are stored by {name}, in a form that plan cannot count: plan the "
        "model that they were made from"
    )


@dataclass(frozen=True)
class StoredMethod:
    """A ``quant_method`` of transformers, as far as training over such weights needs to know it."""

    module: str = ""  # what must be importable, or nothing
    extra: str = ""  # the extra of this package that brings it
    untrainable: str = ""  # why nothing can be trained over it; empty: an adapter can
    packing: Callable[[dict[str, Any]], Packing] | None = None  # of its configuration


_UNPACK = (
    "set model_quantization_config: {} and model_quantization_config_kwargs: "
    "{{dequantize: true}} to unpack them"
)
_NO_GRADIENT = "its kernels have no gradient"
STORED = {
    "gptq": StoredMethod("gptqmodel", "gptq", packing=_of_groups),
    "awq": StoredMethod("gptqmodel", "gptq", packing=_of_groups),
    "compressed-tensors": StoredMethod(
        "compressed_tensors", "compressed-tensors", packing=_of_compressed
    ),
    "hqq": StoredMethod(
        "hqq", "hqq", packing=_of_hqq,
        untrainable="transformers does not load it; optimize takes HQQLinear in your own loop",
    ),
    "torchao": StoredMethod("torchao", "torchao"),
    "bitsandbytes": StoredMethod("bitsandbytes", "quant"),
    "fp8": StoredMethod(packing=_of_blocks),
    "mxfp4": StoredMethod(untrainable=f"{_NO_GRADIENT}: {_UNPACK.format('Mxfp4Config')}"),
    **{
        name: StoredMethod(untrainable=_NO_GRADIENT)
        for name in ("fbgemm_fp8", "nvfp4", "auto-round", "higgs", "metal", "quark", "spqr",
                     "vptq")
    },
}  # fmt: skip
"""Every method that is known; of others transformers says what it needs."""


def require_usable(recipe: Recipe, config: Any, trains: bool = True) -> None:
    """Raise a RecipeError, before weights are loaded, where they are packed and cannot be used.

    With ``trains`` an adapter must be there, and what can pass gradients to it.
    """
    saved: Any = getattr(config, "quantization_config", None)
    if recipe.gptq and (saved is None or method_of(saved) != "gptq"):
        by = "" if saved is None else f", but by {method_of(saved)}"
        raise RecipeError(f"gptq: the weights of {recipe.base_model} are not stored by GPTQ{by}")
    if saved is None or recipe.model_quantization_config is not None:
        return
    name = method_of(saved)
    method = STORED.get(name, StoredMethod())
    stored = f"base_model: the weights of {recipe.base_model} are stored by {name}"
    if trains and method.untrainable:
        raise RecipeError(f"{stored}, and cannot be trained over: {method.untrainable}")
    if method.module and importlib.util.find_spec(method.module) is None:
        package = method.module.replace("_", "-")
        raise RecipeError(f"{stored}, which needs {package}: {install_extra(method.extra)}")
    if trains and not recipe.adapter:
        raise RecipeError(f"{stored}, and cannot be trained themselves: set adapter")


def method_of(saved: Any) -> str:
    """The ``quant_method`` of a quantization configuration: an object, or the dict of a file."""
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    return str(getattr(saved.get("quant_method"), "value", saved.get("quant_method")))


# -- what was loaded -------------------------------------------------------------------------------
def require_whole(model: nn.Module) -> None:
    """Raise a RecipeError that names the tensors of packed weights that cannot be right.

    Scales that are no finite numbers, groups that do not divide the weight, packs that hold too few
    bits for it, and indices of groups that are not there.
    """
    wrong = [
        f"{f'{path}.{name}'.lstrip('.')}: {reason}"
        for path, module in model.named_modules()
        for name, reason in _wrong(module)
    ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RecipeError(f"base_model: {'; '.join(wrong[:3])}{more}")


def is_stored(module: Any) -> bool:
    """Whether it is a linear layer that computes its weight from packed tensors."""
    return _codes(module, _plain_tensors(module)) is not None


def unpacked_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that a linear layer multiplies with, whatever computes it."""
    tensor = next(t for t in (*layer.parameters(), *layer.buffers()))
    rows = torch.eye(layer.in_features, dtype=dtype, device=tensor.device)
    bias = None if layer.bias is None else layer.bias.clone()
    with torch.no_grad():  # without bias, one term of each sum is not zero: nothing is rounded
        if bias is not None:
            layer.bias.zero_()
        result: Tensor = layer(rows)
        if bias is not None:
            layer.bias.copy_(bias)
    return result.t().contiguous()


def _wrong(module: nn.Module) -> Iterator[tuple[str, str]]:
    tensors = _plain_tensors(module)
    codes = _codes(module, tensors)
    if codes is None:
        return
    out, into = cast("tuple[int, int]", (module.out_features, module.in_features))
    for name, t in tensors.items():
        finite = torch.isfinite(t.float()) if t.is_floating_point() else None  # of 8 bits, too
        if finite is not None and not bool(finite.all()):
            count = int((~finite).sum())
            yield name, f"{count} of its {t.numel()} numbers are not finite"
    packed, bits = tensors[codes], _bits(module)
    held = 8 * packed.numel() * packed.dtype.itemsize
    if bits is not None and held < bits * out * into:
        yield codes, f"{held} bits for {out} x {into} weights of {bits}: the pack is torn"
    name = next((n for n in _SCALES if n in tensors and tensors[n].dim() == 2), "")
    order = tensors.get("g_idx", tensors.get("weight_g_idx"))
    if not name:
        return
    groups = tensors[name].shape[0 if codes == "qweight" else 1]
    size = _group_size(module)
    there = -(-into // size) if size else groups
    if groups != there:
        yield name, f"{groups} groups, where {into} inputs in groups of {size} have {there}"
    elif order is not None and order.numel():
        low, high = (int(n) for n in torch.aminmax(order))
        if not 0 <= low <= high < groups:
            yield "g_idx", f"groups from {low} to {high}, where there are {groups}"


def _plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return {n: t for n, t in own if type(t) in (Tensor, nn.Parameter) and not t.is_meta}


def _codes(module: nn.Module, tensors: dict[str, Tensor]) -> str | None:
    """The name of the packed tensor of a linear layer; None for any other module."""
    sizes = [getattr(module, f"{side}_features", None) for side in ("out", "in")]
    if not all(isinstance(size, int) for size in sizes):
        return None
    return next((n for n in _CODES if n in tensors and _is_packed(tensors[n])), None)


_CODES = ("qweight", "weight_packed", "weight", "W_q")
_SCALES = ("scales", "weight_scale")


def _is_packed(t: Tensor) -> bool:
    return not t.is_floating_point() or t.dtype.itemsize == 1


def _arguments(module: nn.Module) -> Any:
    return getattr(getattr(module, "quantization_scheme", None), "weights", None)


def _bits(module: nn.Module) -> int | None:
    bits = getattr(module, "bits", getattr(_arguments(module), "num_bits", None))
    return bits if type(bits) is int else None


def _group_size(module: nn.Module) -> int | None:
    size = getattr(module, "group_size", getattr(_arguments(module), "group_size", None))
    return size if type(size) is int and size > 0 else None


# -- compressed-tensors ----------------------------------------------------------------------------
def keep_compressed(model: Any) -> None:
    """Let linears of compressed-tensors unpack their weights at each call, in place.

    The library unpacks all of them at the first call, and keeps them so.
    """
    hook = model.__dict__.pop("ct_decompress_hook", None)
    if hook is None:
        return
    hook.remove()
    for module in model.modules():
        weights = _arguments(module)
        packed = "weight_packed" in module._parameters or (
            isinstance(getattr(module, "weight", None), Tensor) and _is_packed(module.weight)
        )
        if weights is None or not packed or not isinstance(module, nn.Linear):
            continue
        module.__dict__.pop("forward", None)  # it rounds a weight that is not there
        module.out_features, module.in_features = shape = _shape(module)
        module.__dict__["unpacked"] = _unpacker(module.quantization_scheme, shape)
        kind: Any = type(module)
        module.__class__ = _unpacking(kind)


def _shape(module: Any) -> tuple[int, int]:
    saved = getattr(module, "weight_shape", None)
    if saved is None:
        return module.out_features, module.in_features
    out, into = saved.tolist()
    return out, into


@functools.cache
def _unpacking(kind: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.unpacked(self).to(x.dtype), self.bias)

    def weight(self: Any) -> Tensor:  # PEFT asks it for the device
        own = self._parameters
        return cast("Tensor", own["weight"] if "weight" in own else own["weight_packed"])

    names = {"forward": forward, "weight": property(weight), "__module__": kind.__module__}
    return type(kind.__name__, (kind,), names)


def _unpacker(scheme: Any, shape: tuple[int, int]) -> Callable[[Any], Tensor]:
    """What gives a module's weight, as compressed-tensors unpacks it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    arguments, names = scheme.weights, ("weight_packed", "weight_scale", "weight_zero_point")

    def unpacked(module: Any) -> Tensor:
        state: dict[str, Any] = {n: t for n in names if (t := getattr(module, n, None)) is not None}
        if "weight_packed" not in state:
            state["weight"] = module.weight
        state["weight_shape"] = shape
        weight: Tensor = compressor.decompress(state, scheme)["weight"]
        return weight

    def of_fp4(module: Any) -> Tensor:  # ``decompress``, but for the parameter that it makes
        codes = unpack_fp4_from_uint8(module.weight_packed, *shape)
        scale = compressor._decompress_scale(module.weight_scale, codes.dtype)
        whole = getattr(module, "weight_global_scale", None)
        weight: Tensor = dequantize(
            x_q=codes, scale=scale, args=arguments, global_scale=whole, dtype=codes.dtype
        )
        return weight

    return of_fp4 if "fp4" in str(scheme.format) and changed("stored scales") is None else unpacked
