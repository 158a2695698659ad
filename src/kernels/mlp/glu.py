"""Gated linear units: ``activation(gate) * up``, from two tensors or from one packed tensor.

Both are one function of ``outs``, the outputs of the linears before: gate and up with the layout
``"two"``, else one tensor (..., 2F) whose halves come ``"gate first"`` or ``"up first"``.

Shazeer, "GLU variants improve transformer", 2020. Backward recomputes the activation from the
saved gate, so nothing of the size of the activation is kept but ``gate`` and ``up``:

    d up   = dy * act(gate)
    d gate = dy * up * act'(gate)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..captured import capturable
from ..direct import direct
from ..launch import library_op, use_triton
from ..op import Maker, Op, not_16_bits
from ..second_order import differentiable, double_backward

_aten = torch.ops.aten

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}
"""The activations by name: what ``activation`` may be."""


# -- reference -------------------------------------------------------------------------------------
def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` as model code writes it (it rounds after the activation)."""
    return ACTIVATIONS[activation](gate) * up


def glu_packed_reference(gate_up: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    """``glu_reference`` of the two halves of the last dimension of ``gate_up``."""
    return glu_reference(*halves(gate_up, gate_first), activation)


def halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """The gate and up views of a packed tensor (..., 2F)."""
    first, second = packed.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


def gate_and_up(outs: Sequence[Any], layout: str) -> tuple[Tensor, Tensor]:
    """Return gate and up as views of ``outs``."""
    return (outs[0], outs[1]) if layout == "two" else halves(outs[0], layout == "gate first")


def reference(first: Tensor, second: Tensor | None, activation: str, layout: str) -> Tensor:
    """``glu_reference`` of ``outs``, one or two."""
    return glu_reference(*gate_and_up((first, second), layout), activation)


# -- cpu -------------------------------------------------------------------------------------------
def _plain(t: Tensor) -> bool:
    # Writing into views saves passes in eager mode. A tracer gets functional code in its place:
    # Inductor fuses that, and does not fuse writes into the halves of a tensor.
    return type(t) is Tensor and not torch.compiler.is_compiling()


def _forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ACTIVATIONS[activation](gate).mul_(up)


def _gate_gradient_(grad: Tensor, gate: Tensor, activation: str) -> Tensor:
    # Multiply ``grad`` by ``act'(gate)`` in place: no tensor of that size is made.
    # These forms have no derivative: autograd refuses a second one.
    match activation:
        case "silu":
            _aten.silu_backward.grad_input(grad, gate, grad_input=grad)
        case "gelu":
            _aten.gelu_backward.grad_input(grad, gate, grad_input=grad)
        case "gelu_tanh":
            _aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=grad)
        case "relu":
            _aten.threshold_backward.grad_input(grad, gate, 0, grad_input=grad)
        case "relu2":
            grad.mul_(F.relu(gate).mul_(2))  # doubling last would double a rounding, too
        case _:
            _aten.sigmoid_backward.grad_input(grad, torch.sigmoid(gate), grad_input=grad)
    return grad


def _backward(
    grad: Tensor, outs: list[Tensor], activation: str, layout: str, needed: list[bool]
) -> list[Tensor]:
    gate, up = gate_and_up(outs, layout)
    if layout != "two" and _plain(grad):
        packed = torch.empty_like(outs[0])
        grad_gate, grad_up = gate_and_up([packed], layout)
        torch.mul(grad, up, out=grad_gate)
        _gate_gradient_(grad_gate, gate, activation)
        torch.mul(grad, ACTIVATIONS[activation](gate), out=grad_up)
        return [packed]
    grads = []
    if needed[0]:
        grads.append(_gate_gradient_(grad * up, gate, activation))
    if needed[-1]:
        grads.append(ACTIVATIONS[activation](gate).mul_(grad))
    if layout == "two":
        return grads
    return [torch.cat(grads if layout == "gate first" else grads[::-1], -1)]


# -- triton ----------------------------------------------------------------------------------------
def _fake_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(
    grad: Tensor, outs: list[Tensor], activation: str, layout: str, needed: list[bool]
) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(outs, needed, strict=True) if need]


_launch_forward = direct(
    library_op(
        "glu_forward(Tensor gate, Tensor up, str activation) -> Tensor",
        "mlp.glu:forward",
        _fake_forward,
        plain=_forward,
    )
)
_launch_backward = direct(
    library_op(
        "glu_backward(Tensor grad, Tensor[] outs, str activation, str layout, bool[] needed)"
        " -> Tensor[]",
        "mlp.glu:backward",
        _fake_backward,
        plain=_backward,
    )
)


# -- autograd --------------------------------------------------------------------------------------
def forward(outs: Sequence[Tensor], activation: str, layout: str) -> Tensor:
    """``activation(gate) * up`` by the implementation for these tensors, without a gradient."""
    gate, up = gate_and_up(outs, layout)
    out: Tensor = (_launch_forward if use_triton(gate, up) else _forward)(gate, up, activation)
    return out


