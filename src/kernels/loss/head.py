"""An output head and the numbers that are read of its logits, in one op.

The logits are the largest tensor of a training step (rows x vocabulary), yet losses read a few
numbers per row: the log of the sum of exponentials, the logit of a class, an entropy, the top
classes. Here the logits exist one tile of rows at a time, and rows whose target is ignored are
never multiplied. Cross entropies (``linear_cross_entropy.py``), log-probabilities and divergences
(``linear_logprob.py``) are formulas over these numbers.

The gradient of a weighted sum of them for a row of x is one vector, times the upstream gradient.
With a frozen head, forward makes that vector while the tile is there, and backward scales it. A
cross entropy has one upstream gradient for all rows, so forward makes the gradient of a trained
head with it. Where rows differ in theirs, a trained head sees its tile once more in backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from ..captured import capturable
from ..direct import is_traced_here
from ..second_order import differentiable, gradients
from .head_op import Settings, call, differentiate, found, scaled, terms, unit_upstream
from .head_strips import INTEGERS

# ------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None, lora_b: Tensor | None,
    factor: Tensor | None, targets: Tensor | None, chosen: Settings,
) -> Any:  # fmt: skip
    """Compute what causal LMs of transformers compute, cast for cast: numbers of fp32 logits."""
    logits = linear(x, weight, bias)
    if narrow is not None and lora_b is not None:
        logits = (logits + linear(narrow, lora_b)).to(logits.dtype)
    if factor is not None or chosen.logit_scale != 1.0:
        logits = logits * (chosen.logit_scale if factor is None else factor)
    if chosen.softcap:
        logits = chosen.softcap * torch.tanh(logits / chosen.softcap)
    if logits.dtype is not torch.float64:
        logits = logits.float()
    if chosen.reduction:
        assert targets is not None
        return cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            targets.reshape(-1),
            ignore_index=chosen.ignore_index,
            reduction=chosen.reduction,
            label_smoothing=chosen.label_smoothing,
        )
    logits = logits / chosen.temperature
    ignored = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=x.device)
    if targets is not None:
        ignored = targets == chosen.ignore_index
    return tuple(_output(name, logits, targets, ignored, chosen.top_k) for name in chosen.outputs)


def _output(
    name: str, logits: Tensor, targets: Tensor | None, ignored: Tensor, top_k: int
) -> Tensor:
    logp = logits.log_softmax(-1)
    match name:
        case "logprob" | "picked":
            assert targets is not None
            indices = targets.masked_fill(ignored, 0).unsqueeze(-1)
            values = (logp if name == "logprob" else logits).gather(-1, indices).squeeze(-1)
        case "entropy":
            values = -(logp.exp() * logp).sum(-1)
        case "sum_p2":
            values = logp.exp().square().sum(-1)
        case "mean_logit":
            values = logits.mean(-1)
        case "logsumexp":
            values = logits.logsumexp(-1)
        case "argmax":
            values = logits.argmax(-1)
        case _:
            values = logits.topk(top_k, -1)[name == "topk_indices"]
            ignored = ignored.unsqueeze(-1)
    return values.masked_fill(ignored, 0)


# -------------------------------------------------------------------------------- cpu and triton

# ``head_plain.py`` and ``head_triton.py``, called by the library op of ``head_op.py``.

# -------------------------------------------------------------------------------------- autograd

GIVEN = 6
"""The operands that may need a gradient: those of a loss, and a factor that is learnt."""


def _again(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *given, targets = ctx.saved_tensors[: GIVEN + 1]

    def formula(*operands: Any) -> Any:
        return reference(*(*operands, targets, ctx.chosen))

    return gradients(formula, given, ctx.needs_input_grad, grads)


@capturable
class _Head(torch.autograd.Function):
    """Outputs of each row, or a cross entropy of all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None,
        lora_b: Tensor | None, factor: Tensor | None, targets: Tensor | None, chosen: Settings,
        deferred: tuple[str, ...], recording: bool,
    ) -> Any:  # fmt: skip
        if not is_traced_here():  # a compiler knows gradients of zero only
            ctx.set_materialize_grads(False)
        given = x, weight, bias, narrow, lora_b, factor
        needs = [recording and needed for needed in ctx.needs_input_grad[:GIVEN]]
        ctx.chosen = chosen
        if chosen.reduction:
            assert targets is not None
            loss, saved = found(given[:-1], targets, chosen, needs[:-1])
            ctx.save_for_backward(*given, targets, *saved)
            return loss
        ctx.made = terms(chosen, deferred, needs)
        outputs, top_classes, made = _outputs(given, targets, chosen, ctx.made, needs)
        ctx.save_for_backward(*given, targets, top_classes, *made)
        ctx.mark_non_differentiable(
            *(t for name, t in zip(chosen.outputs, outputs, strict=True) if name in INTEGERS)
        )
        return outputs

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved, needed, chosen = ctx.saved_tensors, ctx.needs_input_grad, ctx.chosen
        given, factor, (targets, *made) = saved[: GIVEN - 1], saved[GIVEN - 1], saved[GIVEN:]
        nothing = (None,) * (len(needed) - GIVEN)
        if chosen.reduction:
            like = [None if t is None else (t.shape, t.dtype) for t in given]
            (grad,) = grads
            assert grad is not None
            operands = scaled(made, grad, like, needed[: GIVEN - 1], chosen.logit_scale)
            return *operands, None, *nothing
        upstream = {
            name: grad
            for name, grad in zip(chosen.outputs, grads, strict=True)
            if grad is not None and name not in INTEGERS
        }
        if not upstream:
            return (None,) * len(needed)
        top_classes, *made = made
        if set(upstream) <= set(ctx.made):
            parts = {n: t for n, t in zip(ctx.made, made, strict=True) if n in upstream}
            dx = _scaled_rows(parts, upstream, given, factor, chosen)
            return dx, *(None,) * (GIVEN - 1), *nothing
        wanted = needed[:GIVEN]
        operands = differentiate(given, factor, targets, chosen, wanted, upstream, top_classes)
        return *operands, *nothing


