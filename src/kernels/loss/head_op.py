"""The opaque op of a head, its settings and operands, and a loss with its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import library_op, use_triton, use_triton_dot
from ..op import on_several_devices
from .head_plain import compute
from .head_strips import OF_TARGETS, dtype_of, upstreams_of
from .head_tiles import HeadGradients

OUTPUTS = {
    "logprob": "log p of the target",
    "entropy": "-Σ p·log p",
    "sum_p2": "Σ p²",
    "mean_logit": "the mean of the final logits over the vocabulary",
    "logsumexp": "the log of the sum of exponentials of the final logits",
    "picked": "the final logit of the target",
    "argmax": "the class of the highest logit; not differentiable",
    "topk_values": "the top_k highest final logits",
    "topk_indices": "their classes; not differentiable",
}
"""The outputs of the op; ``p`` is the softmax of a row's final logits."""

MADE_IN_FORWARD = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "picked")
"""Outputs whose gradient for one row of x is one vector, times the upstream gradient."""

MOST_TERMS = 2
"""With more of them, projecting once more in backward costs less."""

OPERANDS = 5
"""The number of a loss's operands: x, weight, bias, narrow and lora_b."""

# --------------------------------------------------------------------------------------- settings


class Settings(NamedTuple):
    """Constants between logits and outputs; ``softcap`` is 0 where there is none."""

    outputs: tuple[str, ...]
    top_k: int = 0
    ignore_index: int = -100
    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    reduction: str = ""  # "mean" or "sum" of a cross entropy; without one, outputs for each row
    label_smoothing: float = 0.0

    @property
    def weights(self) -> list[float]:
        """The weights of the outputs in the cross entropy of a row.

        It is ``lse - (1 - e)·picked - e·mean_logit``, with ``e`` the smoothing.
        """
        e = self.label_smoothing
        return [-1.0, e, -e] if e else [-1.0]


