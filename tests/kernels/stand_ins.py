"""PyTorch's operators that are there for GPUs alone, on a CPU: in fp32, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _scores(
    q: Tensor, k: Tensor, scale: float | None, causal: bool, left: int | None, right: int | None
) -> Tensor:
    """(H, T, S) from (T, H, D) and (S, G, D): with ``causal`` as with a ``right`` of 0."""
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = torch.einsum("thd,shd->hts", q.float(), keys) * factor
    distance = torch.arange(q.shape[0])[:, None] - torch.arange(k.shape[0])
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    right = 0 if causal else right
    if right is not None and right >= 0:
        hidden |= distance < -right
    if left is not None and left >= 0:
        hidden |= distance > left
    return scores.masked_fill(hidden, -math.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, *options)
    values = v.float().repeat_interleave(q.shape[1] // v.shape[1], 1)
    out = torch.einsum("hts,shd->thd", scores.softmax(-1), values)
    return out.to(q.dtype), scores.logsumexp(-1)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    share, factor = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = (_scores(q, k, scale, *options) - sums[..., None]).exp()
    keys, values = (t.float().repeat_interleave(share, 1) for t in (k, v))
    delta = (grad.float() * out.float()).sum(-1).t()
    ds = p * (torch.einsum("thd,shd->hts", grad.float(), values) - delta[..., None]) * factor
    dq = torch.einsum("hts,shd->thd", ds, keys)
    dk = torch.einsum("hts,thd->shd", ds, q.float()).unflatten(1, (-1, share)).sum(2)
    dv = torch.einsum("hts,thd->shd", p, grad.float()).unflatten(1, (-1, share)).sum(2)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _samples(*ends: Tensor | None) -> list[list[slice]]:
    """Of each boundary tensor, its samples."""
    return [
        [slice(a, b) for a, b in zip(e.tolist()[:-1], e.tolist()[1:], strict=True)]
        for e in ends
        if e is not None
    ]


def _joined(parts: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*parts, strict=True)


def _state() -> Tensor:
    return torch.zeros(2, dtype=torch.uint64)


class StandIns:
    """Each call is noted, by the operator and how many samples of several lengths it had."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def flash_forward(
        self, q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor | None, ends_k: Tensor | None,
        max_q: int, max_k: int, dropout: float, causal: bool, debug: bool,
        scale: float | None = None, window_size_left: int | None = None,
        window_size_right: int | None = None, **later: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert dropout == 0
        assert all(t.stride(-1) == 1 for t in (q, k, v))
        options = scale, causal, window_size_left, window_size_right
        nothing = torch.empty(0)
        if ends_q is None:
            self.calls.append(("flash", 0))
            assert (max_q, max_k) == (q.shape[1], k.shape[1])
            each = zip(q, k, v, strict=True)
            outs, sums = _joined(_forward(*qkv, *options) for qkv in each)
            return torch.stack(outs), torch.stack(sums), _state(), nothing, nothing
        assert ends_q.dtype is torch.int32
        self.calls.append(("flash", len(ends_q) - 1))
        rows, keys = _samples(ends_q, ends_k)
        assert max(s.stop - s.start for s in rows) == max_q
        parts = [_forward(q[r], k[s], v[s], *options) for r, s in zip(rows, keys, strict=True)]
        outs, sums = _joined(parts)
        return torch.cat(outs), torch.cat(sums, 1), _state(), nothing, nothing

    def flash_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor,
        ends_q: Tensor | None, ends_k: Tensor | None, max_q: int, max_k: int, dropout: float,
        causal: bool, rng_state: Tensor, unused: Tensor, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        options = scale, causal, window_size_left, window_size_right
        assert sums.dtype is torch.float32
        assert sums.is_contiguous()
        if ends_q is None or not ends_q.numel():
            self.calls.append(("flash backward", 0))
            assert sums.shape == (q.shape[0], q.shape[2], q.shape[1])
            each = zip(grad, q, k, v, out, sums, strict=True)
            return tuple(map(torch.stack, _joined(_backward(*ts, *options) for ts in each)))
        self.calls.append(("flash backward", len(ends_q) - 1))
        assert sums.shape == (q.shape[1], q.shape[0])
        parts = [
            _backward(grad[r], q[r], k[s], v[s], out[r], sums[:, r], *options)
            for r, s in zip(*_samples(ends_q, ends_k), strict=True)
        ]
        return tuple(map(torch.cat, _joined(parts)))

    def cudnn_forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keeps_sums: bool,
        dropout: float = 0.0, causal: bool = False, debug: bool = False,
        scale: float | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert bias is None
        assert keeps_sums
        assert dropout == 0
        self.calls.append(("cudnn", 0))
        each = zip(*(t.transpose(1, 2) for t in (q, k, v)), strict=True)
        outs, sums = _joined(_forward(*qkv, scale, causal, None, None) for qkv in each)
        out = torch.stack(outs).transpose(1, 2)
        nothing, seed = torch.empty(0), torch.zeros((), dtype=torch.int64)
        lengths = q.shape[2], k.shape[2]
        return out, torch.stack(sums)[..., None], nothing, nothing, *lengths, seed, seed, nothing

    def cudnn_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor,
        seed: Tensor, offset: Tensor, bias: Tensor | None, ends_q: Tensor | None,
        ends_k: Tensor | None, max_q: int, max_k: int, dropout: float, causal: bool,
        scale: float | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.calls.append(("cudnn backward", 0))
        assert sums.shape == (*q.shape[:3], 1)
        heads = [t.transpose(1, 2) for t in (grad, q, k, v, out)]
        each = zip(*heads, sums[..., 0], strict=True)
        parts = _joined(_backward(*ts, scale, causal, None, None) for ts in each)
        return tuple(torch.stack(p).transpose(1, 2) for p in parts)


@contextmanager
def stand_ins() -> Iterator[StandIns]:
    """Let PyTorch's operators for FlashAttention and cuDNN run on a CPU, through its dispatcher."""
    forms = StandIns()
    with _on_a_cpu(
        _flash_attention_forward=forms.flash_forward,
        _flash_attention_backward=forms.flash_backward,
        _scaled_dot_product_cudnn_attention=forms.cudnn_forward,
        _scaled_dot_product_cudnn_attention_backward=forms.cudnn_backward,
    ):
        yield forms


@contextmanager
def _on_a_cpu(**forms: Callable[..., Any]) -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    for name, form in forms.items():
        library.impl(name, form, "CPU")
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def norms() -> Iterator[None]:
    """The same for the backward pass of ``F.rms_norm``, whose forward pass is there."""
    with _on_a_cpu(_fused_rms_norm_backward=_norm_backward):
        yield


def _norm_backward(
    grad: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor]:
    assert list(x.shape[-1:]) == shape
    n, g = x.float() * rstd, grad.float()
    scaled = g * weight.float()
    dx = (scaled - n * (scaled * n).mean(-1, keepdim=True)) * rstd
    return dx.to(x.dtype), (g * n).flatten(0, -2).sum(0).to(weight.dtype)