def backward(
    grad: Tensor, outs: Sequence[Tensor], activation: str, layout: str, needed: Sequence[bool]
) -> list[Tensor]:
    """The needed gradients of ``outs``."""
    run = _launch_backward if use_triton(*outs) else _backward
    return list(run(grad, list(outs), activation, layout, list(needed)))


def recomputed(
    outs: Sequence[Tensor], activation: str, layout: str
) -> tuple[Tensor, Tensor | None]:
    """``forward`` in a backward pass: the output, and what ``recomputed_backward_`` can use."""
    if use_triton(*outs):
        return forward(outs, activation, layout), None
    gate, up = gate_and_up(outs, layout)
    act = ACTIVATIONS[activation](gate)
    return act * up, act


def recomputed_backward_(
    grad: Tensor, outs: Sequence[Tensor], activation: str, layout: str, act: Tensor | None
) -> list[Tensor]:
    """The gradients of ``outs``; ``grad`` and ``act`` must be the caller's, and are used up."""
    if act is None or layout != "two":
        return backward(grad, outs, activation, layout, [True] * len(outs))
    d_up = act.mul_(grad)
    return [_gate_gradient_(grad.mul_(outs[1]), outs[0], activation), d_up]


@capturable
class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor | None, activation: str, layout: str
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(first, second)
        ctx.options = activation, layout
        return forward((first, second), activation, layout)  # type: ignore[arg-type]

    @staticmethod
    @differentiable(double_backward(reference, 2))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        outs = [t for t in ctx.saved_tensors if t is not None]
        activation, layout = ctx.options
        needed = ctx.needs_input_grad[: len(outs)]
        grads = iter(backward(grad, outs, activation, layout, needed))
        first, second = (next(grads) if need else None for need in ctx.needs_input_grad[:2])
        return first, second, None, None


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` (..., F); keeps only ``gate`` and ``up`` for backward.

    ``gate`` and ``up`` are (..., F), of one floating-point dtype, with any strides; they may be
    views of one storage. Raises ValueError for an ``activation`` that is not in ``ACTIVATIONS``, or
    for shapes or dtypes that differ.
    """
    if activation not in ACTIVATIONS or gate.shape != up.shape or gate.dtype is not up.dtype:
        raise ValueError("; ".join(glu_unsupported(gate, up, activation)))
    return _Glu.apply(gate, up, activation, "two")  # type: ignore[no-any-return, no-untyped-call]


def glu_packed(gate_up: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    """``glu`` of the two halves of ``gate_up`` (..., 2F), of which one or the other is the gate.

    Backward writes one gradient tensor. Raises ValueError for an unknown activation, or a last
    dimension that is odd.
    """
    if activation not in ACTIVATIONS or gate_up.shape[-1] % 2:
        raise ValueError("; ".join(glu_packed_unsupported(gate_up, activation, gate_first)))
    layout = "gate first" if gate_first else "up first"
    return _Glu.apply(gate_up, None, activation, layout)  # type: ignore[no-any-return, no-untyped-call]


# -- OP --------------------------------------------------------------------------------------------
def glu_unsupported(gate: Tensor, up: Tensor, activation: str) -> list[str]:
    """Why ``glu`` cannot take these inputs; empty when it can."""
    reasons = []
    if activation not in ACTIVATIONS:
        reasons.append(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if gate.ndim == 0 or gate.shape != up.shape:
        reasons.append(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    if gate.dtype is not up.dtype:
        reasons.append(f"gate is {gate.dtype} and up is {up.dtype}")
    reasons += not_16_bits(gate)
    if gate.device != up.device:
        reasons.append(f"gate is on {gate.device} and up on {up.device}")
    return reasons


def glu_packed_unsupported(gate_up: Tensor, activation: str, gate_first: bool = True) -> list[str]:
    """Why ``glu_packed`` cannot take this input; empty when it can."""
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        return [f"the last dimension of {tuple(gate_up.shape)} has no two halves"]
    return glu_unsupported(*halves(gate_up, gate_first), activation)


def _example(m: Maker, activation: str = "silu") -> tuple[Any, ...]:
    return m.x(m.sizes.inner), m.x(m.sizes.inner), activation


OP = Op(
    "glu",
    glu_reference,
    glu,
    glu_unsupported,
    example=_example,
    variants={a: partial(_example, activation=a) for a in ACTIVATIONS if a != "silu"},
)
OP_PACKED = Op(
    "glu_packed",
    glu_packed_reference,
    glu_packed,
    glu_packed_unsupported,
    rule="glu",
    example=lambda m: (m.x(2 * m.sizes.inner), "silu"),
    variants={"up-first": lambda m: (m.x(2 * m.sizes.inner), "gelu_tanh", False)},
)
