"""Gated linear units: ``activation(gate) * up``, from two tensors or from one packed tensor.

Shazeer, "GLU variants improve transformer", 2020. Backward recomputes the activation from the
saved gate, so nothing of the size of the activation is kept but ``gate`` and ``up``:

    d up   = dy * act(gate)
    d gate = dy * up * act'(gate)
"""

from __future__ import annotations

from collections.abc import Callable
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
    gate, up = halves(gate_up, gate_first)
    return ACTIVATIONS[activation](gate) * up


def halves(packed: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    """The gate and up views of a packed tensor (..., 2F)."""
    first, second = packed.chunk(2, -1)
    return (first, second) if gate_first else (second, first)


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
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool
) -> list[Tensor]:
    grads = []
    if need_gate:
        grads.append(_gate_gradient_(grad * up, gate, activation))
    if need_up:
        grads.append(ACTIVATIONS[activation](gate).mul_(grad))
    return grads


def _packed_backward(grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    gate, up = halves(gate_up, gate_first)
    if not _plain(grad):
        parts = _backward(grad, gate, up, activation, True, True)
        return torch.cat(parts if gate_first else parts[::-1], -1)
    packed = torch.empty_like(gate_up)
    grad_gate, grad_up = halves(packed, gate_first)
    torch.mul(grad, up, out=grad_gate)
    _gate_gradient_(grad_gate, gate, activation)
    torch.mul(grad, ACTIVATIONS[activation](gate), out=grad_up)
    return packed


# -- triton ----------------------------------------------------------------------------------------
def _fake_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool
) -> list[Tensor]:
    return [gate.new_empty(gate.shape) for needed in (need_gate, need_up) if needed]


def _fake_packed_backward(
    grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool
) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


_triton_forward = library_op(
    "glu_forward(Tensor gate, Tensor up, str activation) -> Tensor",
    "mlp.glu:forward",
    _fake_forward,
    plain=_forward,
)
_triton_backward = library_op(
    "glu_backward(Tensor grad, Tensor gate, Tensor up, str activation, bool need_gate, "
    "bool need_up) -> Tensor[]",
    "mlp.glu:backward",
    _fake_backward,
    plain=_backward,
)
_triton_packed_backward = library_op(
    "glu_packed_backward(Tensor grad, Tensor gate_up, str activation, bool gate_first) -> Tensor",
    "mlp.glu:packed_backward",
    _fake_packed_backward,
    plain=_packed_backward,
)
_launch_forward, _launch_backward = direct(_triton_forward), direct(_triton_backward)


# -- autograd --------------------------------------------------------------------------------------
def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` by the implementation for these tensors, without a gradient."""
    out: Tensor = (_launch_forward if use_triton(gate, up) else _forward)(gate, up, activation)
    return out


def backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, need_gate: bool, need_up: bool
) -> list[Tensor]:
    """The needed ones of (d gate, d up)."""
    run = _launch_backward if use_triton(gate, up) else _backward
    return list(run(grad, gate, up, activation, need_gate, need_up))


def recomputed(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor | None]:
    """``forward`` in a backward pass: the output, and what ``recomputed_backward_`` can use."""
    if use_triton(gate, up):
        return forward(gate, up, activation), None
    act = ACTIVATIONS[activation](gate)
    return act * up, act


def recomputed_backward_(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, act: Tensor | None
) -> list[Tensor]:
    """(d gate, d up); ``grad`` and ``act`` must be the caller's own, and are written over."""
    if act is None:
        return backward(grad, gate, up, activation, True, True)
    d_up = act.mul_(grad)
    return [_gate_gradient_(grad.mul_(up), gate, activation), d_up]


def packed_backward(grad: Tensor, gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
    """The gradient (..., 2F) of the packed tensor."""
    run = _triton_packed_backward if use_triton(gate_up) else _packed_backward
    packed: Tensor = run(grad, gate_up, activation, gate_first)
    return packed


@capturable
class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        ctx.options = (activation,)
        return forward(gate, up, activation)

    @staticmethod
    @differentiable(double_backward(glu_reference, 2))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        need_gate, need_up, _ = ctx.needs_input_grad
        grads = backward(grad, gate, up, ctx.options[0], need_gate, need_up)
        grad_gate = grads.pop(0) if need_gate else None
        return grad_gate, grads.pop(0) if need_up else None, None


@capturable
class _GluPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str, gate_first: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate_up)
        ctx.options = activation, gate_first
        return forward(*halves(gate_up, gate_first), activation)

    @staticmethod
    @differentiable(double_backward(glu_packed_reference, 1))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        return packed_backward(grad, gate_up, *ctx.options), None, None


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` (..., F); keeps only ``gate`` and ``up`` for backward.

    ``gate`` and ``up`` are (..., F), of one floating-point dtype, with any strides; they may be
    views of one storage. Raises ValueError for an ``activation`` that is not in ``ACTIVATIONS``, or
    for shapes or dtypes that differ.
    """
    if activation not in ACTIVATIONS or gate.shape != up.shape or gate.dtype is not up.dtype:
        raise ValueError("; ".join(glu_unsupported(gate, up, activation)))
    return _Glu.apply(gate, up, activation)  # type: ignore[no-any-return, no-untyped-call]


def glu_packed(gate_up: Tensor, activation: str, gate_first: bool = True) -> Tensor:
    """``glu`` of the two halves of ``gate_up`` (..., 2F), of which one or the other is the gate.

    Backward writes one gradient tensor. Raises ValueError for an unknown activation, or a last
    dimension that is odd.
    """
    if activation not in ACTIVATIONS or gate_up.shape[-1] % 2:
        raise ValueError("; ".join(glu_packed_unsupported(gate_up, activation, gate_first)))
    return _GluPacked.apply(gate_up, activation, gate_first)  # type: ignore[no-any-return, no-untyped-call]


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
