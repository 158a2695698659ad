"""A gated MLP as one unit: gate and up, activation, down, each linear with LoRA or without.

    h = act(gate(x)) * up(x);  y = down(h)

What is kept for backward is chosen by ``keep``: ``"gate_up"`` keeps x, gate, up and the rank-wide
products, and computes h again where its gradient needs it; ``"input"`` keeps x alone and computes
everything again, forward and backward in tiles of tokens, so that nothing of the size of tokens
times intermediate features ever exists. The gradient of x is one tensor into which gate, up and
their adapters are accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..linear.linears import MIXED, Constants, Linear, linears, unflattened, wanted, with_operands
from ..linear.products import Rows, is_wide, shaped
from ..linear.projections import narrow_copy_for
from ..linear.qkv_block import projection
from ..linear.qkv_block import unsupported as linears_unsupported
from ..op import Op
from ..second_order import differentiable, gradients, require_kept
from . import glu
from .mlp_block_tiles import Mlp, backward, forward, tiled_backward, tiled_forward

KEEPS = ("gate_up", "input")
"""What may be kept for backward."""

LAYOUTS = ("two", "gate first", "up first")
"""Gate and up from two linears, or as the halves of one's output."""

# -- reference -------------------------------------------------------------------------------------


def reference(
    x: Tensor,
    given: Sequence[Linear],
    activation: str,
    layout: str = "two",
    keep: str = "gate_up",
) -> Tensor:
    """Define the op: the linears by themselves, the gated unit between them."""
    *ins, down = given
    outs = [projection(x, linear) for linear in ins]
    if layout == "two":
        h = glu.glu_reference(outs[0], outs[1], activation)
    else:
        h = glu.glu_packed_reference(outs[0], activation, layout == "gate first")
    return projection(h, down)


# -- cpu -------------------------------------------------------------------------------------------

# ``mlp_block_tiles``: matmuls of the libraries, in one piece or in tiles.

# -- triton ----------------------------------------------------------------------------------------

# The kernels of ``glu`` and ``lora_linear``, through their functions.

# -- autograd --------------------------------------------------------------------------------------


def _again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    _, dtype, constants, activation, layout, keep = ctx.options
    x, *saved = ctx.saved_tensors
    constants, count = Constants(*constants), len(constants[0])
    require_kept(x is not None, "mlp_block", "gate and up are frozen, and their input is not kept")

    def formula(x: Tensor, *tensors: Any) -> Tensor:
        y = reference(x, unflattened(tensors, constants), activation, layout, keep)
        return y.reshape(grad.shape)

    inputs = x, *(saved if keep == "input" else saved[2 * count - 1 :])
    needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]
    dx, *rest = gradients(formula, inputs, needed, (grad,))
    return dx if dx is None else dx.to(dtype), None, None, None, None, None, *rest


