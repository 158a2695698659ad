"""Log-probabilities, entropies and top classes of a head's logits, in one op with the head.

Preference optimization, reinforcement learning and distillation need a few numbers per token, yet
read them from logits of rows x vocabulary. Here these exist one tile of rows at a time. With a
frozen head each output's gradient for a row of x is one vector, times the upstream gradient:
forward makes it while the tile is there, and backward scales it. A head that is trained sees its
tile once more in backward. Rows whose target is ignored are never multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..captured import capturable
from ..direct import is_traced_here
from ..op import Maker, Op
from ..second_order import differentiable, gradients
from .linear_cross_entropy_parts import misfits, operands, require_rows
from .linear_logprob_parts import LogprobSettings, backward_op, forward_op, settings, terms
from .linear_logprob_strips import INTEGERS, unit_upstream

# ------------------------------------------------------------------------------------- reference


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None,
    outputs: Sequence[str] = ("logprob",), top_k: int = 0, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: Tensor | float = 1.0,
    deferred: Sequence[str] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """The outputs of fp32 logits; 0 for ignored rows."""
    logits = linear(x, weight, bias)
    if isinstance(logit_scale, Tensor) or logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.dtype is not torch.float64:
        logits = logits.float()
    logits = logits / temperature
    ignored = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=x.device)
    if targets is not None:
        ignored = targets == ignore_index
    return tuple(_output(name, logits, targets, ignored, top_k) for name in outputs)


def _output(
    name: str, logits: Tensor, targets: Tensor | None, ignored: Tensor, top_k: int
) -> Tensor:
    logp = logits.log_softmax(-1)
    match name:
        case "logprob":
            assert targets is not None
            indices = targets.masked_fill(ignored, 0).unsqueeze(-1)
            values = logp.gather(-1, indices).squeeze(-1)
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

# ``linear_logprob_parts.py``.

# -------------------------------------------------------------------------------------- autograd


def _again(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, factor, targets = ctx.saved_tensors[:5]
    config: LogprobSettings = ctx.chosen

    def formula(x: Tensor, weight: Tensor, bias: Any, factor: Any) -> tuple[Tensor, ...]:
        scale = config.logit_scale if factor is None else factor
        rest: list[Any] = [*config[:4], config.softcap or None, scale]
        return reference(x, weight, bias, targets, *rest)

    return gradients(formula, (x, weight, bias, factor), ctx.needs_input_grad, grads)


@capturable
class _LinearLogprob(torch.autograd.Function):
    """Forward makes gradient terms where one vector per row is enough; else backward does."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: Tensor | None,
        targets: Tensor | None, chosen: LogprobSettings, deferred: tuple[str, ...],
        recording: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if not is_traced_here():  # a compiler knows gradients of zero only
            ctx.set_materialize_grads(False)
        names, shape = chosen.outputs, x.shape[:-1]
        needs = [recording and needed for needed in ctx.needs_input_grad[:4]]
        with_term = terms(chosen, deferred, needs)
        needs_topk = any(needs) and "topk_values" in names
        every = [*names, *(["topk_indices"] if needs_topk and "topk_indices" not in names else [])]
        results = forward_op(
            x.reshape(-1, x.shape[-1]), weight, bias,
            None if targets is None else targets.reshape(-1), factor, every, with_term, *chosen[1:],
        )  # fmt: skip
        indices = results[every.index("topk_indices")].clone() if needs_topk else None
        # no views: what an op returns may be written to
        outputs = tuple(
            torch.ops.aten._unsafe_view(t, [*shape, *t.shape[1:]]) for t in results[: len(names)]
        )
        ctx.save_for_backward(x, weight, bias, factor, targets, indices, *results[len(every) :])
        ctx.chosen, ctx.made = chosen, with_term
        ctx.mark_non_differentiable(
            *(t for name, t in zip(names, outputs, strict=True) if name in INTEGERS)
        )
        return outputs

    @staticmethod
    @differentiable(_again)
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved, config = ctx.saved_tensors, ctx.chosen
        upstream = {
            name: grad
            for name, grad in zip(config.outputs, grads, strict=True)
            if grad is not None and name not in INTEGERS
        }
        nothing = (None,) * 4
        if not upstream:
            return (None,) * 4 + nothing
        if set(upstream) <= set(ctx.made):
            grad_terms = {n: t for n, t in zip(ctx.made, saved[6:], strict=True) if n in upstream}
            return _scaled(grad_terms, upstream, saved, config), None, None, None, *nothing
        return *_projected(upstream, saved, config, ctx.needs_input_grad[:4]), *nothing


def _scaled(
    made: dict[str, Tensor], given: dict[str, Tensor], saved: Sequence[Any], chosen: LogprobSettings
) -> Tensor:
    """The gradient of x from the terms that forward has made, in fp32 until it is rounded."""
    x, weight, _, factor = saved[:4]
    factor = (chosen.logit_scale if factor is None else factor) / chosen.temperature
    total: Tensor | None = None
    for name, term in made.items():
        upstream = given[name].reshape(-1, 1) * (factor / unit_upstream(name, weight.shape[0]))
        total = term * upstream if total is None else total.addcmul_(term, upstream)
    assert total is not None
    return total.to(x.dtype).view(x.shape)


