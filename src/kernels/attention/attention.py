"""Scaled dot-product attention for query heads that share key and value heads.

    S = scale * Q K^T + mask;  P = softmax(S);  O = P V
    dV = P^T dO;  dP = dO V^T;  dS = P * (dP - rowsum(P * dP));  dQ = scale dS K;  dK = scale dS^T Q

A softcap c (Gemma 2, arXiv:2408.00118) bounds the scores before the mask, c tanh(S / c): dS has a
factor 1 - tanh^2. A sink (gpt-oss, arXiv:2508.10925; Xiao et al., arXiv:2309.17453) is one logit of
a head that joins the sum of each row's softmax, and has no value: d sink = -P_sink rowsum(P * dP).

On the CPU the work is cut into tiles: some positions times all query heads of a group, folded into
the rows of one matrix, against the keys that any of these positions may see. Keys and values are
never repeated, and what is hidden from a whole tile is never multiplied. Backward computes the
probabilities again, tile by tile (Dao et al., "FlashAttention", 2022), so only ``q``, ``k`` and
``v`` are kept. A tile's matrices stay in the cache, and the matrix products are oneDNN's. On a CPU
without 16-bit products everything is in fp32, and only the results are rounded. In bf16 one kernel
does all of it where there is a C++ compiler (``native/attention.cpp``).

In low precision the scores are products in fp32 and are not rounded (for large scores that would
cost more accuracy than all else together), the softmax is in fp32, and its result is rounded.

On a GPU, FlexAttention takes what PyTorch's attention has no kernel for (``flex.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..captured import capturable
from ..direct import is_traced_here
from ..launch import library_op, without_base
from ..matmul import through_fp32
from ..native import attention as native
from ..native.library import are_real
from ..op import Maker, Op
from ..second_order import differentiable, gradients
from .first_keys import first_keys, is_first_keys, sample_mask, seen_keys
from .flex import attention_by_flex
from .sizes import backward_flops, fake_backward, fake_forward, forward_flops
from .unsupported import attention_unsupported, impossible

_aten = torch.ops.aten


# -- reference -------------------------------------------------------------------------------------
def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool,
    mask: Tensor | None = None, window: int | None = None, sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """PyTorch's attention; a window is a mask that leaves the last ``window`` positions.

    PyTorch's has neither sinks nor a softcap: with one, the formula is written out.
    """
    if window is not None:
        order = torch.arange(q.shape[2], device=q.device)
        distance = order[:, None] - order[None, :]
        mask, causal = (distance >= 0) & (distance < window), False
    if is_first_keys(mask):
        mask = sample_mask(mask)
    if sinks is not None or softcap is not None:
        dead = _dead(mask, sinks)
        if mask is not None and dead is not None:
            mask = mask | dead if mask.dtype is torch.bool else mask.masked_fill(dead, 0)
        out = _written_out(q, k, v, scale, causal, mask, sinks, softcap)
        return out if dead is None else out.masked_fill(dead, 0)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def _dead(mask: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    """The rows (..., T or 1, 1) that see nothing, not even a sink; None where there can be none."""
    if mask is None or sinks is not None or is_first_keys(mask):
        return None
    hidden = ~mask if mask.dtype is torch.bool else mask == -torch.inf
    return hidden.all(-1, keepdim=True)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, mask: Tensor | None,
    sinks: Tensor | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    (batch, heads, time, _), groups = q.shape, k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)

    def folded(t: Tensor) -> Tensor:
        return t if heads == groups else t.reshape(batch, groups, -1, t.shape[-1])

    def unfolded(t: Tensor) -> Tensor:
        return t if heads == groups else t.reshape(batch, heads, time, t.shape[-1])

    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scaled = q.to(wide) * (factor / (softcap or 1.0))
    scores = unfolded(folded(scaled) @ k.to(wide).mT)
    if softcap is not None:
        scores = torch.tanh(scores) * softcap
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if is_first_keys(mask):
        mask = sample_mask(mask)
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=wide).masked_fill(~mask, -torch.inf)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
        # as models do: the gradient of the maximum takes what rounding leaves of a row's sum, which
        # is zero. Where one probability is nearly one, that is most of the row.
        scores = scores - scores.max(-1, keepdim=True).values
    p = scores.softmax(-1)
    return unfolded(folded((p if sinks is None else p[..., :-1]).to(v.dtype)) @ v)


# -- cpu -------------------------------------------------------------------------------------------
class _Scores:
    # Of the last tile, ``exact`` holds the probabilities before they were rounded, in a last column
    # those of sinks, and ``tanh`` what a softcap made of the scores.
    exact: Tensor
    tanh: Tensor

    def __init__(
        self, q: Tensor, k: Tensor, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> None:
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.rounds = self.wide is not q.dtype
        self.q = fold(q, k.shape[1]).to(self.wide) * scale
        self.k = k.flatten(0, 1).to(self.wide)
        self.heads, self.softcap = q.shape[1] // k.shape[1], softcap
        self.sinks = None
        if sinks is not None:  # (pairs, 1, heads of a group)
            every = sinks.to(self.wide).expand(q.shape[0], -1)
            self.sinks = every.reshape(self.k.shape[0], 1, self.heads)
        self.scores, self.rounded = Scratch(self.wide), Scratch(q.dtype)
        self.bounded = Scratch(self.wide)

    def probabilities(self, tile: Tile) -> Tensor:
        """(pairs, rows, keys); valid until the next call."""
        q, k = self.q[tile.pairs, tile.rows], self.k[tile.pairs, tile.keys]
        keys = k.shape[1]
        exact = self.scores(q.shape[0], q.shape[1], keys + (self.sinks is not None))
        scores, rows = exact[..., :keys], exact.unflatten(1, (-1, self.heads))
        torch.bmm(q, k.transpose(1, 2), out=scores)
        if self.softcap is not None:
            self.tanh = torch.div(scores, self.softcap, out=self.bounded(*scores.shape)).tanh_()
            torch.mul(self.tanh, self.softcap, out=scores)
        if tile.bias is not None:
            rows[..., keys - tile.bias.shape[-1] : keys].add_(tile.bias)
        if self.sinks is not None:
            rows[..., keys] = self.sinks[tile.pairs]
        _aten._softmax.out(exact, -1, False, out=exact)
        if tile.dead is not None and self.sinks is None:
            rows.masked_fill_(tile.dead, 0)
        self.exact = exact
        return self.rounded(*scores.shape).copy_(scores) if self.rounds else scores


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    window: int | None, sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    mask = _boolean(mask, q, sinks)
    if native.takes(q, k, v, mask):
        return native.forward(q, k, v, scale, causal, mask, window, sinks, softcap)
    if through_fp32(q):
        qkv = q.float(), k.float(), v.float()
        wide = _forward(*qkv, scale, causal, mask, window, sinks, softcap)
        return without_base(wide.to(q.dtype))
    values, scores = v.flatten(0, 1), _Scores(q, k, scale, sinks, softcap)
    out = values.new_empty(*scores.q.shape[:2], v.shape[-1])
    for tile in tiles(q, k, causal, mask, window):
        p = scores.probabilities(tile)
        torch.bmm(p, values[tile.pairs, tile.keys], out=out[tile.pairs, tile.rows])
    return without_base(unfold(out, q, k.shape[1]))


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    window: int | None, sinks: Tensor | None, softcap: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    # Sums over tiles (dk, dv) are in fp32 or wider; so is everything in fp16, whose smallest
    # numbers have few digits.
    mask = _boolean(mask, q, sinks)
    options = scale, causal, mask, window, sinks, softcap, needs
    if grad.dtype is q.dtype and native.takes(q, k, v, mask):
        return native.backward(grad, q, k, v, *options)
    if through_fp32(q):
        wide_grads = _backward(grad.float(), q.float(), k.float(), v.float(), *options)
        of_heads = sum(needs[:3])
        narrow = [without_base(d.to(q.dtype)) for d in wide_grads[:of_heads]]
        return narrow + wide_grads[of_heads:]
    need_q, need_k, need_v, need_sinks = needs
    groups, scores = k.shape[1], _Scores(q, k, scale, sinks, softcap)
    part = scores.wide if q.dtype is torch.float16 else q.dtype
    grads, keys, values = (
        t.to(part) for t in (fold(grad, groups), k.flatten(0, 1), v.flatten(0, 1))
    )
    queries = fold(q, groups).to(part) if scores.rounds else scores.q
    dq = torch.empty_like(queries)
    dk, dv = (torch.zeros(t.shape, dtype=scores.wide) for t in (keys, values))
    dsinks = torch.zeros(keys.shape[0], scores.heads, dtype=scores.wide)
    scratch, wide = Scratch(part), Scratch(scores.wide)
    for tile in tiles(q, k, causal, mask, window):
        above, below = (tile.pairs, tile.rows), (tile.pairs, tile.keys)
        p, do = scores.probabilities(tile), grads[above]
        if need_v:
            p = scores.exact[..., : p.shape[2]] if part is scores.wide else p
            dv[below].add_(torch.bmm(p.transpose(1, 2), do))
        if not (need_q or need_k or need_sinks):
            continue
        # rounded probabilities do not add up to one: the row's sum would be off, and where
        # one probability is nearly one, dS is a small difference from it
        exact = scores.exact
        grad_scores = wide(*exact.shape)
        wide_ds = grad_scores[..., : p.shape[2]]
        ds = wide_ds if part is scores.wide else scratch(*p.shape)
        torch.bmm(do, values[below].transpose(1, 2), out=ds)
        if ds is not wide_ds:
            wide_ds.copy_(ds)
        if sinks is not None:
            grad_scores[..., -1] = 0
        _aten._softmax_backward_data.out(
            grad_scores, exact, -1, exact.dtype, grad_input=grad_scores
        )
        if sinks is not None:
            # what the gradient of the maximum takes in the formula
            rest = grad_scores.sum(-1, keepdim=True).neg_()
            grad_scores.scatter_add_(-1, exact.argmax(-1, keepdim=True), rest)
        if need_sinks:
            column = grad_scores[..., -1].unflatten(1, (-1, scores.heads))
            dsinks[tile.pairs].add_(column.sum(1))
        if softcap is not None:
            wide_ds.addcmul_(wide_ds, scores.tanh.square_(), value=-1)
        if ds is not wide_ds:
            ds.copy_(wide_ds)
        if need_q:
            torch.baddbmm(dq[above], ds, keys[below], beta=0, alpha=scale, out=dq[above])
        if need_k:
            dk[below].add_(torch.bmm(ds.transpose(1, 2), queries[above]))
    if scores.rounds:
        dk.mul_(scale)  # else the queries were scaled
    every = ((need_q, dq, q), (need_k, dk, k), (need_v, dv, v))
    input_grads = [unfold(d, like, groups) for needed, d, like in every if needed]
    if sinks is not None and need_sinks:
        input_grads.append(dsinks.view(q.shape[:2]).sum(0).to(sinks.dtype))
    return input_grads


# The loops over tiles would fix the length in a traced graph, so the two directions are opaque.
_SHARED = (
    "Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? mask, int? window, "
    "Tensor? sinks, float? softcap"
)
_forward_op = library_op(
    f"attention_forward({_SHARED}) -> Tensor", _forward, fake_forward, forward_flops
)
_backward_op = library_op(
    f"attention_backward(Tensor grad, {_SHARED}, bool[4] needs) -> Tensor[]",
    _backward,
    fake_backward,
    backward_flops,
)


# -- autograd --------------------------------------------------------------------------------------
def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *inputs, mask = ctx.saved_tensors[:5]
    scale, causal, window, softcap = ctx.options

    def formula(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the only one that has second derivatives
            return attention_reference(q, k, v, scale, causal, mask, window, sinks, softcap)

    return gradients(formula, inputs, ctx.needs_input_grad, (grad,))


@capturable
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scale: float,
        causal: bool, mask: Tensor | None, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.options = scale, causal, window, softcap
        ctx.save_for_backward(q, k, v, sinks, mask)
        every = _every_row(mask, q)
        out: Tensor = _forward_op(q, k, v, scale, causal, every, window, sinks, softcap)
        return out

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, mask = ctx.saved_tensors
        scale, causal, window, softcap = ctx.options
        needs = list(ctx.needs_input_grad[:4])
        rest = window, sinks, softcap, needs
        input_grads = _backward_op(grad, q, k, v, scale, causal, _every_row(mask, q), *rest)
        remaining = iter(input_grads)
        return *(next(remaining) if needed else None for needed in needs), *(None,) * 5


def _every_row(mask: Tensor | None, q: Tensor) -> Tensor | None:
    return mask if mask is None else mask.expand(-1, -1, q.shape[2], -1)


_SMALL = 256
"""Positions, and keys, up to which the formula in PyTorch's operators is faster than tiles.