class _MLPBlock(torch.autograd.Function):
    """One rule for both ways of keeping; what is computed again is bit for bit what it was."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, copy: Tensor | None, constants: tuple[Any, ...], activation: str,
        layout: str, keep: str, *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``copy`` of x stands for it where there is one: ``products.narrow_copy``."""
        ctx.set_materialize_grads(False)
        read = x if copy is None else copy
        rows = read.reshape(-1, x.shape[-1])
        ctx.options = x.shape, x.dtype, constants, activation, layout, keep
        needed = ctx.needs_input_grad
        needed = needed[0], *needed[6:]
        if keep == "input":
            ctx.save_for_backward(*((read, *tensors) if any(needed) else tensors))
            return tiled_forward(rows, list(tensors), Constants(*constants), activation, layout)
        mlp = Mlp.of(tensors, constants, activation, layout)
        y, outs, hs = forward(Rows(rows), mlp)
        if any(needed):
            *ins, down = wanted(needed[1:], len(hs))
            for_x = any(need.weight or need.lora_a for need in ins)
            for_hs = [need.lora_b for need in (*ins, down)]
            kept = (h if w else None for h, w in zip(hs, for_hs, strict=True))
            ctx.save_for_backward(read if for_x else None, *outs, *kept, *tensors)
        else:
            ctx.save_for_backward(*tensors)
        return y  # rows: a view made in here could not be written to in place by the model

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        shape, dtype, constants, activation, layout, keep = ctx.options
        x, *saved = ctx.saved_tensors
        rows = x if x is None else x.reshape(-1, x.shape[-1])
        count, needed = len(constants[0]), ctx.needs_input_grad
        needed = needed[0], *needed[6:]
        if keep == "input":
            found = iter(tiled_backward(
                grad, x.reshape(-1, x.shape[-1]), saved, Constants(*constants), activation, layout,
                list(needed), dtype,
            ))  # fmt: skip
            dx, *grads = (next(found) if need else None for need in needed)
        else:
            outs, hs = saved[: count - 1], saved[count - 1 : 2 * count - 1]
            mlp = Mlp.of(saved[2 * count - 1 :], constants, activation, layout)
            needs = wanted(needed[1:], count)
            read = None if rows is None else Rows(rows)
            dx, grads = backward(grad, read, outs, hs, mlp, needed[0], needs, dtype)
            grads += [None] * (len(needed) - 1 - len(grads))  # of quantized weights
        return dx if dx is None else dx.view(shape), None, None, None, None, None, *grads


def mlp_block(
    x: Tensor,
    given: Sequence[Linear],
    activation: str,
    layout: str = "two",
    keep: str = "gate_up",
) -> Tensor:
    """``down(activation(gate(x)) * up(x))``.

    x, adapters and bases may have dtypes of their own, as in ``lora_linear``; under autocast every
    operand is cast as autocast casts a linear layer's (over quantized weights, the adapters' alone,
    as in ``quant_lora_linear``). What comes back to x is added up in x's dtype. Backward may run
    more than once over a retained graph.

    Args:
        x: (..., D).
        given: gate (F, D), up (F, D) and down (D, F); or both in one (2F, D), and down. All are
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
    known = ((activation, glu.ACTIVATIONS), (layout, LAYOUTS), (keep, KEEPS))
    for choice, choices in known:
        if choice not in choices:
            raise ValueError(f"{choice!r} is not one of {', '.join(choices)}")

    def run(tensors: list[Tensor | None], constants: Constants) -> Tensor:
        copy = narrow_copy_for(linears(tensors, constants)[:-1], x) if is_wide(x) else None
        options = tuple(constants), activation, layout, keep
        rows: Tensor = _MLPBlock.apply(x, copy, *options, *tensors)  # type: ignore[no-untyped-call]
        return shaped(rows, x)

    return with_operands(run, given, x)


# -- OP --------------------------------------------------------------------------------------------


def unsupported(
    x: Tensor,
    given: Sequence[Linear],
    activation: str,
    layout: str = "two",
    keep: str = "gate_up",
) -> list[str]:
    """Say why the op cannot take these arguments, which are those of ``mlp_block``."""
    known = ((activation, glu.ACTIVATIONS), (layout, LAYOUTS), (keep, KEEPS))
    reasons = [
        f"{v!r} is not one of {', '.join(choices)}" for v, choices in known if v not in choices
    ]
    if len(given) != (3 if layout == "two" else 2):
        return [*reasons, f"{len(given)} linears for the layout {layout!r}"]
    *ins, down = given
    h = x.new_empty(*x.shape[:-1], down.shape()[1])
    reasons += linears_unsupported(x, ins) + linears_unsupported(h, [down])
    if len({linear.is_quantized() for linear in given}) > 1:
        reasons.append(MIXED)
    factor = 1 if layout == "two" else 2
    if any(linear.shape()[0] != factor * h.shape[-1] for linear in ins):
        reasons.append(f"gate and up do not fit down: {[linear.shape() for linear in given]}")
    return reasons


OP = Op("mlp_block", reference, mlp_block, unsupported)
