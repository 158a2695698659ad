"""Scaled dot-product attention on the CPU, for query heads that share key and value heads.

    S = scale * Q K^T + mask;  P = softmax(S);  O = P V
    dV = P^T dO;  dP = dO V^T;  dS = P * (dP - rowsum(P * dP));  dQ = scale dS K;  dK = scale dS^T Q

The work is cut into tiles: some positions times all query heads of a group, folded into the rows of
one matrix, against the keys that any of these positions may see. Keys and values are never
repeated, and what is hidden from a whole tile is never multiplied. Backward computes the
probabilities again, tile by tile (Dao et al., "FlashAttention", 2022), so only ``q``, ``k`` and
``v`` are kept. A tile's matrices stay in the cache, and the matrix products are oneDNN's.

In low precision the scores are products in fp32 and are not rounded (for large scores that would
cost more accuracy than all else together), the softmax is in fp32, and its result is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import LIBRARY
from .op import Cost, Op

_aten = torch.ops.aten

# -- reference -------------------------------------------------------------------------------------


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool,
    mask: Tensor | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    """PyTorch's attention; a window is a mask that leaves the last ``window`` positions."""
    if window is not None:
        order = torch.arange(q.shape[2], device=q.device)
        distance = order[:, None] - order[None, :]
        mask, causal = (distance >= 0) & (distance < window), False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


# -- cpu -------------------------------------------------------------------------------------------

_CACHED = 1 << 18  # scores that one thread works on at once: 1 MiB in fp32, a core's L2 cache


@dataclass(frozen=True)
class _Tile:
    """Some positions of some (sample, group) pairs against the keys that they may see.

    Attributes:
        pairs: which pairs.
        rows: which folded rows, ``positions * heads``.
        keys: which keys.
        bias: what to add to the last columns of the scores (pairs, positions, heads, keys),
            broadcast over what it lacks; None where all keys are seen.
        dead: rows that see nothing, and so have no probabilities; None where there are none.
    """

    pairs: slice
    rows: slice
    keys: slice
    bias: Tensor | None
    dead: Tensor | None


def _step(heads: int) -> int:
    """How many positions a tile has, for so many heads in a group."""
    return 128 if heads <= 4 else 64 if heads <= 8 else 32


