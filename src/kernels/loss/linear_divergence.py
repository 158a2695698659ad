"""The divergence of a student's head from a teacher's, for distillation, without either's logits.

Both projections exist one tile of rows at a time. With a frozen student's head the gradient of x is
made while the tile is there, and backward scales it; a trained head has both projected once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from ..launch import library_op
from ..op import Maker, Op
from ..second_order import differentiable, gradients
from .linear_cross_entropy_parts import operands, require_rows
from .linear_divergence_tiles import compute, differentiate

KINDS = ("forward_kl", "reverse_kl", "jsd")

# ------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, other_x: Tensor, other_weight: Tensor | None,
    other_bias: Tensor | None, targets: Tensor | None = None, kind: str = "forward_kl",
    beta: float = 0.5, temperature: float = 1.0, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """The divergence of the softmax of fp32 logits; 0 for ignored rows."""
    with torch.no_grad():
        if other_weight is None:
            teacher = _wide(other_x)
        else:
            teacher = _logp(linear(other_x, other_weight, other_bias), temperature)
    student = _logp(linear(x, weight, bias), temperature)
    if kind == "jsd" and 0.0 < beta < 1.0:
        weights = torch.tensor([1.0 - beta, beta], dtype=student.dtype, device=x.device).log()
        mixture = torch.logaddexp(student + weights[0], teacher + weights[1])
        of_student = kl_div(mixture, student, reduction="none", log_target=True).sum(-1)
        of_teacher = kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
        values = (1.0 - beta) * of_student + beta * of_teacher
    elif kind == "forward_kl" or (kind == "jsd" and beta == 0.0):
        values = kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    else:
        values = kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    return values if targets is None else values.masked_fill(targets == ignore_index, 0)


def _logp(logits: Tensor, temperature: float) -> Tensor:
    return (_wide(logits) / temperature).log_softmax(-1)


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 else t.float()


# -------------------------------------------------------------------------------- cpu and triton


def _implementation(*args: Any) -> tuple[Tensor, Tensor]:
    return compute(*args)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    with_gradient = rest[-1]
    return x.new_empty((x.shape[0],), dtype=wide), x.new_empty(
        (x.shape[0] if with_gradient else 0, x.shape[1])
    )


def _flops(
    x: Tensor, weight: Tensor, bias: Any, other_x: Tensor, other_weight: Tensor | None, *rest: Any
) -> int:
    """Both logits, and the gradient that is made with them; of all rows, ignored ones too."""
    products = weight.numel() * (1 + rest[-1])
    products += 0 if other_weight is None else other_weight.numel()
    return 2 * x.shape[0] * int(products)


_forward = library_op(
    "linear_divergence_forward(Tensor x, Tensor weight, Tensor? bias, Tensor other_x, "
    "Tensor? other_weight, Tensor? other_bias, Tensor? targets, str kind, float beta, "
    "float temperature, int ignore_index, bool made) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    _flops,
)


def _implementation_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return differentiate(*args)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    needs, (vocabulary, hidden) = rest[-1], weight.shape
    return (
        x.new_empty(x.shape if needs[0] else (0, hidden)),
        x.new_empty((vocabulary if needs[1] else 0, hidden)),
        x.new_empty((vocabulary if needs[2] else 0,), dtype=grad.dtype),
    )


def _flops_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Any, other_x: Tensor,
    other_weight: Tensor | None, *rest: Any,
) -> int:  # fmt: skip
    products = weight.numel() * (1 + sum(rest[-1][:2]))
    products += 0 if other_weight is None else other_weight.numel()
    return 2 * x.shape[0] * int(products)


_backward = library_op(
    "linear_divergence_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor other_x, Tensor? other_weight, Tensor? other_bias, Tensor? targets, str kind, "
    "float beta, float temperature, int ignore_index, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _implementation_backward,
    _fake_backward,
    _flops_backward,
)

# -------------------------------------------------------------------------------------- autograd


def _again(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, bias, *rest_of_head = ctx.saved_tensors[:7]

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference(x, weight, bias, *rest_of_head, *ctx.chosen)

    return gradients(formula, (x, weight, bias), ctx.needs_input_grad, (grad,))


class _LinearDivergence(torch.autograd.Function):
    """Forward computes the gradient of x if the head is frozen; else backward computes all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, other: tuple[Any, ...],
        targets: Tensor | None, chosen: tuple[Any, ...], recording: bool,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        needs = [recording and needed for needed in ctx.needs_input_grad[:3]]
        with_gradient = needs[0] and not any(needs[1:])
        rows = x.reshape(-1, x.shape[-1])
        other_x, *head = other
        teacher = other_x.reshape(-1, other_x.shape[-1]), *head
        flat = None if targets is None else targets.reshape(-1)
        values, term = _forward(rows, weight, bias, *teacher, flat, *chosen, with_gradient)
        ctx.save_for_backward(x, weight, bias, *other, targets, term if with_gradient else None)
        ctx.chosen = chosen
        # no view: what an op returns may be written to
        out: Tensor = torch.ops.aten._unsafe_view(values, list(x.shape[:-1]))
        return out

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bias, other_x, other_weight, other_bias, targets, term = ctx.saved_tensors
        kind, beta, temperature, ignore_index = ctx.chosen
        flat, nothing = grad.reshape(-1), (None,) * 4
        if term is not None:
            dx = (term * (flat / temperature).unsqueeze(1)).to(x.dtype).view(x.shape)
            return dx, None, None, *nothing
        needs = list(ctx.needs_input_grad[:3])
        input_grads = _backward(
            flat, x.reshape(-1, x.shape[-1]), weight, bias,
            other_x.reshape(-1, other_x.shape[-1]), other_weight, other_bias,
            None if targets is None else targets.reshape(-1), kind, beta, temperature,
            ignore_index, needs,
        )  # fmt: skip
        each = zip(input_grads, (x, weight, bias), needs, strict=True)
        return *(t.to(of.dtype).view(of.shape) if need else None for t, of, need in each), *nothing