def settings(
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Settings:
    """Return the settings of a cross entropy; raise ValueError for those without a meaning."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")
    _require_softcap(softcap)
    outputs = ("logprob", "picked", "mean_logit") if label_smoothing else ("logprob",)
    return Settings(
        outputs, 0, ignore_index, 1.0, softcap or 0.0, logit_scale, reduction, label_smoothing
    )


def output_settings(
    outputs: Sequence[str], targets: Tensor | None, vocabulary: int, top_k: int, ignore_index: int,
    temperature: float, softcap: float | None, logit_scale: Tensor | float,
) -> Settings:  # fmt: skip
    """Return the settings of outputs for each row; raise ValueError as ``settings``."""
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown or not outputs or len(set(outputs)) < len(outputs):
        names = ", ".join(OUTPUTS)
        raise ValueError(f"outputs must be some of {names}, once each, not {tuple(outputs)}")
    for name in OF_TARGETS:
        if name in outputs and targets is None:
            raise ValueError(f"the output {name!r} needs targets")
    if any(name.startswith("topk") for name in outputs) and not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be between 1 and {vocabulary}, not {top_k}")
    if not temperature > 0:  # also refuses nan
        raise ValueError(f"temperature must be above 0, not {temperature}")
    _require_softcap(softcap)
    scale = 1.0 if isinstance(logit_scale, Tensor) else float(logit_scale)
    return Settings(
        tuple(outputs), top_k, ignore_index, float(temperature), float(softcap or 0.0), scale
    )


def _require_softcap(softcap: float | None) -> None:
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap must be above 0 and finite, not {softcap}")


def unit_upstream(name: str, vocabulary: int) -> float:
    """The upstream gradient for which forward makes an output's gradient."""
    # It saves a pass (``logprob``), or is exact in narrow dtypes (``mean_logit``).
    if name == "mean_logit":
        return vocabulary / float(1 << (vocabulary.bit_length() - 1))
    return -1.0 if name == "logprob" else 1.0


def terms(chosen: Settings, deferred: Sequence[str], wanted: Sequence[bool]) -> list[str]:
    """The outputs whose gradients forward makes; ``wanted`` has a flag for each operand."""
    if not wanted[0] or any(wanted[1:]):
        return []
    names = [n for n in chosen.outputs if n in MADE_IN_FORWARD and n not in deferred]
    return names if len(names) <= MOST_TERMS else []


# --------------------------------------------------------------------------------------- operands


def operands(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The operands as autocast casts a linear layer's; unchanged where it is off."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype is torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), *(t if t is None else t.to(dtype) for t in others)


def require_rows(targets: Tensor | None, x: Tensor, name: str) -> None:
    """Raise ValueError where ``targets``, called ``name``, are not one for each row of x."""
    if targets is not None and targets.shape != x.shape[:-1]:
        raise ValueError(_no_fit(targets, x, name))


def _no_fit(targets: Tensor, x: Tensor, name: str) -> str:
    return f"{name} {tuple(targets.shape)} do not fit x {tuple(x.shape)}"


def misfits(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, name: str,
    narrow: Tensor | None = None, lora_b: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Return why rows, a head, its adapter and classes called ``name`` do not go together."""
    if any(t is not None and not t.is_floating_point() for t in (x, weight, bias)):
        return ["an operand is not of a floating-point dtype (a quantized head?)"]
    reasons = []
    tensors = [t for t in operands(x, weight, bias) if t is not None]
    if len({t.dtype for t in tensors}) > 1:
        reasons.append(f"x is {x.dtype}, the head {[str(t.dtype) for t in tensors[1:]]}")
    reasons += on_several_devices(*tensors, labels)
    if labels is not None and labels.dtype is not torch.int64:
        reasons.append(f"the {name} are {labels.dtype} instead of torch.int64")
    if labels is not None and labels.shape != x.shape[:-1]:
        reasons.append(_no_fit(labels, x, name))
    if narrow is not None and lora_b is not None:
        if operands(x, narrow)[1].dtype is not operands(x, lora_b)[1].dtype:
            reasons.append(f"B is {lora_b.dtype}, its input {narrow.dtype}")
        fits = (weight.shape[0], narrow.shape[-1]) == tuple(lora_b.shape)
        if not fits or narrow.shape[:-1] != x.shape[:-1]:
            reasons.append(f"B is {tuple(lora_b.shape)}, its input {tuple(narrow.shape)}")
    elif narrow is not None or lora_b is not None:
        reasons.append("a part of the adapter is missing")
    return reasons


# ------------------------------------------------------------------------------------- library op


def _takes_kernels(
    x: Tensor, weight: Tensor, bias: Tensor | None, narrow: Tensor | None, lora_b: Tensor | None,
    *rest: Any,
) -> bool:  # fmt: skip
    # gradients of a head are sums of products that go on from tile to tile
    use = use_triton_dot if any(rest[-1][1:3]) else use_triton
    return use(x, weight, bias, narrow, lora_b)


def _run(*args: Any) -> list[Tensor]:
    if _takes_kernels(*args):
        from .head_triton import compute as run
    else:
        run = compute
    return run(*args)


def _fake(
    x: Tensor, weight: Tensor, bias: Any, narrow: Any, lora_b: Any, targets: Any, factor: Any,
    outputs: list[str], upstream: list[str], terms: list[float], grads: list[Tensor], top_k: int,
    *rest: Any,
) -> list[Tensor]:  # fmt: skip
    made = [
        x.new_empty((len(x), top_k) if n.startswith("topk") else (len(x),), dtype=dtype_of(n, x))
        for n in outputs
    ]
    upstreams = upstreams_of(upstream, terms, grads)
    gradients = [HeadGradients(x, weight, narrow, lora_b, rest[-1]) for _ in upstreams]
    sums = [t for one in gradients for t in one.sums()] if any(rest[-1][1:]) else []
    return [*made, *(one.dx for one in gradients), *sums]


def _flops(
    x: Tensor, weight: Tensor, bias: Any, narrow: Any, lora_b: Any, targets: Any, factor: Any,
    outputs: Any, upstream: Any, terms: Any, grads: Any, *rest: Any,
) -> int:  # fmt: skip
    """Count the logits and the gradients made with them; of all rows, ignored ones too."""
    of_x, of_weight, _, *of_adapter, _ = rest[-1]
    products: int = 1 + of_x * len(upstreams_of(upstream, terms, grads)) + of_weight
    products *= weight.numel()
    products += 0 if lora_b is None else (1 + sum(of_adapter)) * lora_b.numel()
    return 2 * len(x) * products


head_op = library_op(
    "head(Tensor x, Tensor weight, Tensor? bias, Tensor? narrow, Tensor? lora_b, Tensor? targets, "
    "Tensor? factor, str[] outputs, str[] upstream, float[] terms, Tensor[] grads, int top_k, "
    "int ignore_index, float temperature, float softcap, float logit_scale, bool[] wanted)"
    " -> Tensor[]",
    _run,
    _fake,
    _flops,
    launches=_takes_kernels,
    plain=compute,
)


def call(
    given: Sequence[Any], factor: Tensor | None, targets: Tensor | None, chosen: Settings,
    outputs: Sequence[str], wanted: Sequence[bool], upstream: Sequence[str] = (),
    terms: Sequence[float] = (), grads: Sequence[Tensor] = (),
) -> list[Tensor]:  # fmt: skip
    """Call the op, see ``head_plain.compute``; ``given`` are the ``OPERANDS``."""
    x, weight, bias, narrow, lora_b = given
    results: list[Tensor] = head_op(
        flat(x), weight, bias, flat(narrow), lora_b, flat(targets, 0), factor, list(outputs),
        list(upstream), list(terms), list(grads), chosen.top_k, chosen.ignore_index,
        chosen.temperature, chosen.softcap, chosen.logit_scale, list(wanted),
    )  # fmt: skip
    return results


def flat(t: Any, kept: int = 1) -> Any:
    """Return ``t`` with its last ``kept`` dimensions, and all others in one; None for None."""
    return t if t is None else t.reshape(-1, *t.shape[t.dim() - kept :])


def differentiate(
    given: Sequence[Any], factor: Tensor | None, targets: Tensor | None, chosen: Settings,
    wanted: Sequence[bool], grads: Mapping[str, Tensor], top_classes: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of the operands and of ``factor`` from one more projection.

    Args:
        given: the ``OPERANDS``.
        factor: the learnt scale, or None.
        targets: as in forward.
        chosen: the settings.
        wanted: flags of the gradients.
        grads: output -> its gradient, (...) or (..., top_k).
        top_classes: the classes (N, top_k) of "topk_values".
    """
    dims = given[0].dim() - 1
    scale = chosen.logit_scale if factor is None else factor.to(dtype_of("", given[0]))
    by = (1.0 if wanted[-1] else scale) / chosen.temperature
    columns = {name: flat(grad, grad.dim() - dims) * by for name, grad in grads.items()}
    if "topk_values" in columns:
        assert top_classes is not None
        columns["topk_indices"] = top_classes
    results = call(
        given, factor, targets, chosen, (), wanted, list(columns), (), list(columns.values())
    )
    made = [*results, *(None,) * OPERANDS][: OPERANDS + 1]
    each = zip(made, (*given, factor), wanted, strict=True)
    return [
        t.to(of.dtype).view(of.shape) if t is not None and need else None for t, of, need in each
    ]


# ----------------------------------------------------------------------------------------- a loss

Found = tuple[Any, ...]
"""Gradients of the *sum* of the operands, or None; and the number of rows that count, or None."""


def found(
    given: Sequence[Any], labels: Tensor, chosen: Settings, wanted: Sequence[bool]
) -> tuple[Tensor, Found]:
    """Return a cross entropy, and what ``scaled`` makes gradients of; not differentiable.

    ``given`` are the ``OPERANDS``, and ``wanted`` has a flag of each that needs a gradient.
    """
    names, weights = chosen.outputs, chosen.weights if any(wanted) else []
    results = call(given, None, labels, chosen, names, [*wanted, False], names, weights)
    logprob, *others = results[: len(names)]
    losses = -logprob
    if others:
        picked, mean = others
        losses = losses + chosen.label_smoothing * (picked - mean)
    total = losses.sum()
    gradients = [*results[len(names) :], *(None,) * OPERANDS][:OPERANDS]
    if chosen.reduction == "sum":
        return total, (*gradients, None)
    count = (labels != chosen.ignore_index).sum().to(total.dtype)
    return total / count, (*gradients, count)


def scaled(
    made: Found, grad: Tensor, like: Sequence[Any], needed: Sequence[bool], scale: float
) -> list[Tensor | None]:
    """Return the gradients of the operands: those of ``found`` times ``grad`` and the logit scale.

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