Measured in fp32 on one thread, forward and backward, with 4 to 16 heads of 64 and 128 features.
"""


def _is_small(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> bool:
    if q.dtype is torch.float64 or q.device.type != "cpu":
        return False  # fp64 is for checks of what larger calls run
    if is_traced_here() or type(q.shape[2]) is not int or type(k.shape[2]) is not int:
        return False  # the lengths would be fixed
    if max(q.shape[2], k.shape[2]) > _SMALL or native.takes(q, k, v, None):
        return False
    if not are_real(q, k, v):
        return not native.fits(q, k, v, None)
    dead = _dead(mask, sinks)
    return dead is None or not dead.any()


def _boolean(mask: Tensor | None, q: Tensor, sinks: Tensor | None) -> Tensor | None:
    """An additive mask that only hides as a boolean one, which the kernel in C++ takes."""
    if mask is None or not mask.is_floating_point() or q.dtype is not torch.bfloat16:
        return mask
    rows = mask[:, :, :1] if mask.stride(2) == 0 else mask
    hidden = rows < torch.finfo(mask.dtype).min / 2
    if not ((rows == 0) | hidden).all():
        return mask
    # where all keys are hidden by the same number, all are seen, unless there is a sink
    if sinks is None and hidden.all(-1).any():
        return mask
    return (~hidden).expand(mask.shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool,
    mask: Tensor | None = None, window: int | None = None, sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """``softmax(scale * q kᵀ + mask) v`` without dropout; keys and values are not repeated.

    Keeps ``q``, ``k`` and ``v`` for backward, on a GPU what FlexAttention keeps; memory grows with
    T, never with T² (but with sinks or a softcap up to 256 positions, where tiles are slower than
    eager mode).

    Args:
        q: (B, H, T, D), any strides, on the CPU, or on a GPU with Triton.
        k: (B, KV, S, D) with H a multiple of KV: query head h reads group ``h // (H / KV)``.
        v: (B, KV, S, E).
        scale: of the scores; None is ``1 / sqrt(D)``.
        causal: position t sees keys up to t; T must equal S, and no mask may be given.
        mask: (B or 1, H or 1, T or 1, S), boolean (True is seen) or additive, without gradient. A
            position that sees nothing gets zeros, as in PyTorch. Or (B or 1, 1, T, 1) in int32: the
            first key that each position sees, up to its own (``first_keys.py``); T equals S.
        window: with ``causal``, position t sees only the last ``window`` keys, its own included.
        sinks: (H,), a logit of each query head that joins the softmax, without a value.
        softcap: bounds the scaled scores before the mask: ``softcap * tanh(scores / softcap)``.

    Returns:
        (B, H, T, E), in memory (B, T, H, E).

    Raises:
        ValueError: for what ``OP.unsupported`` lists as impossible.
    """
    reasons = impossible(q, k, v, causal, mask, window, sinks, softcap)
    if reasons:
        raise ValueError("; ".join(reasons))
    if mask is not None and not is_first_keys(mask):
        mask = mask.expand(-1, -1, -1, k.shape[2])
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        if q.device.type != "cpu":
            return attention_by_flex(q, k, v, factor, causal, mask, window, sinks, softcap)
        has_kernel = (sinks is None and softcap is None) or window is not None
        if not has_kernel and _is_small(q, k, v, mask, sinks):
            out = _written_out(q, k, v, factor, causal, mask, sinks, softcap)
            return out.transpose(1, 2).contiguous().transpose(1, 2)
        return _Attention.apply(q, k, v, sinks, factor, causal, mask, window, softcap)  # type: ignore[no-any-return, no-untyped-call]


# -- OP --------------------------------------------------------------------------------------------
def _example(m: Maker, window: int | None = None) -> tuple[Any, ...]:
    q, k, v = (m.heads(n) for n in (m.sizes.heads, m.sizes.kv_heads, m.sizes.kv_heads))
    return q, k, v, m.sizes.head_dim**-0.5, True, None, window


def _packed_example(m: Maker) -> tuple[Any, ...]:
    order = torch.arange(m.sizes.seq, device=m.device)
    sample = order * 4 // m.sizes.seq
    mask = (sample[:, None] == sample[None]) & (order[:, None] >= order[None])
    return *_example(m)[:4], False, mask[None, None]


def _samples_example(m: Maker) -> tuple[Any, ...]:
    order = torch.arange(m.sizes.seq, dtype=torch.int32, device=m.device)
    starts = order - order % max(1, m.sizes.seq // 3)
    return *_example(m)[:4], False, first_keys(starts.expand(m.sizes.batch, -1), 7)


def _capped_example(m: Maker) -> tuple[Any, ...]:
    return *_packed_example(m), None, m.weight(m.sizes.heads), 2.0


OP = Op(
    "attention",
    attention_reference,
    attention,
    attention_unsupported,
    saved_outputs=(0,),
    example=_example,
    variants={
        "packed": _packed_example,
        "samples": _samples_example,
        "window": lambda m: _example(m, 5),
        "sinks": lambda m: (*_example(m, 5), m.weight(m.sizes.heads)),
        "softcap": _capped_example,
    },
)


# The tiles of attention: which positions read which keys, and what is hidden inside a tile.
#
# The query heads of a group are rows of one matrix.


_CACHED = 1 << 20  # scores worked on at once, per thread: more leaves the cache, fewer cost calls


@dataclass(frozen=True)
class Tile:
    """Some positions of some (sample, group) pairs against the keys that they may see.

    ``rows`` are folded, ``positions * heads``. ``bias`` (pairs, positions, heads, keys) is added to
    the last columns of the scores, broadcast over what it lacks; None where all keys are seen.
    ``dead`` marks rows that see nothing, and so have no probabilities; None where there are none.
    """

    pairs: slice
    rows: slice
    keys: slice
    bias: Tensor | None
    dead: Tensor | None


def tiles(
    q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, window: int | None
) -> Iterator[Tile]:
    """Cut a call into tiles."""
    (batch, groups, keys, _), time = k.shape, q.shape[2]
    heads = q.shape[1] // groups
    step, budget = max(16, min(128, 1024 // heads)), _CACHED * torch.get_num_threads()
    samples = [(0, batch * groups)]
    if mask is not None and mask.shape[0] * mask.shape[1] > 1:
        samples = [(i * groups, (i + 1) * groups) for i in range(batch)]
    for sample, (first, last) in enumerate(samples):
        for start in range(0, time, step):
            stop = min(time, start + step)
            if mask is not None:
                part = mask[min(sample, mask.shape[0] - 1), :, start:stop]
                if is_first_keys(mask):
                    low, high, bias, dead = _of_samples(part[0], start)
                else:
                    low, high, bias, dead = _masked(part, groups)
            elif causal:
                low = 0 if window is None else max(0, start - window + 1)
                high, dead = stop, None
                bias = _causal(start, stop, start if window is None else low, window)
            else:
                low, high, bias, dead = 0, keys, None, None
            count = max(1, budget // ((stop - start) * heads * (high - low)))
            for i in range(first, last, count):
                span = slice(i - first, i - first + count)
                yield Tile(
                    slice(i, min(i + count, last)),
                    slice(start * heads, stop * heads),
                    slice(low, high),
                    bias[span] if bias is not None and bias.ndim == 4 else bias,
                    dead[span] if dead is not None and dead.ndim == 4 else dead,
                )


def _causal(start: int, stop: int, low: int, window: int | None) -> Tensor:
    """What hides keys ``low:stop`` from positions ``start:stop``: (positions, 1, keys)."""
    distance = torch.arange(start, stop)[:, None] - torch.arange(low, stop)[None, :]
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)[:, None]


def _of_samples(
    first: Tensor, start: int
) -> tuple[int, int, Tensor | None, Tensor | None]:  # fmt: skip
    # ``_masked`` of the first keys (positions, 1) of positions from ``start`` on.
    low, high = int(first[0]), start + len(first)
    part = start if int(first[-1]) == low else low  # what all see has nothing to be hidden
    seen = seen_keys(first, start, part, high)
    return low, high, torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[:, None], None


def _masked(part: Tensor, groups: int) -> tuple[int, int, Tensor | None, Tensor | None]:
    # The keys that ``part`` (H or 1, positions, keys) leaves, and its bias and dead rows over them.
    boolean = part.dtype is torch.bool
    # what libraries add to hide a key is the smallest number of the dtype, or -inf
    visible = part if boolean else part > torch.finfo(part.dtype).min / 2
    columns = visible.view(torch.uint8).amax((0, 1)).nonzero()
    alive = bool(visible.view(torch.uint8).amax(-1).all())
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
    else:  # (groups, positions, heads, keys)
        bias = bias.view(groups, -1, *bias.shape[1:]).transpose(1, 2)
    dead = None if alive else (bias == -torch.inf).all(-1, keepdim=True)
    return low, high, bias, dead if dead is not None and bool(dead.any()) else None


def fold(t: Tensor, groups: int) -> Tensor:
    """(B, H, T, D) to (B * groups, T * heads, D): the heads of a position are adjacent rows."""
    batch, heads, time, dim = t.shape
    t = t.reshape(batch, groups, heads // groups, time, dim).transpose(2, 3)
    return t.reshape(batch * groups, -1, dim)


def unfold(t: Tensor, like: Tensor, groups: int) -> Tensor:
    """The inverse of ``fold``, with sizes and dtype of ``like``; in memory (B, T, H, D)."""
    batch, heads, time, _ = like.shape
    t = t.view(batch, groups, time, heads // groups, -1).transpose(2, 3)
    dim = t.shape[-1]
    strides = (time * heads * dim, dim, heads * dim, 1)
    # no view: what an autograd function returns must be one that the model may write to in place
    out = torch.empty_strided((batch, heads, time, dim), strides, dtype=like.dtype)
    out.unflatten(1, (groups, heads // groups)).copy_(t)
    return out


class Scratch:
    """Memory that all tiles of a call use in turn."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._flat = torch.empty(0, dtype=dtype)

    def __call__(self, *shape: int) -> Tensor:
        """A matrix of three dimensions, valid until the next call."""
        size = shape[0] * shape[1] * shape[2]
        if self._flat.numel() < size:
            self._flat = self._flat.new_empty(size)
        return self._flat[:size].view(shape)
