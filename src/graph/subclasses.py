"""Weights in few bits that are tensor subclasses, and multiply by themselves (torchao's).

A graph holds one product of such a weight. Where that is, but for rounding, the product with what
its ``dequantize`` returns, the weight is opened while rules run: its inner tensors become values of
the graph, and ``dequantize`` a formula of them. What no rule has taken is closed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import facts
from .cleanup import prune
from .fakes import unpacks_itself
from .opaque.quantized import LINEAR, inner_tensor, stored

Opened = list[tuple[fx.Node, fx.Node]]
"""Products, and the weights that they had."""

_FACTOR = 4.0
"""How many times the error of a product in plain numbers theirs may have: what rounds activations
to 8 bits has more, and no gradient."""


def multiplies_by_itself(node: fx.Node) -> str:
    """The class of the frozen weight in few bits that a linear layer calls, or nothing."""
    weight = node.args[1] if node.target in LINEAR and len(node.args) > 1 else None
    t = facts.tensor(weight)
    is_known = t is None or t.requires_grad or not unpacks_itself(t)
    return "" if is_known else type(t).__name__


def open_weights(module: fx.GraphModule) -> Opened:
    """Give linear layers the formula of what their weight's ``dequantize`` returns."""
    opened: Opened = []
    for inner in facts.nested(module):
        for node in list(inner.graph.nodes):
            if not multiplies_by_itself(node):
                continue
            weight: Any = node.args[1]
            plain = _opened(weight, node)
            if plain is None:
                continue
            found = stored(plain)
            if found is None or not found.kind:
                prune(inner.graph, [plain])
                continue
            node.update_arg(1, plain)
            opened.append((node, weight))
    return opened


def close_weights(opened: Opened) -> None:
    """Put back the weights of products that are still there."""
    for node, weight in opened:
        if node._erased:
            continue
        plain: Any = node.args[1]
        node.update_arg(1, weight)
        prune(node.graph, [plain])


def _opened(weight: fx.Node, user: fx.Node) -> fx.Node | None:
    """The node of the unpacked weight, before ``user``."""
    value: Any = facts.value(weight)
    names, context = value.__tensor_flatten__()
    tensors = [getattr(value, name) for name in names]
    if any(is_traceable_wrapper_subclass(t) for t in tensors):
        return None
    if not _multiplies_plainly(value, _example(weight, names, context)):
        return None

    def dequantized(*inner: Tensor) -> Tensor:
        whole = dict(zip(names, inner, strict=True))
        result: Tensor = (
            type(value)
            .__tensor_unflatten__(whole, context, value.shape, value.stride())
            .dequantize()
        )
        return result

    try:
        formula = make_fx(dequantized, tracing_mode="fake")(*tensors).graph
    except Exception:  # whatever a library's code raises on tensors without contents
        return None
    graph, env = user.graph, {}
    inner = iter(zip(names, tensors, strict=True))
    with graph.inserting_before(user):
        for node in formula.nodes:
            if node.op == "placeholder":
                name, t = next(inner)
                env[node] = graph.call_function(inner_tensor, (weight, name))
                env[node].meta["example_value"] = t
            elif node.op == "output":
                result: fx.Node = env[node.args[0]]  # type: ignore[index]  # 2026-11-30: one tensor
                return result
            elif node.op == "get_attr":  # a tensor that ``dequantize`` has made: a table
                return None
            else:
                env[node] = graph.node_copy(node, env.__getitem__)
                env[node].meta = {"example_value": node.meta["val"]}
    return None


def _example(weight: fx.Node, names: Sequence[str], context: Any) -> Any:
    """The weight of the call that is captured; of a nested graph, one like it."""
    real = getattr(weight.meta.get("grapharg"), "example", None)
    if is_traceable_wrapper_subclass(real):
        return real
    value: Any = facts.value(weight)
    random = torch.Generator().manual_seed(0)
    parts = {}
    for name in names:
        t = getattr(value, name)
        numbers = torch.rand(tuple(t.shape), generator=random) + 0.5
        scaled = numbers if t.is_floating_point() else numbers * 8 - 8
        parts[name] = scaled.to(device=t.device, dtype=t.dtype)
    return type(value).__tensor_unflatten__(parts, context, value.shape, value.stride())


_PLAIN: dict[Any, bool] = {}


def _multiplies_plainly(value: Any, weight: Any) -> bool:
    """Whether a product, and the gradient of x, are those of ``weight.dequantize()``."""
    names, context = value.__tensor_flatten__()
    tensors = [getattr(value, name) for name in names]
    key = type(value), tuple(value.shape), value.dtype, str(value.device), repr(context), tuple(
        (tuple(t.shape), t.dtype) for t in tensors
    )  # fmt: skip
    if key not in _PLAIN:
        try:
            _PLAIN[key] = _is_plain_product(weight)
        except Exception:  # whatever a library's kernel raises: the weight stays as it is
            _PLAIN[key] = False
    return _PLAIN[key]


def _is_plain_product(weight: Any) -> bool:
    plain = weight.dequantize().detach()
    if type(plain) is not Tensor or plain.dim() != 2:
        return False
    random = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(8, plain.shape[d], generator=random) for d in (1, 0))
    results = []
    with torch.enable_grad():
        for w, kind in ((weight, plain.dtype), (plain, plain.dtype), (plain, torch.float64)):
            leaf = x.to(device=plain.device, dtype=plain.dtype).to(kind).requires_grad_()
            y = F.linear(leaf, w if w is weight else w.to(kind))
            if not y.requires_grad:
                return False
            dy = upstream.to(device=plain.device, dtype=plain.dtype).to(kind)
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    for theirs, ours, exact in zip(*results, strict=True):
        unit = torch.finfo(plain.dtype).eps
        off, own = ((t.double() - exact).norm() / exact.norm() for t in (theirs, ours))
        if not bool(off <= _FACTOR * own + unit / 2):
            return False
    return True
