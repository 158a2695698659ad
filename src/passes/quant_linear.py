"""Linear layers over a stored weight: bitsandbytes', and whatever a formula unpacks.

Dettmers et al., "QLoRA", 2023. The adapter is fused by ``lora_linear.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..graph import facts
from ..graph.canon import is_cast_of
from ..graph.opaque.autograd_functions import is_wrapped
from ..graph.opaque.quantized import PARAMS, real_input, unknown_formula
from ..graph.subclasses import multiplies_by_itself
from ..kernels.linear.quantized import VALUES, FourBits, Quantized, is_record
from ..rewrite.pattern import Builder, Pattern
from ..rewrite.rule import Emit, Match, Rule


class OfLinears(Rule):
    """Rules over linears, whose weights may be stored: a captured tuple of the format's fields."""

    def sample(
        self, m: Match, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
    ) -> Tensor | None:
        """Any bytes as values, positive scales."""
        captured = [v for c in (m.captures, *m.users) for v in c.values()]
        weights = [Quantized(*v) for v in captured if is_record(v)]
        weights += [_weight(m.captures)] if "blocksize" in m.captures else []
        samples = (_sample(w, node, generator, shape) for w in weights)
        return next((t for t in samples if t is not None), None)

    def require_alone(self, m: Match) -> None:
        """Decline where inner values are used elsewhere, but for a cast of x that linears share."""
        for node in m.nodes:
            others = [u for u in node.users if u not in m.nodes]
            if others and node is not m.root and not is_cast_of(node, m.x):
                reason = f"{node.name} inside the formula is also used by {others[0].name}"
                m.require(False, reason, node)


class QuantLinear(OfLinears):
    """The product of an input with a weight in few bits."""

    name = op = "quant_linear"
    inner_may_stay = True  # the cast of x that the products of one input share

    def patterns(
        self, p: Builder, x: Pattern, bias: Pattern, tensors: Pattern, shape: Pattern,
        blocksize: Pattern, kind: Pattern,
    ) -> Iterable[Any]:  # fmt: skip
        """One node, by itself or inside an autograd function: ``graph/opaque/quantized.py``."""
        # where the layer computes in another dtype than its input's, it casts there and back
        weight = (tensors, shape, blocksize, kind)
        yield "cast", p.cast(p.capture("product", p.quantized_linear(p.cast(x), bias, *weight)))
        yield "plain", p.capture("product", p.quantized_linear(x, bias, *weight))

    def check(self, m: Match) -> None:
        """Constant sizes, a frozen weight."""
        self.require_alone(m)
        constants = (*m.shape, m.blocksize)
        m.require(all(type(n) is int for n in constants), "a size is not a constant", m.root)
        x = facts.tensor(m.x)
        if x is None:
            m.require(False, "x is not a tensor", m.root)
            return
        values = map(facts.tensor, m.tensors)
        m.require(
            not any(t is not None and t.requires_grad for t in values),
            "the packed weight or its scales are trained", m.root,
        )  # fmt: skip
        kind, device = facts.dtype(m.product), x.device.type
        m.require(
            not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) is kind,
            f"computes in {kind} under autocast to another dtype", m.root,
        )  # fmt: skip

    def rewrite(self, m: Match, ops: Emit) -> fx.Node:
        """One op; the weight is one argument of several fields."""
        kinds: tuple[Any, ...] = facts.dtype(m.product), facts.dtype(m.root)
        if kinds == (facts.dtype(m.x),) * 2:
            kinds = ()
        return ops.quant_linear(m.x, tuple(_weight(m.captures)), m.bias, *kinds)

    def suspects(self, graph: fx.Graph) -> Iterable[tuple[fx.Node, str]]:
        """A call of bitsandbytes, or of an autograd function that calls it; an unknown formula."""
        for node in graph.nodes:
            inner = facts.body(node.args[0]) if is_wrapped(node) else None
            calls = [node] if inner is None else list(inner.graph.nodes)
            names = [n for n in map(_library_op, calls) if n]
            is_read = all("fusewright_op" in u.meta for u in node.users)  # by DoRA's norm
            if names and not is_read:
                yield node, f"a layer that calls {' and '.join(names)}{_remark(names)}"
            for call in calls:
                by_itself = multiplies_by_itself(call)
                if by_itself:
                    yield node, f"its weight, a {by_itself}, multiplies by itself"
                operation = unknown_formula(call)
                if operation:
                    yield node, f"its weight is computed from packed tensors by {operation}"


def _remark(names: list[str]) -> str:
    if any("int8" in n for n in names):
        return ", which quantizes the input too"
    if any("gemv" in n for n in names):
        return ": an evaluation has repacked the weight, and its product has no gradient"
    return ""


def _library_op(node: fx.Node) -> str:
    """The operator of bitsandbytes that a node calls, unless it only prepares another one."""
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
    if not name.startswith("bitsandbytes.") or "_quant." in name or "blockwise" in name:
        return ""
    return name.removesuffix(".default")


def _weight(captures: Any) -> Quantized:
    return Quantized(*(captures[n] for n in PARAMS[2:]))


def _sample(
    w: Any, node: fx.Node, generator: torch.Generator, shape: tuple[int, ...]
) -> Tensor | None:
    # A random value of ``node`` if it is in ``w``.
    if node not in w.tensors:
        return None
    dtype = facts.dtype(node) or torch.uint8
    if w.kind not in VALUES and w.kind != "int8":
        return _sample_of_formula(node, dtype, generator, shape)
    # Storage in a floating-point dtype, as FSDP wants it, gets finite numbers: verification widens
    # its inputs and must be able to narrow them again.
    place = w.tensors.index(node)
    if place == 0:
        size = (*shape[:-1], shape[-1] * dtype.itemsize)
        values = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        return ((values & 0xBF) if dtype.is_floating_point else values).view(dtype)
    name = FourBits._fields[place]
    if name == "absmax_8bit":
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if name == "absmax_code":
        return torch.linspace(-1, 1, shape[0])
    return torch.rand(shape, generator=generator) * 0.2 + 0.1


def _sample_of_formula(
    node: fx.Node, dtype: torch.dtype, generator: torch.Generator, shape: tuple[int, ...]
) -> Tensor:
    # What it holds: indices and shifts are no random numbers. In a nested graph that is not known.
    there = real_input(node)
    if there is not None and there.shape == shape:
        return there.detach().clone()
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=generator) * 0.2 + 0.1).to(dtype)
    return torch.zeros(shape, dtype=dtype)
