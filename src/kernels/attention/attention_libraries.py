"""What libraries have for attention on a GPU, in the form of our kernels: see ``raced_op.py``.

FlashAttention 2, or a later one where ``torch.nn.attention.activate_flash_attention_impl`` has put
it in its place, and cuDNN's kernels. What ours keep of a row, the maximum of its scores and the
reciprocal of the sum in base 2, and the logarithm of the sum, which theirs keep, are the same
number: forward by one and backward by another is right.

Samples that share a row, and windows, come as masks. To FlashAttention they are sequences of
several lengths, with a window, as ``torch.nn.attention.varlen.varlen_attn`` has them. What a mask
says of them is read once for all layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..choice import Contender, is_fixed
from ..launch import next_power_of_2
from ..raced_op import OWN, Contest, Results, drawn, may_wait, wide_enough
from . import attention_plain
from .first_keys import is_first_keys

_aten = torch.ops.aten
_LOG2E = math.log2(math.e)

FLASH, CUDNN, VARLEN = "FlashAttention", "cuDNN", "FlashAttention of samples"


# --- what is kept of rows -------------------------------------------------------------------------


def stats_of(sums: Tensor) -> Tensor:
    """Our statistics (B, H, T, 2) from the logarithms of the rows' sums (B, H, T)."""
    stats = sums.new_ones((*sums.shape, 2), dtype=torch.float32)
    stats[..., 0].copy_(sums).mul_(_LOG2E)
    return stats


def sums_of(stats: Tensor) -> Tensor:
    """The logarithms of the rows' sums (B, H, T), from our statistics."""
    most, inverse = stats.unbind(-1)
    return (most - inverse.log2()) / _LOG2E


def _of_projections(t: Tensor) -> Tensor:
    """``t`` (B, H, T, D), in memory (B, T, H, D), as a compiler plans for it."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _needed(grads: Any, needs: list[bool]) -> list[Tensor]:
    return [_of_projections(g) for g, needed in zip(grads, needs[:3], strict=True) if needed]


# --- FlashAttention -------------------------------------------------------------------------------


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    table: Tensor | None, window: int | None, sinks: Tensor | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``attention_triton.forward``."""
    out, sums, *_ = _aten._flash_attention_forward(
        *(t.transpose(1, 2) for t in (q, k, v)), None, None, q.shape[2], k.shape[2], 0.0, causal,
        False, scale=scale, **_window(window),
    )  # fmt: skip
    return _of_projections(out.transpose(1, 2)), stats_of(sums)


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, scale: float,
    causal: bool, mask: Tensor | None, table: Tensor | None, window: int | None,
    sinks: Tensor | None, softcap: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """As ``attention_triton.backward``."""
    unused = _unused(q)
    grads = _aten._flash_attention_backward(
        *(t.transpose(1, 2) for t in (grad, q, k, v, out)), sums_of(stats).contiguous(), None, None,
        q.shape[2], k.shape[2], 0.0, causal, unused, unused, scale=scale, **_window(window),
    )  # fmt: skip
    return _needed([g.transpose(1, 2) for g in grads], needs)