def _projected(
    given: dict[str, Tensor], saved: Sequence[Any], chosen: LogprobSettings, wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The gradients of x, the head and the learnt scale from one more projection."""
    x, weight, bias, factor, targets, top_classes = saved[:6]
    rows = x.reshape(-1, x.shape[-1])
    flat = {n: g.reshape(rows.shape[0], *g.shape[x.dim() - 1 :]) for n, g in given.items()}
    input_grads = backward_op(
        [flat.get(name) for name in chosen.outputs], top_classes, rows, weight, bias,
        None if targets is None else targets.reshape(-1), factor, list(chosen.outputs),
        chosen.ignore_index, chosen.temperature, chosen.softcap, chosen.logit_scale, list(wanted),
    )  # fmt: skip
    for t, of, need in zip(input_grads, (x, weight, bias, factor), wanted, strict=True):
        yield t.to(of.dtype).view(of.shape) if need else None


def linear_logprob(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None,
    outputs: Sequence[str] = ("logprob",), top_k: int = 0, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: Tensor | float = 1.0,
    deferred: Sequence[str] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute log-probabilities of targets, and other numbers per row, of a head's logits.

    The final logits are ``softcap·tanh(logit_scale·(x·Wᵀ + b) / softcap) / temperature``, rounded
    to x's dtype where the model rounds them; the division and everything after run in fp32. Under
    autocast the operands are cast first, as autocast casts a linear layer's.

    Args:
        x: (..., hidden), the rows that are multiplied.
        weight: (vocabulary, hidden), in x's dtype.
        bias: (vocabulary,) or None.
        targets: (...), int64, each a class or ``ignore_index``. Without the output ``"logprob"``
            they only say which rows count, or may be None.
        outputs: names of what is returned, in this order; ``OUTPUTS`` says what each is.
        top_k: number of classes for the outputs that need it.
        ignore_index: the target of rows that do not count: they are not multiplied, and all of
            their outputs are 0.
        temperature: what the logits are divided by.
        softcap: bound of the logits, or None.
        logit_scale: factor on the logits, before the softcap; a number, or a 0-d tensor that may
            be trained.
        deferred: outputs that seldom get a gradient, such as an entropy that is logged. Forward
            does no work for it; backward projects once more if there is one after all.

    Returns:
        One tensor for each output: (...), or (..., top_k), in fp32 (fp64 for fp64 input) or int64.

    Raises:
        ValueError: an unknown output, ``"logprob"`` without targets, targets of another shape than
            x's rows, or a setting out of its range.
        IndexError: with ``"logprob"``, on the CPU, a target that is no class. On a GPU, where
            looking would stall the stream, the log-probability is nan instead; in fp64, which no
            kernel takes, it is PyTorch's own assertion on the device.
    """
    options = settings(
        outputs, targets, weight.shape[0], top_k, ignore_index, temperature, softcap, logit_scale
    )
    require_rows(targets, x, "targets")
    x, weight, bias = operands(x, weight, bias)
    factor = logit_scale if isinstance(logit_scale, Tensor) else None
    with torch.autocast(x.device.type, enabled=False):
        outs: tuple[Tensor, ...] = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
            x,
            weight,
            bias,
            factor,
            targets,
            options,
            tuple(deferred),
            torch.is_grad_enabled(),  # within forward it is always off
        )
    return outs


# ---------------------------------------------------------------------------------------------- OP


def unsupported(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor | None,
    outputs: Sequence[str] = ("logprob",), top_k: int = 0, ignore_index: int = -100,
    temperature: float = 1.0, softcap: float | None = None, logit_scale: Tensor | float = 1.0,
    deferred: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Say why the op cannot take these arguments, those of ``linear_logprob``."""
    reasons = misfits(x, weight, bias, targets, "targets")
    if isinstance(logit_scale, Tensor) and logit_scale.dim():
        reasons.append(f"the logits' factor has the shape {tuple(logit_scale.shape)}")
    if isinstance(logit_scale, Tensor) and logit_scale.device != x.device:
        reasons.append("the logits' factor is on another device")
    return reasons


def _example(m: Maker, outputs: Sequence[str] = ("logprob", "entropy")) -> tuple[Any, ...]:
    head = m.weight(m.sizes.vocabulary, m.sizes.hidden)
    return m.x(m.sizes.hidden), head, None, m.labels(), outputs


def _example_of_all(m: Maker) -> tuple[Any, ...]:
    names = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "topk_values")
    scale = nn.Parameter(m.normal().abs().add(0.8), m.train)
    x, head, _, labels, _ = _example(m)
    bias = m.weight(m.sizes.vocabulary, mean=0.0)
    return x, head, bias, labels, names, 4, -100, 0.7, 30.0, scale


OP = Op(
    "linear_logprob",
    reference,
    linear_logprob,
    unsupported,
    example=_example,
    variants={
        "one": lambda m: _example(m, ("logprob",)),
        "all": _example_of_all,
    },
)
