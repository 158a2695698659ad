"""The settings and the opaque ops of ``linear_logprob``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import library_op, use_triton
from .linear_cross_entropy_parts import require_softcap, takes_kernels
from .linear_logprob_strips import INTEGERS
from .linear_logprob_tiles import compute, differentiate

OUTPUTS = {
    "logprob": "log p of the target",
    "entropy": "-Σ p·log p",
    "sum_p2": "Σ p²",
    "mean_logit": "the mean of the final logits over the vocabulary",
    "logsumexp": "the log of the sum of exponentials of the final logits",
    "argmax": "the class of the highest logit; not differentiable",
    "topk_values": "the top_k highest final logits",
    "topk_indices": "their classes; not differentiable",
}
"""What the op can return; ``p`` is the softmax of a row's final logits."""

MADE_IN_FORWARD = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp")
"""Outputs whose gradient for one row of x is one vector, times the upstream gradient."""

MOST_TERMS = 2
"""With more of them, projecting once more in backward costs less."""


class LogprobSettings(NamedTuple):
    """What is computed of the logits; ``softcap`` is 0 where there is none."""

    outputs: tuple[str, ...]
    top_k: int
    ignore_index: int
    temperature: float
    softcap: float
    logit_scale: float


def settings(
    outputs: Sequence[str],
    targets: Tensor | None,
    vocabulary: int,
    top_k: int,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: Tensor | float,
) -> LogprobSettings:
    """The settings of ``linear_logprob``; raises ValueError where they have no meaning."""
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs or len(set(outputs)) < len(outputs):
        names = ", ".join(OUTPUTS)
        raise ValueError(f"outputs must be some of {names}, once each, not {tuple(outputs)}")
    if "logprob" in outputs and targets is None:
        raise ValueError("the output 'logprob' needs targets")
    if any(name.startswith("topk") for name in outputs) and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be between 1 and {vocabulary}, not {top_k}")
    if not temperature > 0:  # as it is where it is no number
        raise ValueError(f"temperature must be above 0, not {temperature}")
    require_softcap(softcap)
    scale = 1.0 if isinstance(logit_scale, Tensor) else float(logit_scale)
    return LogprobSettings(
        tuple(outputs), top_k, ignore_index, float(temperature), float(softcap or 0.0), scale
    )


def terms(chosen: LogprobSettings, deferred: Sequence[str], wanted: Sequence[bool]) -> list[str]:
    """The outputs whose gradient terms forward makes.

    ``wanted`` says whether x, weight, bias and the learnt scale need a gradient.
    """
    if not wanted[0] or any(wanted[1:]):
        return []
    names = [n for n in chosen.outputs if n in MADE_IN_FORWARD and n not in deferred]
    return names if len(names) <= MOST_TERMS else []


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    if use_triton(x, weight, bias):
        from .linear_logprob_triton import compute as run
    else:
        run = compute
    return run(x, weight, bias, *rest)


def _fake(
    x: Tensor, weight: Tensor, bias: Any, targets: Any, factor: Any, outputs: list[str],
    made: list[str], top_k: int, *rest: Any,
) -> list[Tensor]:  # fmt: skip
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    rows = x.shape[0]
    return [
        *(
            x.new_empty(
                (rows, top_k) if name.startswith("topk") else (rows,),
                dtype=torch.int64 if name in INTEGERS else wide,
            )
            for name in outputs
        ),
        *(x.new_empty(x.shape) for _ in made),
    ]


def _flops(
    x: Tensor, weight: Tensor, bias: Any, targets: Any, factor: Any, outputs: Any, made: Any,
    *rest: Any,
) -> int:  # fmt: skip
    """The logits, and the gradients that are made with them; of all rows, ignored ones too."""
    return 2 * x.shape[0] * weight.numel() * (1 + len(made))


forward_op = library_op(
    "linear_logprob_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? targets, "
    "Tensor? factor, str[] outputs, str[] made, int top_k, int ignore_index, float temperature, "
    "float softcap, float logit_scale) -> Tensor[]",
    _implementation,
    _fake,
    _flops,
    launches=lambda x, weight, bias, *rest: use_triton(x, weight, bias),
    plain=compute,
)


def _implementation_backward(
    grads: list[Tensor | None], picked: Tensor | None, x: Tensor, weight: Tensor, *rest: Any
) -> list[Tensor]:
    if takes_kernels(rest[-1], x, weight, rest[0]):
        from .linear_logprob_triton import differentiate as run
    else:
        run = differentiate
    return run(grads, picked, x, weight, *rest)


def _fake_backward(
    grads: Any, picked: Any, x: Tensor, weight: Tensor, bias: Any, targets: Any, factor: Any,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    needs = rest[-1]
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    vocabulary, hidden = weight.shape
    return [
        x.new_empty(x.shape if needs[0] else (0, hidden)),
        x.new_empty((vocabulary if needs[1] else 0, hidden)),
        x.new_empty((vocabulary if needs[2] else 0,), dtype=wide),
        x.new_empty((), dtype=wide),
    ]


def _flops_backward(grads: Any, picked: Any, x: Tensor, weight: Tensor, *rest: Any) -> int:
    products: int = 1 + sum(rest[-1][:2])
    return 2 * x.shape[0] * weight.numel() * products


backward_op = library_op(
    "linear_logprob_backward(Tensor?[] grads, Tensor? picked, Tensor x, Tensor weight, "
    "Tensor? bias, Tensor? targets, Tensor? factor, str[] outputs, int ignore_index, "
    "float temperature, float softcap, float logit_scale, bool[] wanted) -> Tensor[]",
    _implementation_backward,
    _fake_backward,
    _flops_backward,
    launches=lambda grads, picked, x, weight, bias, *rest: takes_kernels(rest[-1], x, weight, bias),
    plain=differentiate,
)
