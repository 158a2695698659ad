"""Log-probabilities, entropies and top classes of a head's logits, in one op with the head.

Preference optimization, reinforcement learning and distillation need a few numbers per token, of
which rewards and divergences are sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..op import Maker, Op
from . import head
from .head_op import misfits, operands, output_settings, require_rows

# ------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None,
    outputs: Sequence[str] = ("logprob",), top_k: int = 0, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: Tensor | float = 1.0,
    deferred: Sequence[str] = (), narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute the outputs of fp32 logits; 0 for ignored rows."""
    chosen = output_settings(
        outputs, targets, weight.shape[0], top_k, ignore_index, temperature, softcap, logit_scale
    )
    factor = logit_scale if isinstance(logit_scale, Tensor) else None
    outs: tuple[Tensor, ...] = head.reference(
        x, weight, bias, narrow, lora_b, factor, targets, chosen
    )
    return outs


# ------------------------------------------------------------------------ cpu, triton and autograd

# ``head.py``.


def linear_logprob(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None,
    outputs: Sequence[str] = ("logprob",), top_k: int = 0, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: Tensor | float = 1.0,
    deferred: Sequence[str] = (), narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute log-probabilities of targets, and other numbers per row, of a head's logits.

    The final logits are ``softcap·tanh(logit_scale·(x·Wᵀ + b + h·Bᵀ) / softcap) / temperature``,
    rounded to x's dtype where the model rounds them; the division and everything after run in fp32.
    Under autocast the operands are cast first, as autocast casts a linear layer's.

    Args:
        x: (..., hidden), the rows that are multiplied.
        weight: (vocabulary, hidden), in x's dtype.
        bias: (vocabulary,) or None.
        targets: (...), int64, each a class or ``ignore_index``. Without the outputs ``"logprob"``
            and ``"picked"`` they only mark rows that count, or may be None.
        outputs: names of the results, in this order; see ``head_op.OUTPUTS``.
        top_k: number of classes for the outputs that need it.
        ignore_index: the target of rows that do not count: they are not multiplied, and all of
            their outputs are 0.
        temperature: divisor of the logits.
        softcap: bound of the logits, or None.
        logit_scale: factor on the logits, before the softcap; a number, or a 0-d tensor that may
            be trained.
        deferred: outputs that seldom get a gradient, such as an entropy that is logged. Forward
            does no work for it; backward projects once more if there is one after all.
        narrow: (..., r), h of an adapter of the head, ``scale·A·x``; or None.
        lora_b: (vocabulary, r), its B, in the dtype of ``narrow``, which may be wider than x's.

    Returns:
        One tensor for each output: (...), or (..., top_k), in fp32 (fp64 for fp64 input) or int64.

    Raises:
        ValueError: an unknown output, one that needs targets without them, targets of another shape
            than x's rows, or a setting out of its range.
        IndexError: with outputs that need targets, on the CPU, a target that is no class. On a GPU,
            where looking would stall the stream, the output is nan instead; in fp64, which no
            kernel takes, it is PyTorch's own assertion on the device.
    """
    chosen = output_settings(
        outputs, targets, weight.shape[0], top_k, ignore_index, temperature, softcap, logit_scale
    )
    require_rows(targets, x, "targets")
    factor = logit_scale if isinstance(logit_scale, Tensor) else None
    given = operands(x, weight, bias, narrow, lora_b)
    outs: tuple[Tensor, ...] = head.head(given, factor, targets, chosen, deferred)
    return outs


# ---------------------------------------------------------------------------------------------- OP


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None,
    outputs: Sequence[str] = ("logprob",), top_k: int = 0, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: Tensor | float = 1.0,
    deferred: Sequence[str] = (), narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Return why the op cannot take these arguments of ``linear_logprob``."""
    reasons = misfits(x, weight, bias, targets, "targets", narrow, lora_b)
    if isinstance(logit_scale, Tensor) and logit_scale.dim():
        reasons.append(f"the logits' factor has the shape {tuple(logit_scale.shape)}")
    if isinstance(logit_scale, Tensor) and logit_scale.device != x.device:
        reasons.append("the logits' factor is on another device")
    return reasons


def _example(m: Maker, outputs: Sequence[str] = ("logprob", "entropy")) -> tuple[Any, ...]:
    weight = m.weight(m.sizes.vocabulary, m.sizes.hidden)
    return m.x(m.sizes.hidden), weight, None, m.labels(), outputs


def _example_of_all(m: Maker) -> tuple[Any, ...]:
    names = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "picked", "topk_values")
    scale = nn.Parameter(m.normal().abs().add(0.8), m.train)
    x, weight, _, labels, _ = _example(m)
    bias = m.weight(m.sizes.vocabulary, mean=0.0)
    return x, weight, bias, labels, names, 4, -100, 0.7, 30.0, scale


def _adapted_example(m: Maker) -> tuple[Any, ...]:
    narrow = m.x(m.sizes.rank).detach().to(m.adapters).requires_grad_()
    lora_b = m.adapter(m.sizes.vocabulary, m.sizes.rank)
    return *_example(m), 0, -100, 1.0, None, 1.0, (), narrow, lora_b


OP = Op(
    "linear_logprob",
    reference,
    linear_logprob,
    unsupported,
    example=_example,
    variants={
        "one": lambda m: _example(m, ("logprob",)),
        "all": _example_of_all,
        "adapted": _adapted_example,
    },
)
