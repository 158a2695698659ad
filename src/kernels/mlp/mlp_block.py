"""A gated MLP as one unit: gate and up, activation, down, each linear with LoRA or without.

    h = act(gate(x)) * up(x);  y = down(h)

What is kept for backward is chosen by ``keep``: ``"gate_up"`` keeps x, gate, up and the rank-wide
products, and computes h again where its gradient needs it; ``"input"`` keeps x alone and computes
everything again, forward and backward in tiles of tokens, so that nothing of the size of tokens
times intermediate features ever exists. The gradient of x is one tensor into which gate, up and
their adapters are accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..captured import capturable
from ..launch import library_op
from ..linear import linear, projections
from ..linear.linear import example_of_linear
from ..linear.products import Rows, shaped
from ..linear.projections import (
    MIXED,
    WIDTH,
    Constants,
    Grads,
    Linear,
    linears,
    narrow_copy_for,
    rows_of,
    through_a,
    unflattened,
    wanted,
    with_operands,
)
from ..linear.quantized import unpacked_elements
from ..op import Maker, Op
from ..second_order import differentiable, gradients, require_saved
from . import glu

KEEPS = ("gate_up", "input")
"""What may be kept for backward."""

LAYOUTS = ("two", "gate first", "up first")
"""Gate and up from two linears, or as the halves of one's output."""


# -- reference -------------------------------------------------------------------------------------
def reference(
    x: Tensor,
    chain: Sequence[Linear],
    activation: str,
    layout: str = "two",
    keep: str = "gate_up",
) -> Tensor:
    """Define the op: the linears by themselves, the gated unit between them."""
    *ins, down = chain
    outs = [linear.reference(x, v) for v in ins]
    h = glu.glu_reference(*glu.gate_and_up(outs, layout), activation)
    return linear.reference(h, down)


# -- cpu -------------------------------------------------------------------------------------------
# Matmuls of the libraries, in one piece, which is traced, or in tiles: these are library ops, for a
# tracer would unroll their loops, and would keep what they are there to forget. On a GPU the
# kernels of ``glu`` and ``lora_linear`` run, through their functions.


TILE_BYTES = 6 << 20
"""How much of gate and up a tile has on a CPU: smaller ones make for slower matmuls (measured)."""


class Mlp(NamedTuple):
    """The linears of an MLP, and how gate and up are combined."""

    ins: list[Linear]  # gate and up, or one for both
    down: Linear  # the last one
    activation: str  # of the gate
    layout: str  # one of ``LAYOUTS``

    @classmethod
    def of(cls, tensors: Sequence[Any], *spec: Any) -> Mlp:
        """From ``projections.flat``'s tensors and constants, the activation and the layout."""
        *constants, activation, layout = spec
        *ins, down = linears(tensors, tuple(constants))
        return cls(ins, down, activation, layout)

    def unpacked(self) -> Mlp:
        """The same with plain weights, so that quantized ones are not unpacked for each tile."""
        return self._replace(ins=[v.unpacked() for v in self.ins], down=self.down.unpacked())


# -- in one piece ----------------------------------------------------------------------------------
def forward(x: Rows, mlp: Mlp) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The output (N, D) from x (N, D), the first linears' outputs, the narrow products of all."""
    outs, hs = projections.forward(x, mlp.ins)
    inner = Rows(glu.forward(outs, mlp.activation, mlp.layout))
    (y,), last = projections.forward(inner, [mlp.down])
    return y, outs, [*hs, *last]


def backward(
    grad: Tensor, x: Rows | None, outs: Sequence[Tensor], hs: Sequence[Tensor | None], mlp: Mlp,
    need_x: bool, needs: Sequence[Grads], dtype: torch.dtype,
) -> tuple[Tensor | None, list[Tensor | None]]:  # fmt: skip
    """The gradient of x in ``dtype``, and those of the linears' tensors, or None.

    ``x`` (N, D) is given where a gradient of the first linears' weights or A's is needed; ``outs``
    are the first linears' outputs, and ``hs`` the narrow products, where a B's gradient is needed:
    the last is computed if it is not there.
    """
    *in_needs, down_need = needs
    need_ins = need_x or any(any(need) for need in in_needs)
    last, inner, act = hs[-1], None, None
    is_missing = down_need.lora_b and last is None
    if down_need.weight or down_need.lora_a or is_missing:
        h, act = glu.recomputed(outs, mlp.activation, mlp.layout)
        inner = Rows(h)
        del h
        last = through_a(inner, [mlp.down])[0] if is_missing else last
    back = projections.returned([mlp.down], [last], [grad], need_ins, [down_need])
    d_down = projections.gradients_of_parameters(inner, [mlp.down], back, [down_need])
    del inner
    if not need_ins:
        return None, [*[None] * (WIDTH * len(mlp.ins)), *d_down[0]]
    d_inner: Any = projections.gradient_of_input([mlp.down], back, mlp.ins[0].dtype)
    d_outs = glu.recomputed_backward_(d_inner, outs, mlp.activation, mlp.layout, act)
    del d_inner
    dx, d_ins = projections.backward(x, mlp.ins, hs[:-1], d_outs, need_x, in_needs, dtype)
    return dx, [g for d in (*d_ins, *d_down) for g in d]