def _outputs(
    given: Sequence[Any], targets: Tensor | None, chosen: Settings, made: Sequence[str],
    needs: Sequence[bool],
) -> tuple[tuple[Tensor, ...], Tensor | None, list[Tensor]]:  # fmt: skip
    """The outputs, the top classes if backward needs them, and the gradients of those ``made``."""
    *given, factor = given
    names, x, vocabulary = list(chosen.outputs), given[0], len(given[1])
    needs_top = any(needs) and "topk_values" in names
    if needs_top and "topk_indices" not in names:
        names.append("topk_indices")
    rows = [unit_upstream(m, vocabulary) if n == m else 0.0 for m in made for n in made]
    wanted = [bool(made), *(False,) * (GIVEN - 1)]
    results = call(given, factor, targets, chosen, names, wanted, made, rows)
    top_classes = results[names.index("topk_indices")].clone() if needs_top else None
    # no views: outputs of an op may be written to
    outputs = tuple(
        torch.ops.aten._unsafe_view(t, [*x.shape[:-1], *t.shape[1:]])
        for t in results[: len(chosen.outputs)]
    )
    return outputs, top_classes, results[len(names) :]


def _scaled_rows(
    made: Mapping[str, Tensor], grads: Mapping[str, Tensor], given: Sequence[Any],
    factor: Tensor | None, chosen: Settings,
) -> Tensor:  # fmt: skip
    """The gradient of x from the gradients that forward has made, in fp32 until it is rounded."""
    x, vocabulary = given[0], len(given[1])
    total: Tensor | None = None
    for name, term in made.items():
        upstream = grads[name].reshape(-1, 1)
        upstream = upstream * (chosen.logit_scale if factor is None else factor)
        upstream = upstream / (chosen.temperature * unit_upstream(name, vocabulary))
        total = term * upstream if total is None else total.addcmul_(term, upstream)
    assert total is not None
    return total.to(x.dtype).view(x.shape)


def head(
    given: Sequence[Any], factor: Tensor | None, targets: Tensor | None, chosen: Settings,
    deferred: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Compute outputs of a head's logits, a tensor for each row; or with a reduction their loss.

    Args:
        given: x (..., hidden), weight (vocabulary, hidden), bias (vocabulary,), narrow (..., r) and
            lora_b (vocabulary, r), cast as autocast casts them; the last three may be None.
        factor: 0-d, replaces the scale of the logits; not with a reduction.
        targets: (...), int64, or None.
        chosen: the settings.
        deferred: outputs that seldom get a gradient; forward does no work for it.
    """
    with torch.autocast(given[0].device.type, enabled=False):
        return _Head.apply(  # type: ignore[no-untyped-call]
            *given,
            factor,
            targets,
            chosen,
            tuple(deferred),
            torch.is_grad_enabled(),  # within forward it is always off
        )
