"""The opaque op of ``linear_cross_entropy``, its settings, operands and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import library_op, use_triton, use_triton_dot
from .head_tiles import empty_updates
from .linear_cross_entropy_tiles import compute


def takes_kernels(wanted: Sequence[bool], *tensors: Tensor | None) -> bool:
    """Whether Triton's kernels compute a call that wants these gradients, of x first."""
    # with those of a head that is trained, sums of products go on from tile to tile
    return (use_triton_dot if any(wanted[1:3]) else use_triton)(*tensors)


def _implementation(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float, wanted: list[bool],
    narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if takes_kernels(wanted, x, weight, bias, narrow, lora_b):
        from .linear_cross_entropy_triton import compute as run
    else:
        run = compute
    return run(
        x, weight, bias, labels, ignore_index, label_smoothing, softcap, logit_scale, wanted,
        narrow, lora_b,
    )  # fmt: skip


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int,
    label_smoothing: float, softcap: float, logit_scale: float, wanted: list[bool],
    narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    kind = wide if x.dtype is torch.float16 else x.dtype
    rows, vocabulary, hidden = x.shape[0], weight.shape[0], x.shape[1]
    return (
        x.new_empty((), dtype=wide),
        x.new_empty((), dtype=wide),
        x.new_empty((rows if wanted[0] else 0, hidden)),
        x.new_empty((vocabulary if wanted[1] else 0, hidden), dtype=kind),
        x.new_empty((vocabulary if wanted[2] else 0,), dtype=wide),
        *empty_updates(x, narrow, lora_b, wanted),
    )


def _flops(
    x: Any, weight: Tensor, bias: Any, labels: Tensor, *rest: Any, lora_b: Any = None, **_: Any
) -> int:
    """The logits, and the gradients that are found with them; of all rows, ignored ones too."""
    wanted, *update = rest[4:]
    lora_b = update[1] if update else lora_b
    products: int = (1 + sum(wanted[:2])) * weight.numel()
    products += 0 if lora_b is None else (1 + sum(wanted[3:])) * lora_b.numel()
    return 2 * labels.numel() * products


_forward = library_op(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor? bias, Tensor labels, "
    "int ignore_index, float label_smoothing, float softcap, float logit_scale, bool[] wanted, "
    "Tensor? narrow=None, Tensor? lora_b=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
    _flops,
    launches=lambda x, weight, bias, *rest, **more: takes_kernels(rest[5], x, weight, bias),
    plain=compute,
)


class Settings(NamedTuple):
    """What turns logits and labels into a loss; ``softcap`` is 0 where there is none."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0


def settings(
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Settings:
    """The settings of ``linear_cross_entropy``; raises ValueError where they have no meaning."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")
    require_softcap(softcap)
    return Settings(ignore_index, reduction, label_smoothing, softcap or 0.0, logit_scale)


def require_softcap(softcap: float | None) -> None:
    """Raise ValueError for a bound that bounds nothing, or is no number."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, not {softcap}")


def require_rows(targets: Tensor | None, x: Tensor, name: str) -> None:
    """Raise ValueError where ``targets``, called ``name``, are not one for each row of x."""
    if targets is not None and targets.shape != x.shape[:-1]:
        raise ValueError(_no_fit(targets, x, name))


def _no_fit(targets: Tensor, x: Tensor, name: str) -> str:
    return f"{name} {tuple(targets.shape)} do not fit x {tuple(x.shape)}"


OPERANDS = 5
"""How many operands can have gradients: x, weight, bias, narrow and lora_b."""


def operands(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The operands as autocast casts a linear layer's; as they are where it is off."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), *(t if t is None else t.to(dtype) for t in others)


def misfits(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, name: str
) -> list[str]:
    """Say why rows, an output head and classes called ``name`` do not go together."""
    if any(t is not None and not t.is_floating_point() for t in (x, weight, bias)):
        return ["an operand is not of a floating-point dtype (a quantized head?)"]
    reasons = []
    tensors = [t for t in operands(x, weight, bias) if t is not None]
    if len({t.dtype for t in tensors}) > 1:
        reasons.append(f"x is {x.dtype}, the head {[str(t.dtype) for t in tensors[1:]]}")
    if len({t.device for t in (*tensors, labels) if t is not None}) > 1:
        reasons.append("the operands are on several devices")
    if labels is not None and labels.dtype is not torch.int64:
        reasons.append(f"the {name} are {labels.dtype} instead of torch.int64")
    if labels is not None and labels.shape != x.shape[:-1]:
        reasons.append(_no_fit(labels, x, name))
    return reasons


Found = tuple[Any, ...]
"""The gradients of the *sum* of the operands, and how many rows count if that matters."""


def found(
    given: Sequence[Any], labels: Tensor, chosen: Settings, wanted: Sequence[bool]
) -> tuple[Tensor, Found]:
    """The loss, and what backward needs for the gradients in ``wanted``; not differentiable.

    ``given`` are the ``OPERANDS``.
    """
    ignore_index, reduction, *rest = chosen
    x, weight, bias, narrow, lora_b = given
    narrow = narrow if narrow is None else narrow.reshape(-1, narrow.shape[-1])
    total, count, *gradients = _forward(
        x.reshape(-1, x.shape[-1]), weight, bias, labels.reshape(-1), ignore_index, *rest, wanted,
        narrow, lora_b,
    )  # fmt: skip
    if reduction == "mean":
        return total / count, (*gradients, count)
    return total, (*gradients, None)


def scaled(
    made: Found, grad: Tensor, like: Sequence[Any], needed: Sequence[bool], scale: float
) -> list[Tensor | None]:
    """The gradients of the operands: those of ``found`` times ``grad`` and the logit scale.

    ``like`` holds (shape, dtype) of each operand. No matmul, no host synchronisation, and nothing
    is overwritten.
    """
    *gradients, count = made
    factor = grad * scale
    if count is not None:
        factor = factor / count.clamp(min=1)  # no labels: nan as loss, zero as gradient
    each = zip(gradients, like, needed, strict=True)
    return [_scaled(t, factor, of[1]).view(of[0]) if need else None for t, of, need in each]


def _scaled(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``t · factor`` in ``dtype``; the factor must not be rounded to a narrow ``t``'s dtype."""
    return _scaled_on_a_gpu(t, factor, dtype) if t.is_cuda else (t * factor).to(dtype)


def _scaled_on_a_gpu(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # One kernel, which computes in the factor's dtype and keeps no copy in it. A factor without
    # dimensions would be rounded: it has no say in the dtype of the product.
    return torch.mul(t, factor.reshape(1), out=torch.empty_like(t, dtype=dtype))
