"""Products with a quantized weight, as bitsandbytes' layers leave them in a captured graph.

Where no gradient is asked for it is a call of one of its registered operators; elsewhere an
autograd function that TorchDynamo has captured, whose forward consists of that call. Its state
(scales, offset, codes) comes in as inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .. import facts
from .autograd_functions import forward

PARAMS = ("x", "bias", "packed", "absmax", "shape", "blocksize", "kind", "absmax_8bit",
          "absmax_code", "absmax_offset")  # fmt: skip
"""The canonical arguments; from ``packed`` on they are those of ``kernels.quantized.Quantized``."""

_GEMM = ("A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit",
         "absmax_code", "absmax_offset")  # fmt: skip
Found = tuple[tuple[Any, ...], tuple[fx.Node, ...]]
"""The arguments, and the further nodes that belong to the operation."""


def product(node: fx.Node) -> Found | None:
    """The arguments of a product with a quantized weight; None for any other node."""
    if _name(node) == "bitsandbytes.gemm_4bit.default":
        return _four_bits(node)
    if node.target in (F.linear, torch._C._nn.linear):
        return _eight_bits(node)
    return _wrapped(node)


def _name(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def _four_bits(node: fx.Node) -> Found | None:
    arguments = dict(zip(_GEMM, node.args, strict=False)) | node.kwargs
    shape = arguments.get("shapeB", ())
    if not isinstance(shape, Iterable) or any(n not in _GEMM for n in arguments):
        return None
    packed, views = _behind_views(arguments["B"])
    head = (arguments["A"], arguments.get("bias"), packed, arguments["absmax"], tuple(shape))
    tail = (arguments["blocksize"], arguments["quant_type"])
    return (*head, *tail, *(arguments.get(n) for n in _GEMM[-3:])), views


def _eight_bits(node: fx.Node) -> Found | None:
    """``linear(x, integers.to(dtype) * (absmax[:, None] / 127), bias)``."""
    if len(node.args) != 3:
        return None
    x, weight, bias = node.args
    cast: Any
    rounded = _method(weight, "to")
    scaled = _method(weight if rounded is None else rounded.args[0], "mul")
    wide, factor = scaled.args if scaled is not None and len(scaled.args) == 2 else (None, None)
    cast, per_row = _method(wide, "to"), _method(factor, "mul")
    column = None if per_row is None else _method(per_row.args[0], "unsqueeze")
    if cast is None or per_row is None or column is None or column.args[1:] not in ((1,), (-1,)):
        return None
    chain: tuple[Any, ...] = (rounded, scaled, cast, per_row, column)
    integers = cast.args[0]
    if getattr(getattr(integers, "target", None), "__name__", "") == "_get_data_attr":
        chain, integers = (*chain, integers), integers.args[0]
    parts, dtype = facts.tensor(integers), facts.dtype(weight)
    if parts is None or parts.dtype is not torch.int8 or parts.dim() != 2:
        return None
    if per_row.args[1] != 1.0 / 127.0 or dtype is not facts.dtype(wide):
        return None
    size, absmax = tuple(parts.shape), column.args[0]
    nodes = tuple(n for n in chain if n is not None)
    return (x, bias, integers, absmax, size, size[1], "int8", None, None, None), nodes


def _method(node: Any, name: str) -> fx.Node | None:
    """``node`` where it is a call of this method."""
    is_call = isinstance(node, fx.Node) and node.op == "call_method" and node.target == name
    return node if is_call else None


def _behind_views(node: Any) -> tuple[Any, tuple[fx.Node, ...]]:
    """What a weight was before bitsandbytes gave it its normal shape."""
    views: tuple[fx.Node, ...] = ()
    while isinstance(node, fx.Node) and node.target in ("view", "reshape"):
        views, node = (*views, node), node.args[0]
    return node, views


def _wrapped(node: fx.Node) -> Found | None:
    """The product that is the whole forward of an autograd function."""
    inner = forward(node)
    match = None if inner is None else product(inner.result)
    if inner is None or match is None:
        return None
    outside = inner.outside(*match)
    if outside is None:
        return None
    args, nodes = outside
    packed, views = _behind_views(args[2])
    return (*args[:2], packed, *args[3:]), (*nodes, *views)


# --- 4-bit layers whose weights were made anew get their quantization states back -----------------
#
# FSDP puts a plain parameter into a layer each time that it gathers one. bitsandbytes' own forward
# finds that out and mends it; a captured graph does not run that code, and TorchDynamo cannot.


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a layer of bitsandbytes that knows the state of its weight."""
    return "quant_state" in module.__dict__ and type(module).__module__.startswith("bitsandbytes.")


def restore_states(layers: Iterable[Any]) -> None:
    """Give each weight the state that its layer has, as bitsandbytes does before it multiplies."""
    for layer in layers:
        if getattr(layer.weight, "quant_state", None) is None and layer.quant_state is not None:
            from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

            fix_4bit_weight_quant_state_from_module(layer)
