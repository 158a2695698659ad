"""Attention in PyTorch's own operators, for GPUs where its kernels cannot be compiled or launched.

Results and row statistics are those of the kernels, so that forward may be the one and backward the
other. Some positions at a time: scores are never kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from .first_keys import is_first_keys, last_positions, seen_keys
from .sizes import GRAIN

_SCORES = 1 << 26
"""How many scores there are at once."""
_LOG2E = math.log2(math.e)


def mask_table(mask: Tensor) -> Tensor:
    """The table that ``attention_triton.mask_table`` makes."""
    if is_first_keys(mask):
        return last_positions(mask)
    rows, keys = mask.shape[2:]
    over = (0, -keys % GRAIN, 0, -rows % GRAIN)
    if mask.dtype is torch.bool:
        visible = free = mask
        flag = torch.zeros(mask.shape[:3], dtype=torch.bool, device=mask.device)
    else:
        value, smallest = mask.float(), torch.finfo(mask.dtype).min
        visible, free = ~(value < smallest / 2), value == 0
        flag = (value > -math.inf).any(-1) & ~(value > smallest / 4).any(-1)
    free = pad(pad(free, (0, 0, 0, over[3]), value=True), (0, over[1]))
    tiles = [
        t.unflatten(2, (-1, GRAIN)).unflatten(4, (-1, GRAIN)).transpose(3, 4)
        for t in (pad(visible, over), free)
    ]
    some, every = tiles[0].flatten(4).any(-1), tiles[1].flatten(4).all(-1)
    last = pad(flag, over[2:]).unflatten(2, (-1, GRAIN)).any(-1, keepdim=True)
    return torch.cat([some.to(torch.int8) + every.to(torch.int8), last.to(torch.int8)], -1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    table: Tensor | None, window: int | None, sinks: Tensor | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and row statistics, as ``attention_triton.forward`` returns them."""
    outs, stats = [], []
    values = _grouped(v, 1)
    column = None if sinks is None else (_wide(sinks) * _LOG2E).view(values.shape[1], -1, 1, 1)
    for _, scores, _ in _scores(q, k, scale, causal, mask, window, softcap):
        most = scores.amax(-1, keepdim=True)
        most = most if column is None else torch.maximum(most, column)
        p = (scores - most.masked_fill(most == -math.inf, 0)).exp2_()
        total = p.sum(-1, keepdim=True)
        total = total if column is None else total + (column - most).exp2_()
        dead = total == 0
        inverse = total.reciprocal().masked_fill_(dead, 0)
        outs.append(((p.to(q.dtype) @ values) * inverse).flatten(1, 2))
        pair = torch.cat([most.masked_fill(dead, math.inf), inverse], -1)
        stats.append(pair.flatten(1, 2))
    return torch.cat(outs, 2).to(q.dtype), torch.cat(stats, 2)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, scale: float,
    causal: bool, mask: Tensor | None, table: Tensor | None, window: int | None,
    sinks: Tensor | None, softcap: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed gradients, as ``attention_triton.backward`` returns them."""
    share = q.shape[1] // k.shape[1]
    keys, values = (_wide(_grouped(t, 1)) for t in (k, v))
    queries, upstream, saved = (_grouped(t, share) for t in (q, grad, stats))
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for rows, scores, bend in _scores(q, k, scale, causal, mask, window, softcap):
        most, inverse = saved[..., rows, :].split(1, -1)
        p = (scores - most).exp2_() * inverse
        do = _wide(upstream[..., rows, :])
        dv += (p.mT @ do).sum(2, keepdim=True)
        ds = do @ values.mT
        ds = p * (ds - (p * ds).sum(-1, keepdim=True)) * scale
        ds = ds if bend is None else ds * bend
        dq.append((ds @ keys).flatten(1, 2))
        dk += (ds.mT @ _wide(queries[..., rows, :])).sum(2, keepdim=True)
    every = torch.cat(dq, 2), dk.squeeze(2), dv.squeeze(2)
    grads = [d.to(q.dtype) for d, needed in zip(every, needs[:3], strict=True) if needed]
    if sinks is not None and needs[3]:
        grads.append(of_sinks(sinks, stats, (_wide(grad) * _wide(out)).sum(-1)))
    return grads


def of_sinks(sinks: Tensor, stats: Tensor, delta: Tensor) -> Tensor:
    """The gradient of sinks, from the statistics and the sums of ``grad * out`` of rows."""
    most, inverse = stats.unbind(-1)
    p = (_wide(sinks)[:, None] * _LOG2E - most).exp2_() * inverse
    return -(p * delta).sum((0, 2)).to(sinks.dtype)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _grouped(t: Tensor, share: int) -> Tensor:
    """(B, groups, heads of a group, T, D)."""
    return t.view(t.shape[0], -1, share, *t.shape[2:])


def _scores(
    q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None, window: int | None,
    softcap: float | None,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:  # fmt: skip
    """Positions, their scores in base 2 (B, groups, heads, positions, S), the softcap's slope."""
    share, time = q.shape[1] // k.shape[1], q.shape[2]
    keys, queries = _wide(_grouped(k, 1)).mT, _grouped(q, share)
    step = max(1, _SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, time, step):
        rows = slice(start, min(start + step, time))
        scores, bend = _wide(queries[..., rows, :]) @ keys * (scale * _LOG2E), None
        if softcap is not None:
            tanh = scores.div_(softcap * _LOG2E).tanh_()
            scores, bend = tanh * (softcap * _LOG2E), 1 - tanh * tanh
        if causal:
            order = torch.arange(time, device=q.device)
            distance = order[rows, None] - order
            hidden = (distance < 0) | (distance >= (window or time))
            scores.masked_fill_(hidden, -math.inf)
        if mask is not None:
            part = mask.expand(-1, q.shape[1], time, -1)[:, :, rows].unflatten(1, (-1, share))
            if is_first_keys(part):
                part = seen_keys(part, start, 0, time)
            if part.dtype is torch.bool:
                scores.masked_fill_(~part, -math.inf)
            else:  # the smallest number stays one: where it hides all keys, they are equal
                low = torch.finfo(torch.float32).min
                bias = part.float() * _LOG2E
                bias = torch.where((bias == -math.inf) & (part > -math.inf), low, bias)
                scores += bias
        yield rows, scores, bend
