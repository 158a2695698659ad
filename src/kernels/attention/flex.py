"""Attention on a GPU by PyTorch's FlexAttention: samples that share a row, sinks and softcaps.

What ``F.scaled_dot_product_attention`` takes is not here: there the original code stays.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    flex_attention,
)

from ..direct import is_traced_here
from .first_keys import is_first_keys


def attention_by_flex(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    window: int | None, sinks: Tensor | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """``attention``, differentiated by PyTorch; arguments and result are those of ``attention``.

    A sink joins the sum of a row's softmax, so it scales the row's result by
    ``sigmoid(logsumexp(scores) - sink)``.
    """
    bias = None if mask is None or is_first_keys(mask) else _bias(mask, q, k)

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        return s if bias is None else s + bias[b, h, i, j]

    blocks = _blocks(q, causal, mask, window)
    run: Any = flex_attention if is_traced_here() or not q.is_cuda else _compiled()
    options: dict[str, Any] = {
        "block_mask": blocks,
        "scale": scale,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if softcap is not None or bias is not None:
        options["score_mod"] = score
    if sinks is None:
        out: Tensor = run(q, k, v, **options)
    else:
        plain, aux = run(q, k, v, return_aux=AuxRequest(lse=True), **options)
        share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None])
        out = (plain * share[..., None]).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


_SIDE = 128
"""Positions, and keys, of a block: the least that FlexAttention's kernels take by default."""


def _blocks(q: Tensor, causal: bool, mask: Tensor | None, window: int | None) -> BlockMask | None:
    """The blocks of keys that positions see; None where a bias, if anything, hides keys.

    They come from the first key of each position, without a mask of all pairs.
    """
    first = mask[:, 0, :, 0] if mask is not None and is_first_keys(mask) else None
    if first is None and not causal:
        return None
    length = q.shape[2]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i
        if first is not None:
            seen = seen & (j >= first[b % first.shape[0], i])
        return seen if window is None else seen & (i - j < window)

    lowest = torch.zeros(1, length, dtype=torch.long, device=q.device)
    if first is not None:
        lowest = first.long().expand(q.shape[0] if first.shape[0] > 1 else 1, -1)
    if window is not None:
        positions = torch.arange(length, device=q.device)
        lowest = lowest.maximum(positions - window + 1)
    count = -(-length // _SIDE)
    ends = torch.arange(count * _SIDE, device=q.device).clamp(max=length - 1)
    rows = lowest[:, ends].view(-1, 1, count, _SIDE)
    block = torch.arange(count, device=q.device)
    some = (block <= block[:, None]) & (block >= (rows.amin(-1) // _SIDE)[..., None])
    is_full = (block + 1) * _SIDE <= length  # as in PyTorch, the last positions are masked
    whole = (block < block[:, None]) & (block * _SIDE >= rows.amax(-1)[..., None])
    whole &= is_full[:, None]
    lists = *_listed(some & ~whole), *_listed(whole)
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=_SIDE, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of blocks, how many are chosen, and the indices of these before the others."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def _bias(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return the term that a mask adds to the scores, (B, H, T, S)."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