def _window(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _unused(like: Tensor) -> Tensor:
    # the state of random numbers, of which there are none without dropout
    return torch.zeros(2, dtype=torch.uint64, device=like.device)


# --- samples that share a row ---------------------------------------------------------------------


LONG = 4096
"""Positions of a row from which a mask is read.

A block whose attention depends on values cannot be a CUDA graph, which shorter rows gain more by:
there attention is a small part of a step, and the host the slowest part.
"""


@dataclass(frozen=True)
class SampleEnds:
    """Where the samples of a batch begin and end, how long the longest is, and what it sees."""

    ends: Tensor  # (samples + 1,), int32, from 0, on the GPU
    longest: int
    window: int | None  # the last positions, where not all before


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor,
    table: Tensor | None, window: int | None, sinks: Tensor | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``attention_triton.forward``."""
    samples = _require_samples(mask, q)
    out, sums, *_ = _aten._flash_attention_forward(
        *map(_in_a_row, (q, k, v)), samples.ends, samples.ends, samples.longest, samples.longest,
        0.0, True, False, scale=scale, **_window(samples.window),
    )  # fmt: skip
    return _in_rows(out, q), stats_of(sums.unflatten(1, (q.shape[0], -1)).transpose(0, 1))


def varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, scale: float,
    causal: bool, mask: Tensor, table: Tensor | None, window: int | None,
    sinks: Tensor | None, softcap: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """As ``attention_triton.backward``."""
    samples, unused = _require_samples(mask, q), _unused(q)
    sums = sums_of(stats).transpose(0, 1).flatten(1).contiguous()
    grads = _aten._flash_attention_backward(
        *map(_in_a_row, (grad, q, k, v, out)), sums, samples.ends, samples.ends, samples.longest,
        samples.longest, 0.0, True, unused, unused, scale=scale, **_window(samples.window),
    )  # fmt: skip
    return _needed([_in_rows(g, like) for g, like in zip(grads, (q, k, v), strict=True)], needs)


def _in_a_row(t: Tensor) -> Tensor:
    """(B, H, T, D) to (B * T, H, D)."""
    return t.transpose(1, 2).flatten(0, 1)


def _in_rows(t: Tensor, like: Tensor) -> Tensor:
    rows: Tensor = t.unflatten(0, (like.shape[0], -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
    return rows


_READ: list[tuple[StorageWeakRef, Any, SampleEnds | None]] = []
"""The memory of the masks that were read last, what they were then, and what they say."""

_MASKS = 4
"""So many are remembered: layers with a window and layers without one have their own."""


def samples_of(mask: Tensor, batch: int) -> SampleEnds | None:
    """The samples that ``mask`` keeps apart, each causal; None where it hides anything else.

    Values are read, so the host waits for the GPU: once for a mask, which layers share. For a CUDA
    graph nothing is read: its replays have other masks.
    """
    if mask.is_inference() or not may_wait(mask.device):
        return None
    storage = StorageWeakRef(mask.untyped_storage())
    what = mask.device, mask.data_ptr(), mask._version, mask.shape, mask.stride(), mask.dtype, batch
    for memory, then, samples in _READ:
        if then == what and memory == storage and not memory.expired():
            return samples
    samples = _of_first(mask.flatten(1), batch) if is_first_keys(mask) else _read(mask[:, 0], batch)
    _READ.insert(0, (storage, what, samples))
    del _READ[_MASKS:]
    return samples


_AT_ONCE = 1 << 26
"""Entries of a mask that are looked at together."""


def _read(mask: Tensor, batch: int) -> SampleEnds | None:
    time = mask.shape[-1]
    order, step = torch.arange(time, device=mask.device), max(1, _AT_ONCE // mask[:, 0].numel())
    parts, is_so = [], torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, time, step):
        part, positions = mask[:, start : start + step], order[start : start + step, None]
        visible = part
        if part.dtype is not torch.bool:  # what neither is 0 nor hides a key is another mask
            visible = part == 0
            is_so &= (visible | (part <= torch.finfo(part.dtype).min / 2)).all()
        first = visible.view(torch.uint8).argmax(-1)
        seen = (order >= first[..., None]) & (order <= positions)
        is_so &= (seen == visible).all()
        parts.append(first)
    return _of_first(torch.cat(parts, 1), batch, is_so)


def _of_first(first: Tensor, batch: int, is_so: Tensor | None = None) -> SampleEnds | None:
    """The samples of first keys (B or 1, T), which a mask ``is_so`` of."""
    time = first.shape[1]
    order = torch.arange(time, device=first.device)
    is_so = torch.ones((), dtype=torch.bool, device=first.device) if is_so is None else is_so
    # a sample begins where a position sees no other one, but in windows of one position
    window = (order - first).max() + 1
    begins = (first == order) & ((window > 1) | (order == 0))
    sample = torch.where(begins, order, 0).cummax(-1).values
    is_so = is_so & (torch.maximum(sample, order - window + 1) == first).all()
    told = torch.cat([begins.flatten(), is_so.view(1), window.view(1)]).cpu()
    if not told[-2]:
        return None
    starts = told[:-2].view(-1, time).expand(batch, -1).flatten().nonzero().flatten()
    ends = torch.cat([starts, starts.new_tensor([batch * time])])
    longest, width = int(ends.diff().max()), int(told[-1])
    within = None if width == longest else width
    return SampleEnds(ends.to(first.device, torch.int32), longest, within)


def _require_samples(mask: Tensor, q: Tensor) -> SampleEnds:
    samples = samples_of(mask, q.shape[0])
    if samples is None:
        raise RuntimeError("the mask is of more than samples and windows")
    return samples


# --- cuDNN ----------------------------------------------------------------------------------------


def cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    table: Tensor | None, window: int | None, sinks: Tensor | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``attention_triton.forward``."""
    out, sums, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return _of_projections(out), stats_of(sums.reshape(q.shape[:3]))


def cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, scale: float,
    causal: bool, mask: Tensor | None, table: Tensor | None, window: int | None,
    sinks: Tensor | None, softcap: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """As ``attention_triton.backward``."""
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, sums_of(stats).unsqueeze(-1).contiguous(), unused, unused, None, None,
        None, q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    return _needed(grads, needs)


# --- who takes what -------------------------------------------------------------------------------


def _no_kernel(q: Tensor, k: Tensor, v: Tensor, sinks: Any, softcap: float | None) -> str:
    if sinks is not None or softcap is not None:
        return "it has neither sinks nor a softcap"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes 16 bits, not {q.dtype}"
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 256:
        return f"it takes no heads of {q.shape[3]} and {v.shape[3]} features"
    if not min(q.shape[2], k.shape[2]):
        return "there are no positions"
    return ""


def _why_not(kind: str, args: tuple[Any, ...]) -> str:
    q, k, v, _, _, mask, _, window, sinks, softcap = args
    reason = _no_kernel(q, k, v, sinks, softcap)
    if reason:
        return reason
    if kind == VARLEN:
        if mask is None:
            return "all samples have rows of their own"
        if q.shape[2] < LONG:
            return f"rows are shorter than {LONG:,}: to read masks would cost the CUDA graphs"
        width = 1 if is_first_keys(mask) else q.shape[2]
        if mask.shape[1:] != (1, q.shape[2], width) or k.shape[2] != q.shape[2]:
            return "the mask is not one of all heads"
        return (
            "" if samples_of(mask, q.shape[0]) else "the mask is of more than samples and windows"
        )
    if mask is not None:
        return "it takes no mask"
    if kind == CUDNN and window is not None:
        return "it takes no window"
    if kind == CUDNN and torch.are_deterministic_algorithms_enabled():
        return "it is not deterministic"
    return ""


def _forward_unavailable(kind: str) -> Any:
    return lambda *args: _why_not(kind, args)


def _backward_unavailable(kind: str) -> Any:
    def unavailable(*args: Any) -> str:
        _, q, k, v, _, _, *rest, needs = args
        return "it gives no gradient to sinks" if needs[3] else _why_not(kind, (q, k, v, *rest))

    return unavailable


def _sizes(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[int, tuple[int, ...]]:
    window, batch = options[4], next_power_of_2(max(1, q.shape[0]))
    sizes = q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    return q.shape[2], (batch, *sizes, *(() if window is None else (window,)))


def _kept_masks(args: tuple[Any, ...], generator: torch.Generator, mask: int) -> tuple[Any, ...]:
    """Other heads and gradients, but the call's own mask, and its table."""
    return *drawn(args[:mask], generator), *args[mask:]


def _forward_inputs(args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    return _kept_masks(args, generator, 5)


def _backward_inputs(args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    """With what a forward pass keeps of the heads that are drawn."""
    grad, q, k, v, out, stats, *rest = _kept_masks(args, generator, 8)
    made, sums = attention_plain.forward(q, k, v, *rest[:-1])
    return grad, q, k, v, out.copy_(made), sums.to(stats.dtype), *rest


def _with_gradients(args: tuple[Any, ...], results: Results) -> list[Tensor]:
    """The output, and the gradients that follow from what is kept: that may have several forms."""
    q, k, v, *rest = args
    out, stats = results
    generator = torch.Generator(q.device).manual_seed(1)
    grad = torch.randn(out.shape, generator=generator, device=q.device).bfloat16().to(out.dtype)
    rest.append([True, True, True, False])
    return [out, *attention_plain.backward(grad, q, k, v, out, stats, *rest)]


def _fixed(*args: Any) -> str:
    """As PyTorch has it without a mask, whose kernel is not ours; else our kernel."""
    q, k, v, _, _, mask, _, window, sinks, softcap = args
    dense = mask is None and window is None and not _no_kernel(q, k, v, sinks, softcap)
    return FLASH if dense else OWN


def _kind(*args: Any) -> str:
    """Which FlashAttention there is, where it is not PyTorch's, and what the mask says."""
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    return ", ".join(filter(None, [active, _of_samples(*args)]))


def _of_samples(*args: Any) -> str:
    """What the mask says of samples and windows, if it says nothing else and that matters."""
    mask = args[5]
    if mask is None or is_fixed() or _why_not(VARLEN, args):
        return ""
    samples = samples_of(mask, args[0].shape[0])
    window = None if samples is None else samples.window
    return "samples" if window is None else f"samples in windows of {window:,}"


FORWARD = Contest(
    (
        Contender(CUDNN, cudnn_forward, _forward_unavailable(CUDNN)),
        Contender(FLASH, flash_forward, _forward_unavailable(FLASH)),
        Contender(VARLEN, varlen_forward, _forward_unavailable(VARLEN)),
    ),
    _sizes,
    _forward_inputs,
    _with_gradients,
    lambda q, *_: wide_enough(q.dtype),
    _fixed,
    _kind,
)
BACKWARD = Contest(
    (
        Contender(CUDNN, cudnn_backward, _backward_unavailable(CUDNN)),
        Contender(FLASH, flash_backward, _backward_unavailable(FLASH)),
        Contender(VARLEN, varlen_backward, _backward_unavailable(VARLEN)),
    ),
    lambda grad, q, k, v, out, stats, *rest: _sizes(q, k, v, *rest),
    _backward_inputs,
    exact=lambda grad, q, *_: wide_enough(q.dtype),
    first=lambda grad, q, k, v, out, stats, *rest: _fixed(q, k, v, *rest[:-1]),
    kind=lambda grad, q, k, v, out, stats, *rest: _kind(q, k, v, *rest[:-1]),
)