# -- in tiles --------------------------------------------------------------------------------------
def _tiles(x: Tensor, mlp: Mlp) -> list[slice]:
    """Pieces of the rows, about equal; more of them on a CPU, whose cache holds a piece."""
    wide = sum(layer.weight.shape[0] * layer.dtype.itemsize for layer in mlp.ins)
    most = max(64, TILE_BYTES // wide) if x.device.type == "cpu" else 4096
    count = max(1, -(-x.shape[0] // most))
    size = max(1, -(-x.shape[0] // count))
    return [slice(i, i + size) for i in range(0, max(1, x.shape[0]), size)]


# ``spec`` are the elements of ``flat``'s constants, the activation and the layout.
def _in_tiles(x: Tensor, tensors: Sequence[Tensor | None], spec: Any) -> tuple[Mlp, list[slice]]:
    mlp = Mlp.of(tensors, *spec)
    tiles = _tiles(x, mlp)
    return mlp.unpacked() if len(tiles) > 1 else mlp, tiles


def _tiled_forward(x: Tensor, tensors: list[Tensor | None], *spec: Any) -> Tensor:
    out = _forward_fake(x, tensors, *spec)
    mlp, tiles = _in_tiles(x, tensors, spec)
    for tile in tiles:
        out[tile] = forward(Rows(x[tile]), mlp)[0]
    return out


def _tiled_backward(
    grad: Tensor, x: Tensor, needed: list[bool], wide: torch.dtype, tensors: list[Tensor | None],
    *spec: Any,
) -> list[Tensor]:  # fmt: skip
    mlp, tiles = _in_tiles(x, tensors, spec)
    needs = wanted(needed[1:], len(spec[0]))
    dx = x.new_empty(x.shape, dtype=wide) if needed[0] else None
    totals: list[Tensor | None] = [None] * len(tensors)
    for tile in tiles:
        rows = Rows(x[tile])
        outs, hs = projections.forward(rows, mlp.ins)
        d_rows, tile_grads = backward(
            grad[tile], rows, outs, [*hs, None], mlp, needed[0], needs, wide
        )
        if dx is not None and d_rows is not None:
            dx[tile] = d_rows
        for i, part in enumerate(tile_grads):
            totals[i] = _added(totals[i], part)
    finished = [
        _unshared(total.to(t.dtype))
        for total, t in zip(totals, tensors, strict=True)
        if total is not None and t is not None
    ]
    return finished if dx is None else [dx, *finished]


def _unshared(t: Tensor) -> Tensor:
    """A contiguous tensor that shares its memory with no other: results of an op may not."""
    alone = t.untyped_storage().nbytes() == t.nbytes
    return t.contiguous() if alone else t.clone(memory_format=torch.contiguous_format)


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    if part is None:
        return None
    wide = torch.promote_types(part.dtype, torch.float32)
    if total is None:  # the tile's own tensor, or a copy
        return part.to(wide)
    return total.add_(part)


def _forward_fake(x: Tensor, tensors: list[Tensor | None], *spec: Any) -> Tensor:
    down = Mlp.of(tensors, *spec).down
    return x.new_empty(x.shape[0], down.weight.shape[0], dtype=down.dtype)


def _backward_fake(
    grad: Tensor, x: Tensor, needed: list[bool], wide: torch.dtype, tensors: list[Tensor | None],
    *_: Any,
) -> list[Tensor]:  # fmt: skip
    dx = [x.new_empty(x.shape, dtype=wide)] if needed[0] else []
    pairs = zip(tensors, needed[1:], strict=True)
    return [*dx, *(t.new_empty(t.shape) for t, need in pairs if need and t is not None)]


def _matrices(tensors: Sequence[Tensor | None], *spec: Any) -> list[tuple[int, int, int]]:
    """Elements of the weight, of A and of B of each linear; 0 of what is not there."""
    mlp = Mlp.of(tensors, *spec)
    return [
        (math.prod(v.weight.shape), *(0 if t is None else t.numel() for t in (v.lora_a, v.lora_b)))
        for v in (*mlp.ins, mlp.down)
    ]  # type: ignore[misc]  # 2026-12-03: three numbers


def _forward_flops(x: Tensor, tensors: list[Tensor | None], *spec: Any) -> int:
    return 2 * x.shape[0] * sum(map(sum, _matrices(tensors, *spec)))


def _backward_flops(
    grad: Tensor, x: Tensor, needed: list[bool], wide: torch.dtype, tensors: list[Tensor | None],
    *spec: Any,
) -> int:  # fmt: skip
    matrices = _matrices(tensors, *spec)
    needs = wanted(needed[1:], len(matrices))
    to_gate = needed[0] or any(any(need) for need in needs[:-1])
    passed = [needed[0]] * (len(needs) - 1) + [to_gate]
    total = sum(map(sum, matrices[:-1]))
    if needs[-1].lora_b:
        total += matrices[-1][1]  # its narrow product again
    for (weight, a, b), need, through in zip(matrices, needs, passed, strict=True):
        total += weight * (through + bool(need.weight))
        total += a * (through + bool(need.lora_a)) + b * ((through or need.lora_a) + need.lora_b)
    return 2 * x.shape[0] * total


def _temporary(x: Tensor, sizes: list[int], kinds: list[str]) -> int:
    return x.element_size() * sum(unpacked_elements(sizes, kinds))


_SPEC = (
    "Tensor?[] tensors, float[] scales, int[] sizes, str[] kinds, ScalarType? compute,"
    " ScalarType? dtype, str activation, str layout"
)
_forward_op = library_op(
    f"mlp_block_forward(Tensor x, {_SPEC}) -> Tensor",
    _tiled_forward,
    _forward_fake,
    _forward_flops,
    temporary=lambda x, tensors, scales, sizes, kinds, *_: _temporary(x, sizes, kinds),
)
_backward_op = library_op(
    f"mlp_block_backward(Tensor grad, Tensor x, bool[] needed, ScalarType wide, {_SPEC})"
    " -> Tensor[]",
    _tiled_backward,
    _backward_fake,
    _backward_flops,
    temporary=lambda grad, x, needed, wide, tensors, scales, sizes, kinds, *_: _temporary(
        x, sizes, kinds
    ),
)


# -- autograd --------------------------------------------------------------------------------------
def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, dtype, spec, keep = ctx.options
    *constants, activation, layout = spec
    count = len(constants[0])
    x, *saved = ctx.saved_tensors
    require_saved(x is not None, "mlp_block", "gate and up are frozen, and their input is not kept")

    def formula(x: Tensor, *tensors: Any) -> Tensor:
        y = reference(x, unflattened(tensors, Constants(*constants)), activation, layout, keep)
        return y.reshape(grad.shape)

    inputs = x, *(saved if keep == "input" else saved[2 * count - 1 :])
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
    dx, *rest = gradients(formula, inputs, needed, (grad,))
    return dx if dx is None else dx.to(dtype), None, None, None, *rest


@capturable
class _MLPBlock(torch.autograd.Function):
    """One rule for both ways of keeping; what is computed again is bit for bit what it was."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, copy: Tensor | None, spec: tuple[Any, ...], keep: str,
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        # ``copy`` is x in another dtype, or None: ``products.narrow_copy``.
        ctx.set_materialize_grads(False)
        source = x if copy is None else copy
        rows = rows_of(source)
        ctx.options = x.shape, x.dtype, spec, keep
        needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]
        if keep == "input":
            ctx.save_for_backward(*((source, *tensors) if any(needed) else tensors))
            result: Tensor = _forward_op(rows, list(tensors), *_lists(spec))
            return result
        y, outs, hs = forward(Rows(rows), Mlp.of(tensors, *spec))
        if any(needed):
            *ins, down = wanted(needed[1:], len(hs))
            for_x = any(need.weight or need.lora_a for need in ins)
            for_hs = [need.lora_b for need in (*ins, down)]
            saved_hs = (h if w else None for h, w in zip(hs, for_hs, strict=True))
            ctx.save_for_backward(source if for_x else None, *outs, *saved_hs, *tensors)
        else:
            ctx.save_for_backward(*tensors)
        return y  # rows: a view made in here could not be written to in place by the model

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        shape, dtype, spec, keep = ctx.options
        x, *saved = ctx.saved_tensors
        rows = x if x is None else rows_of(x)
        count, needed = len(spec[0]), [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        if keep == "input":
            made = iter(_backward_op(grad, rows, needed, dtype, saved, *_lists(spec)))
            dx, *grads = (next(made) if need else None for need in needed)
        else:
            outs, hs = saved[: count - 1], saved[count - 1 : 2 * count - 1]
            mlp = Mlp.of(saved[2 * count - 1 :], *spec)
            needs = wanted(needed[1:], count)
            source = None if rows is None else Rows(rows)
            dx, grads = backward(grad, source, outs, hs, mlp, needed[0], needs, dtype)
            grads += [None] * (len(needed) - 1 - len(grads))  # of quantized weights
        return dx if dx is None else dx.view(shape), None, None, None, *grads


def _lists(spec: Sequence[Any]) -> list[Any]:
    return [list(v) if isinstance(v, tuple) else v for v in spec]


def mlp_block(
    x: Tensor,
    chain: Sequence[Linear],
    activation: str,
    layout: str = "two",
    keep: str = "gate_up",
) -> Tensor:
    """``down(activation(gate(x)) * up(x))``.

    x, adapters and bases may differ in dtype, as in ``lora_linear``; under autocast every operand
    is cast as autocast casts a linear layer's (over quantized weights, the adapters' alone). The
    gradients of x are summed in x's dtype. Backward may run more than once over a retained graph.

    Args:
        x: (..., D).
        chain: gate (F, D), up (F, D) and down (D, F); or both in one (2F, D), and down. All are
            quantized or none, of one ``compute`` and one ``dtype``.
        activation: one of ``glu.ACTIVATIONS``.
        layout: ``"two"``: gate and up are two linears; ``"gate first"`` and ``"up first"``: they
            are the halves of one linear's output.
        keep: ``"gate_up"`` or ``"input"``, what is kept for backward.

    Returns:
        (..., D).

    Raises:
        ValueError: an unknown activation, layout or ``keep``, or linears that differ in what they
            must have in common.
        RuntimeError: the shapes do not fit.
    """
    allowed = ((activation, glu.ACTIVATIONS), (layout, LAYOUTS), (keep, KEEPS))
    for choice, choices in allowed:
        if choice not in choices:
            raise ValueError(f"{choice!r} is not one of {', '.join(choices)}")

    def run(tensors: list[Tensor | None], constants: Constants) -> Tensor:
        copy = narrow_copy_for(x, tensors, constants, len(chain) - 1)
        spec = (*constants, activation, layout)
        rows: Tensor = _MLPBlock.apply(x, copy, spec, keep, *tensors)  # type: ignore[no-untyped-call]
        return shaped(rows, x)

    return with_operands(run, [v.with_one_bias() for v in chain], x)


# -- OP --------------------------------------------------------------------------------------------
def unsupported(
    x: Tensor,
    chain: Sequence[Linear],
    activation: str,
    layout: str = "two",
    keep: str = "gate_up",
) -> list[str]:
    """Why the op cannot take these arguments."""
    allowed = ((activation, glu.ACTIVATIONS), (layout, LAYOUTS), (keep, KEEPS))
    reasons = [
        f"{v!r} is not one of {', '.join(choices)}" for v, choices in allowed if v not in choices
    ]
    if len(chain) != (3 if layout == "two" else 2):
        return [*reasons, f"{len(chain)} linears for the layout {layout!r}"]
    *ins, down = chain
    h = x.new_empty(*x.shape[:-1], down.shape()[1])
    reasons += linear.qkv_block_unsupported(x, ins) + linear.qkv_block_unsupported(h, [down])
    if any(v.x_lora is not None for v in chain):
        reasons.append("an adapter reads another input than its layer")
    if len({v.is_quantized() for v in chain}) > 1:
        reasons.append(MIXED)
    factor = 1 if layout == "two" else 2
    if any(v.shape()[0] != factor * h.shape[-1] for v in ins):
        reasons.append(f"gate and up do not fit down: {[v.shape() for v in chain]}")
    return reasons


def _example(m: Maker, layout: str = "two", keep: str = "gate_up", **kind: bool) -> tuple[Any, ...]:
    hidden, inner = m.sizes.hidden, m.sizes.inner
    outs = (inner, inner) if layout == "two" else (2 * inner,)
    ins = [example_of_linear(m, out, hidden, **kind) for out in outs]
    down = example_of_linear(m, hidden, inner, **kind)
    return m.x(hidden), [*ins, down], "silu", layout, keep


OP = Op(
    "mlp_block",
    reference,
    mlp_block,
    unsupported,
    example=_example,
    variants={
        "input": lambda m: _example(m, keep="input", bias=True),
        "packed": lambda m: _example(m, "up first", lora=False, bias=True),
        "quantized": lambda m: _example(m, quantized=True),
        "quantized-input": lambda m: _example(m, keep="input", quantized=True),
    },
)
