"""Scaled dot-product attention of a few positions over a cache, on the CPU, without gradients.

    S = scale * Q K^T + mask;  P = softmax(S);  O = P V

A step of generation has one position for each sample and all keys so far. PyTorch's kernel works
on one query head at a time then, and reads the keys and values of a group once for each of its
heads. Here the heads of a group are rows of one matrix, and two batched products do the work:
measured for 8 samples, 9 heads in 3 groups, 320 keys, bf16, one thread (2026-11-28, AVX-512 with
bf16 instructions), 0.19 ms against 1.75 ms.

Scores and softmax are in fp32, and probabilities are rounded to the dtype, as in ``attention``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..matmul import through_fp32
from ..op import Maker, Op
from .attention import attention_reference
from .unsupported import impossible, why_not_bfloat16

MOST_POSITIONS = 16
"""More of them are work for ``attention``, which cuts it into tiles."""

LEAST, LEAST_SHARED = 1 << 16, 1 << 19
"""Elements of the keys from which on the products win.

The first counts them once for each query head; the second counts them once, and is for several
rows that share them: several positions, or the heads of a group where the caller has folded them,
as transformers does under a mask. There PyTorch's kernel reads keys and values once, too.
"""

_WIDE = 1 << 19
"""Elements of the keys that are in fp32 at once (2 MB): they stay in the cache."""


# -- reference -------------------------------------------------------------------------------------
def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """PyTorch's attention."""
    return attention_reference(q, k, v, scale, False, mask)


# -- cpu -------------------------------------------------------------------------------------------
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """``softmax(scale * q kᵀ + mask) v`` for few positions on the CPU; has no gradients.

    Arguments and result (B, H, T, E), in memory (B, T, H, E), are those of ``attention``, with a
    small T. Raises ValueError for what ``OP.unsupported`` lists as impossible, or where gradients
    are needed.
    """
    reasons = _impossible(q, k, v, mask)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        reasons.append("decode_attention has no gradients: use attention")
    if reasons:
        raise ValueError("; ".join(reasons))
    with torch.autocast("cpu", enabled=False):
        return _forward(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, mask)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    (batch, heads, time, dim), groups = q.shape, k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(wide).reshape(batch, groups, -1, dim)  # (head of the group, position)
    out = q.new_empty(batch, time, heads, v.shape[-1]).transpose(1, 2)
    step = max(1, _WIDE // max(1, k[0].numel()))
    for i in range(0, batch, step):
        part = slice(i, i + step)
        hides = mask if mask is None or mask.shape[0] == 1 else mask[part]
        result = _attend(rows[part], k[part], v[part], scale, hides, heads)
        out[part].copy_(result.view(-1, heads, time, v.shape[-1]))
    return out


def _attend(
    rows: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, heads: int
) -> Tensor:
    """(B, KV, rows, E) of rows (B, KV, rows, D) in fp32 or wider."""
    # not the rows are scaled: where scores are large, their roundings would add up
    scores = torch.matmul(rows, k.to(rows.dtype).transpose(-1, -2)).mul_(scale)
    dead = None if mask is None else _hide(scores, mask, heads)
    p = torch.softmax(scores, -1)
    if dead is not None:
        p = p.masked_fill_(dead, 0)
    if v.dtype is torch.bfloat16 and not through_fp32(v):
        return torch.matmul(p.to(v.dtype), v)
    # batched products in fp16 are slow on every CPU: through fp32, and rounded once
    return torch.matmul(p, v.to(p.dtype))


def _hide(scores: Tensor, mask: Tensor, heads: int) -> Tensor | None:
    """Apply ``mask`` to scores (B, KV, rows, S); returns which rows see nothing, if any do."""
    groups = scores.shape[1]
    share = heads // groups
    mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (groups, share))
    split = scores.unflatten(2, (share, -1))
    if mask.dtype is torch.bool:
        split.masked_fill_(~mask, -torch.inf)
        dead = ~mask.any(-1, keepdim=True)
    else:
        split.add_(mask)
        dead = (mask == -torch.inf).all(-1, keepdim=True)
    if not bool(dead.any()):
        return None
    return dead.expand(*split.shape[:-1], 1).reshape(*scores.shape[:-1], 1)


# -- OP --------------------------------------------------------------------------------------------
def _impossible(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> list[str]:
    reasons = impossible(q, k, v, False, mask, None)
    if q.device.type != "cpu":
        reasons.append("the tensors are not on the CPU: PyTorch's kernel is kept")
    return reasons


def why_useless(q: Tensor) -> str:
    """Why PyTorch's kernel is as fast for queries like these on this machine, whatever their sizes.

    Empty: it is not.
    """
    if q.device.type != "cpu":
        return "the tensors are not on the CPU: PyTorch's kernel is kept"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"PyTorch's CPU kernel is as fast in {q.dtype}"
    return why_not_bfloat16() if q.dtype is torch.bfloat16 and not through_fp32(q) else ""


def _unsupported(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> list[str]:
    """Why it cannot take these inputs, or is no faster than PyTorch with them."""
    reasons = _impossible(q, k, v, mask)
    if reasons:
        return reasons
    if q.shape[2] > MOST_POSITIONS:
        reasons.append(f"{q.shape[2]} positions are not few")
    if why := why_useless(q):
        reasons.append(why)
    elif q.dtype is torch.bfloat16 and q.shape[2] > 1 and through_fp32(q):
        reasons.append("PyTorch's kernel is as fast where rows share the keys")
    if q.dtype is torch.bfloat16 and q.shape[2] > 1:
        few = k.numel() < LEAST_SHARED
    else:
        few = k.numel() // k.shape[1] * q.shape[1] < LEAST
    if few:
        reasons.append("so few keys are as fast in PyTorch's kernel")
    return reasons


def _example(m: Maker) -> tuple[Any, ...]:
    s = m.sizes
    q, k, v = (m.heads(n).detach() for n in (s.heads, s.kv_heads, s.kv_heads))
    return q[:, :, -1:], k, v, s.head_dim**-0.5


OP = Op(
    "decode_attention",
    decode_attention_reference,
    decode_attention,
    _unsupported,
    rule=None,
    example=_example,
)