def _tiles(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, window: int | None
) -> Iterator[_Tile]:
    """Cut a call into tiles."""
    (batch, groups, keys, _), time = k.shape, q.shape[2]
    heads = q.shape[1] // groups
    step, budget = _step(heads), _CACHED * torch.get_num_threads()
    units = [(0, batch * groups)]
    if mask is not None and mask.shape[0] * mask.shape[1] > 1:
        units = [(i * groups, (i + 1) * groups) for i in range(batch)]
    for unit, (first, last) in enumerate(units):
        for start in range(0, time, step):
            stop = min(time, start + step)
            if mask is not None:
                part = mask[min(unit, mask.shape[0] - 1), :, start:stop]
                low, high, bias, dead = _masked(part, groups)
            elif causal:
                low = 0 if window is None else max(0, start - window + 1)
                high, dead = stop, None
                bias = _causal(start, stop, start if window is None else low, window)
            else:
                low, high, bias, dead = 0, keys, None, None
            count = max(1, budget // ((stop - start) * heads * (high - low)))
            for i in range(first, last, count):
                own = slice(i - first, i - first + count)
                yield _Tile(
                    slice(i, min(i + count, last)),
                    slice(start * heads, stop * heads),
                    slice(low, high),
                    bias[own] if bias is not None and bias.ndim == 4 else bias,
                    dead[own] if dead is not None and dead.ndim == 4 else dead,
                )


def _causal(start: int, stop: int, low: int, window: int | None) -> Tensor:
    """What hides keys ``low:stop`` from positions ``start:stop``: (positions, 1, keys)."""
    distance = torch.arange(start, stop)[:, None] - torch.arange(low, stop)[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def _masked(part: Tensor, groups: int) -> tuple[int, int, Tensor | None, Tensor | None]:
    """The keys that a part of a mask leaves, and its bias and dead rows over these keys.

    Args:
        part: (H or 1, positions, keys), boolean (True is seen) or additive.
        groups: of the query heads.
    """
    boolean = part.dtype is torch.bool
    # what libraries add to hide a key is the smallest number of the dtype, or -inf
    seen = part if boolean else part > torch.finfo(part.dtype).min / 2
    columns = seen.view(torch.uint8).amax((0, 1)).nonzero()
    alive = bool(seen.view(torch.uint8).amax(-1).all())
    # a row all of whose keys are hidden by the same number sees them all
    low, high = (int(columns[0]), int(columns[-1]) + 1) if alive else (0, part.shape[-1])
    part = part[..., low:high]
    if boolean:
        if bool(part.all()):
            return low, high, None, None
        bias = torch.zeros(part.shape).masked_fill_(~part, -torch.inf)
    else:
        bias = part.to(torch.promote_types(part.dtype, torch.float32))
    if bias.shape[0] == 1:
        bias = bias[0, :, None]  # (positions, 1, keys)
    else:
        bias = bias.unflatten(0, (groups, -1)).transpose(1, 2)  # (groups, positions, heads, keys)
    dead = None if alive else (bias == -torch.inf).all(-1, keepdim=True)
    return low, high, bias, dead if dead is not None and bool(dead.any()) else None


def _fold(t: Tensor, groups: int) -> Tensor:
    """(B, H, T, D) to (B * groups, T * heads, D): the heads of a position are adjacent rows."""
    batch, heads, time, dim = t.shape
    t = t.reshape(batch, groups, heads // groups, time, dim).transpose(2, 3)
    return t.reshape(batch * groups, -1, dim)


def _unfold(t: Tensor, like: Tensor, groups: int) -> Tensor:
    """The inverse of ``_fold``, rounded to the dtype of ``like``, in the memory order (B, T, H, D).

    That is the order of projections, which come before and after.
    """
    batch, heads, time, dim = like.shape
    t = t.view(batch, groups, time, heads // groups, dim).permute(0, 2, 1, 3, 4)
    return torch.empty(t.shape, dtype=like.dtype).copy_(t).flatten(2, 3).transpose(1, 2)


class _Scratch:
    """Memory that all tiles of a call use in turn."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype)

    def __call__(self, *shape: int) -> Tensor:
        size = shape[0] * shape[1] * shape[2]
        if self._flat.numel() < size:
            self._flat = self._flat.new_empty(size)
        return self._flat[:size].view(shape)


class _Scores:
    """Computes the probabilities of tiles, in the dtype of the inputs."""

    def __init__(self, q: Tensor, k: Tensor, scale: float) -> None:
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.rounds = self.wide is not q.dtype
        self.q = _fold(q, k.shape[1]).to(self.wide) * scale
        self.k = k.flatten(0, 1).to(self.wide)
        self.heads = q.shape[1] // k.shape[1]
        self.scores, self.rounded = _Scratch(self.wide), _Scratch(q.dtype)

    def probabilities(self, tile: _Tile) -> Tensor:
        """(pairs, rows, keys); valid until the next call."""
        q, k = self.q[tile.pairs, tile.rows], self.k[tile.pairs, tile.keys]
        scores = self.scores(q.shape[0], q.shape[1], k.shape[1])
        torch.bmm(q, k.transpose(1, 2), out=scores)
        rows = scores.unflatten(1, (-1, self.heads))
        if tile.bias is not None:
            rows[..., -tile.bias.shape[-1] :].add_(tile.bias)
        _aten._softmax.out(scores, -1, False, out=scores)
        if tile.dead is not None:
            rows.masked_fill_(tile.dead, 0)
        return self.rounded(*scores.shape).copy_(scores) if self.rounds else scores


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    values, scores = v.flatten(0, 1), _Scores(q, k, scale)
    out = torch.empty(scores.q.shape, dtype=q.dtype)
    for tile in _tiles(q, k, causal, mask, window):
        p = scores.probabilities(tile)
        torch.bmm(p, values[tile.pairs, tile.keys], out=out[tile.pairs, tile.rows])
    return _unfold(out, q, k.shape[1])


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    window: int | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of (dq, dk, dv). Sums over tiles (dk, dv) are in fp32 or wider."""
    need_q, need_k, need_v = needs
    groups, scores = k.shape[1], _Scores(q, k, scale)
    grads, queries, keys, values = _fold(grad, groups), scores.q, k.flatten(0, 1), v.flatten(0, 1)
    if scores.rounds:
        queries = _fold(q, groups)
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros(keys.shape, dtype=scores.wide) for _ in range(2))
    scratch = _Scratch(q.dtype)
    for tile in _tiles(q, k, causal, mask, window):
        above, below = (tile.pairs, tile.rows), (tile.pairs, tile.keys)
        p, do = scores.probabilities(tile), grads[above]
        if need_v:
            dv[below].add_(torch.bmm(p.transpose(1, 2), do))
        if not (need_q or need_k):
            continue
        ds = torch.bmm(do, values[below].transpose(1, 2), out=scratch(*p.shape))
        _aten._softmax_backward_data.out(ds, p, -1, p.dtype, grad_input=ds)
        if need_q:
            torch.baddbmm(dq[above], ds, keys[below], beta=0, alpha=scale, out=dq[above])
        if need_k:
            dk[below].add_(torch.bmm(ds.transpose(1, 2), queries[above]))
    if scores.rounds:
        dk.mul_(scale)  # else the queries were scaled
    every = ((need_q, dq, q), (need_k, dk, k), (need_v, dv, v))
    return [_unfold(d, like, groups) for needed, d, like in every if needed]


def _fake(like: Tensor) -> Tensor:
    batch, heads, time, dim = like.shape
    return like.new_empty(batch, time, heads, dim).transpose(1, 2)


def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return _fake(q)


def _fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    return [_fake(t) for t, needed in zip((q, k, v), rest[-1], strict=True) if needed]


# The loops over tiles would fix the length in a traced graph, so the two directions are opaque.
_SHARED = "Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? mask, int? window"
LIBRARY.define(f"attention_forward({_SHARED}) -> Tensor")
LIBRARY.define(f"attention_backward(Tensor grad, {_SHARED}, bool[3] needs) -> Tensor[]")
LIBRARY.impl("attention_forward", _forward, "CPU")
LIBRARY.impl("attention_backward", _backward, "CPU")
torch.library.register_fake("fusewright::attention_forward", _fake_forward, lib=LIBRARY)
torch.library.register_fake("fusewright::attention_backward", _fake_backward, lib=LIBRARY)