def linear_divergence(
    x: Tensor, weight: Tensor, bias: Tensor | None, other_x: Tensor, other_weight: Tensor | None,
    other_bias: Tensor | None, targets: Tensor | None = None, kind: str = "forward_kl",
    beta: float = 0.5, temperature: float = 1.0, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """Compute how far a student's next-token distribution is from a teacher's, for each row.

    Both logits are rounded to the dtype of their operands, as a linear layer's; the division by the
    temperature and everything after run in fp32. The teacher gets no gradient.

    Args:
        x: (..., hidden), the student's rows.
        weight: (vocabulary, hidden), in x's dtype.
        bias: (vocabulary,) or None.
        other_x: (..., other hidden), the teacher's rows; or (..., vocabulary), its
            log-probabilities, taken as they are.
        other_weight: (vocabulary, other hidden), in ``other_x``'s dtype; None where ``other_x`` are
            log-probabilities.
        other_bias: (vocabulary,) or None.
        targets: (...), int64, which say by ``ignore_index`` which rows do not count; or None.
        kind: ``"forward_kl"``, KL(teacher || student); ``"reverse_kl"``, KL(student || teacher);
            or ``"jsd"``, the generalized Jensen-Shannon divergence (Agarwal et al. 2023).
        beta: weight of the teacher in the mixture that ``"jsd"`` compares with; at 0 it is the
            forward KL, at 1 the reverse.
        temperature: what both logits are divided by.
        ignore_index: the target of rows that do not count: they are not multiplied, and 0.

    Returns:
        (...), in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: an unknown kind, a setting out of its range, or operands that are not of the
            same rows.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta must be between 0 and 1, not {beta}")
    if not temperature > 0:  # as it is where it is no number
        raise ValueError(f"temperature must be above 0, not {temperature}")
    require_rows(targets, x, "targets")
    if other_x.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"rows of {tuple(x.shape[:-1])} and {tuple(other_x.shape[:-1])}")
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
    x, weight, bias = operands(x, weight, bias)
    if other_weight is not None:
        other_x, other_weight, other_bias = operands(other_x, other_weight, other_bias)
    other = [t if t is None else t.detach() for t in (other_x, other_weight, other_bias)]
    settings = kind, float(beta), float(temperature), ignore_index
    with torch.autocast(x.device.type, enabled=False):
        values: Tensor = _LinearDivergence.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, tuple(other), targets, settings, torch.is_grad_enabled()
        )
    return values


# ---------------------------------------------------------------------------------------------- OP


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, other_x: Tensor, other_weight: Tensor | None,
    other_bias: Tensor | None, targets: Tensor | None = None, *settings: Any, **more: Any,
) -> list[str]:  # fmt: skip
    """Say why the op cannot take these arguments, those of ``linear_divergence``."""
    heads: Sequence[tuple[str, tuple[Any, ...]]] = (
        ("student", (x, weight, bias)),
        ("teacher", (other_x, other_weight, other_bias)),
    )
    reasons = []
    for name, head in heads:
        if any(t is not None and not t.is_floating_point() for t in head):
            return [f"an operand of the {name} is not of a floating-point dtype"]
        if head[1] is not None and len({t.dtype for t in operands(*head) if t is not None}) > 1:
            reasons.append(f"the {name}'s rows are {head[0].dtype}, its head is not")
    classes = other_x.shape[-1] if other_weight is None else other_weight.shape[0]
    if classes != weight.shape[0]:
        reasons.append(f"vocabularies of {weight.shape[0]} and {classes} classes")
    if other_weight is None and other_bias is not None:
        reasons.append("the teacher's log-probabilities have a bias")
    if other_x.shape[:-1] != x.shape[:-1]:
        reasons.append(f"rows of {tuple(x.shape[:-1])} and {tuple(other_x.shape[:-1])}")
    if targets is not None and targets.shape != x.shape[:-1]:
        reasons.append(f"targets {tuple(targets.shape)} do not fit x {tuple(x.shape)}")
    tensors = [t for _, head in heads for t in head if t is not None]
    if len({t.device for t in tensors + ([] if targets is None else [targets])}) > 1:
        reasons.append("the operands are on several devices")
    return reasons


def _example(m: Maker, kind: str = "forward_kl") -> tuple[Any, ...]:
    vocabulary, hidden, other = m.sizes.vocabulary, m.sizes.hidden, m.sizes.hidden // 2
    teacher = m.x(other).detach(), m.weight(vocabulary, other).requires_grad_(False), None
    bias = m.weight(vocabulary, mean=0.0) if kind == "jsd" else None
    return m.x(hidden), m.weight(vocabulary, hidden), bias, *teacher, m.labels(), kind, 0.3, 2.0


OP = Op(
    "linear_divergence",
    reference,
    linear_divergence,
    unsupported,
    example=_example,
    variants={kind: partial(_example, kind=kind) for kind in KINDS if kind != "forward_kl"},
)
