"""Routed experts: each token through K of E expert networks, the results added by their weights.

    out[t] = sum over k of  w[t, k] * (act(x[t] · U[e]) · D[e]),   e = index[t, k]

Shazeer et al., "Outrageously large neural networks", 2017. The S = T·K pairs of a token and an
expert are sorted by expert (``moe_route``). Both projections are then matmuls of consecutive rows
by one matrix each: ``moe_up`` reads its rows from where the tokens are, ``moe_down`` adds its rows
to where they belong, and between the two there is any function of a row. Neither permuted inputs
nor permuted outputs are kept for backward:

    dw = dout[t] · y;   g = w dout[t];   dh = g · D[e]ᵀ;   dD[e] = hᵀ g;   y = h · D[e]
    dU[e] = xᵀ du;   dx[t] = sum over k of du · U[e]ᵀ

Each stack of weights may have a low-rank update (Hu et al., "LoRA", 2021), W[e] + s·A[e]·B[e],
which is never made: its products are thin ones of the same rows.

    y = x·W[e] + l·B[e];   l = s·x·A[e];   dl = s·dy·B[e]ᵀ
    dx = dy·W[e]ᵀ + dl·A[e]ᵀ;   dA[e] = xᵀ dl;   dB[e] = lᵀ dy

The factors' gradients need ``l`` and ``dl`` in any case, so the sum of weight and update, made for
one expert at a time, would save two of six thin products, r·(K + N) multiplications a row, and cost
2·r·K·N an expert. It could win beyond 2·K·N / (K + N) rows an expert (1,755 for a K of 2,048 and an
N of 1,536), and at most r·(K + N) of 2·K·N + 3·r·(K + N). Measured (docs/performance.md), it takes
1.1 to 2.6 times as long with up to 512 rows, 0.9 to 1.1 times with 2,048, and 0.8 to 1.05 times
with 4,096 and more, which experts have in batches of tens of thousands of tokens only.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..captured import capturable
from ..choice import Implementation, drawn
from ..launch import library_op, use_triton, use_triton_dot
from ..linear.products import beside, gradient_of_a, scaled_mm
from ..matmul import addmm, addmm_, mm, widens
from ..op import Maker, Op, not_16_bits, on_several_devices
from ..second_order import absent, differentiable, gradients, require_saved
from .packed_experts import PackedExperts


class Update(NamedTuple):
    """A low-rank update of a stack (E, K, N): ``scale · a · b``, in its dtype or both in fp32."""

    a: Tensor  # (E, K, r), any strides
    b: Tensor  # (E, r, N), any strides
    scale: float


# -- reference -------------------------------------------------------------------------------------
def reference(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    activation: Callable[[Tensor], Tensor], up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, up_update: Update | None = None,
    down_update: Update | None = None,
) -> Tensor:  # fmt: skip
    """One expert at a time, on the rows of its tokens."""
    routing, active = moe_route(index.reshape(-1), up.shape[0]), index.shape[1]
    h = activation(up_reference(x, up, up_bias, *routing, active, up_update))
    return down_reference(
        h, weights.reshape(-1), down, down_bias, *routing, active, down_update
    ).to(x.dtype)


def up_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor, offsets: Tensor,
    active: int, update: Update | None = None,
) -> Tensor:  # fmt: skip
    """The first projection of each pair, in the order of ``order``."""
    return _by_expert(x[order // active], _updated(weight, update), bias, offsets)


def down_reference(
    h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor,
    offsets: Tensor, active: int, update: Update | None = None,
) -> Tensor:  # fmt: skip
    """The second one, and the weighted sum of each token's rows."""
    y = _by_expert(h, _updated(weight, update), bias, offsets)[where] * weights.unsqueeze(1)
    return y.view(len(where) // active, active, -1).sum(1).to(h.dtype)


def _updated(weight: Tensor, update: Update | None) -> Tensor:
    if update is None:
        return weight
    a, b = update.a.to(weight.dtype), update.b.to(weight.dtype)
    return torch.baddbmm(weight, a, b, alpha=update.scale)


def _by_expert(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    # Rows after the last expert's are zero.
    parts, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        y = rows[start:end] @ weight[e]
        parts.append(y if bias is None else y + bias[e])
        start = end
    return torch.cat([*parts, rows.new_zeros(len(rows) - start, weight.shape[2])])


# -- cpu -------------------------------------------------------------------------------------------
# All products are opaque to a tracer: how many rows an expert has is known only at run time.

_HUGE_PAGES = 14  # MADV_HUGEPAGE
_PAGE, _LARGE = 4096, 8 << 20


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The system call by which a process says how it will use its memory, where there is one."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)


def _in_huge_pages(t: Tensor) -> Tensor:
    # The first write into fresh memory costs one fault per page: with pages of 4 KiB more time
    # than the product that is written. It is advice: where it is not taken, nothing changes.
    advise = _madvise() if t.device.type == "cpu" and type(t) is Tensor else None
    if advise is not None and t.nbytes >= _LARGE:
        start = -(-t.data_ptr() // _PAGE) * _PAGE
        end = (t.data_ptr() + t.nbytes) // _PAGE * _PAGE
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _HUGE_PAGES)
    return t


def _counts(offsets: Tensor, places: int) -> list[int]:
    """How many places each expert has, and how many are no expert's."""
    return [end - start for start, end in itertools.pairwise([0, *offsets.tolist(), places])]


def _grouped_cpu(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None,
    lora_a: Tensor | None, lora_b: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Measured: oneDNN's linear is a fifth faster on few rows in fp32, but its sums are outside
    # the error budget; batches of padded experts (bmm) gain nothing.
    places, update = _rows(a, rows), _update(lora_a, lora_b, scale)
    out = _in_huge_pages(a.new_empty(places, weight.shape[2]))
    low = a.new_empty(places, 0 if update is None else update.a.shape[2], dtype=_wide(a.dtype))
    work = _Work(a)
    start = 0
    with torch.autocast(a.device.type, enabled=False):
        for e, count in enumerate(_counts(offsets, places)[:-1]):
            if not count:
                continue
            # some of the next experts' rows, too, if need be: these write their own afterwards
            stop = min(start + _usual_count(count, work.dtype), places)
            part = a[start:stop] if rows is None else a.index_select(0, rows[start:stop])
            added = None if bias is None else bias[e]
            thin = None if update is None else (update.a[e], update.b[e], update.scale)
            work.product(part, weight[e], added, thin, out[start:stop], low[start:stop])
            start += count
    out[start:].zero_()
    low[start:].zero_()
    return out, low


class _Work:
    """Products of some rows by one expert's matrices, written into parts of the results.

    Where PyTorch has no fast products of 16 bits, not even imitated ones, they go through fp32: of
    few rows and large matrices, these are several times as fast.
    """

    def __init__(self, like: Tensor) -> None:
        self.widens = like.device.type == "cpu" and widens(like.dtype)
        self.dtype = torch.float32 if self.widens else like.dtype
        self._memory: dict[str, Tensor] = {}

    def product(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, thin: Any, out: Tensor, low: Tensor
    ) -> None:
        """``out = x · matrix + bias + low · b``; ``low = scale · x · a``; thin: (a, b, scale)."""
        rows, x = x, self.wide(x, "x")
        total = self.room("out", out.shape) if self.widens else out
        if bias is not None and self.dtype.itemsize == 2:
            addmm(bias, x, self.wide(matrix, "matrix"), out=total)
        else:
            mm(x, self.wide(matrix, "matrix"), out=total)
            if bias is not None:
                # MKL adds the products of a few rows to the bias one by one, which rounds each
                # to the bias's size (seen on CPUs with AVX2 alone)
                total.add_(bias)
        if thin is not None:
            a, b, scale = thin
            if low.dtype is out.dtype:
                low.copy_(_in_parts(x, a).mul_(scale))
            else:  # 16-bit sums would be rounded, and what a thin row has lost is in all of these
                a = a.to(low.dtype)
                low.copy_(scaled_mm(x if self.widens else beside(rows, a), a, scale))
            addmm_(total, low.to(total.dtype), self.wide(b, "b").to(total.dtype))
        if self.widens:
            out.copy_(total)

    def wide(self, t: Tensor, name: str) -> Tensor:
        """``t`` as it is multiplied, in memory that the next one of this name overwrites."""
        return self.room(name, t.shape, t).copy_(t) if self.widens else t

    def room(self, name: str, shape: Any, like: Tensor | None = None) -> Tensor:
        """Memory for a matrix, whose columns are rows if those of ``like`` are."""
        size = math.prod(shape)
        room = self._memory.get(name)
        if room is None or room.numel() < size:
            room = self._memory[name] = torch.empty(size, dtype=self.dtype)
        if like is not None and like.stride(0) == 1 and like.stride(1) != 1:
            return room[:size].view(shape[1], shape[0]).t()
        return room[:size].view(shape)


def _in_parts(x: Tensor, matrix: Tensor) -> Tensor:
    # Added up one by one, as MKL does for few columns, the sums lose twice as much as in parts.
    size = x.shape[1] // _PARTS
    whole = size * _PARTS
    left = x[:, :whole].unflatten(1, (_PARTS, size)).transpose(0, 1)
    total = torch.bmm(left, matrix[:whole].unflatten(0, (_PARTS, size))).sum(0)
    return total if whole == x.shape[1] else total.addmm_(x[:, whole:], matrix[whole:])


_PARTS = 8


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _usual_count(count: int, dtype: torch.dtype) -> int:
    # oneDNN, which multiplies 16-bit matrices, compiles code for each number of rows (a cache keeps
    # 1,024): with routed experts almost every product would be the first of its kind, so the rows
    # are rounded up to a number that other experts and steps have as well. Measured, with 64 and
    # 256 rows: a fifth faster, in the first steps two fifths. A product of few rows takes as long
    # as its weights take to be read, and there are few such numbers.
    return count if dtype.itemsize > 2 or count <= 16 else -(-count // 8) * 8


def _grouped_outer_cpu(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    out, work = _in_huge_pages(torch.empty_like(like)), _Work(min(a, b, key=Tensor.element_size))
    # a gradient in the layout of its parameter becomes its ``.grad`` without a copy
    turned = out.stride(1) < out.stride(2)
    start = 0
    with torch.autocast(a.device.type, enabled=False):
        for e, count in enumerate(_counts(offsets, b.shape[0])[:-1]):
            place = slice(start, start + count)
            start += count
            if not count:
                out[e].zero_()
                continue
            x = a[place] if rows is None else a.index_select(0, rows[place])
            if a.dtype is not b.dtype and not work.widens:  # thin rows of fp32, as ``low`` is
                left_is_thin = a.element_size() > b.element_size()
                thin, wide = (x, b[place]) if left_is_thin else (b[place], x)
                product = gradient_of_a(wide, thin)
                out[e].copy_(product if left_is_thin else product.t())
                continue
            pair = work.wide(x, "x"), work.wide(b[place], "b")
            left, right, target = (*pair[::-1], out[e].t()) if turned else (*pair, out[e])
            total = work.room("out", target.shape) if work.widens else target
            mm(left.t(), right, out=total)
            if work.widens:
                target.copy_(total)
    return out


def _combine_cpu(y: Tensor, where: Tensor, weights: Tensor | None, active: int) -> Tensor:
    places = where.view(-1, active)
    if weights is None or not len(where):
        return F.embedding_bag(places, y, mode="sum") if len(where) else y.new_zeros(0, y.shape[1])
    wide = torch.promote_types(weights.dtype, y.dtype)
    scales = weights.view(-1, active).to(wide)
    return F.embedding_bag(places, y.to(wide), mode="sum", per_sample_weights=scales).to(y.dtype)


def _grouped_mm_cpu(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    return _grouped_cpu(a, rows, weight, offsets, bias, None, None, 1.0)[0]


def _grouped_fake(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None,
    lora_a: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    places, rank = _rows(a, rows), 0 if lora_a is None else lora_a.shape[2]
    return a.new_empty(places, weight.shape[2]), a.new_empty(places, rank, dtype=_wide(a.dtype))


def _grouped_flops(a: Tensor, rows: Tensor | None, weight: Tensor, *rest: Any) -> int:
    elements: int = sum(t[0].numel() for t in (weight, *rest[2:4]) if t is not None)
    return 2 * _rows(a, rows) * elements


def _grouped_outer_fake(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    return torch.empty_like(like)


def _combine_fake(y: Tensor, where: Tensor, weights: Tensor | None, active: int) -> Tensor:
    return y.new_empty(where.shape[0] // active, y.shape[1])


def _rows(a: Tensor, rows: Tensor | None, *_: Any) -> int:
    return (a if rows is None else rows).shape[0]


def _outer_flops(a: Tensor, rows: Tensor | None, b: Tensor, *_: Any) -> int:
    return 2 * b.numel() * a.shape[1]


_MM = "(Tensor a, Tensor? rows, Tensor weight, Tensor offsets, Tensor? bias"
_OUTER = "(Tensor a, Tensor? rows, Tensor b, Tensor offsets, Tensor like) -> Tensor"
_COMBINE = "(Tensor y, Tensor where, Tensor? weights, int active) -> Tensor"

_grouped_op = library_op(
    f"moe_grouped{_MM}, Tensor? lora_a, Tensor? lora_b, float scale) -> (Tensor, Tensor)",
    _grouped_cpu, _grouped_fake, _grouped_flops,
)  # fmt: skip
_outer_op = library_op(
    f"moe_grouped_outer{_OUTER}", _grouped_outer_cpu, _grouped_outer_fake, _outer_flops
)
_combine_op = library_op(f"moe_combine{_COMBINE}", _combine_cpu, _combine_fake)


# -- PyTorch's own products of groups --------------------------------------------------------------
def _why_not_torch(*tensors: Tensor) -> str:
    if not hasattr(F, "grouped_mm"):
        return "this PyTorch has none"
    if any(t.dtype is not torch.bfloat16 for t in tensors):
        return "it takes bfloat16 alone"
    if any(n % 8 for t in tensors for n in t.shape[1:]):
        return "rows are not 16 bytes apart"
    return ""


def _torch_mm(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    a = a if rows is None else a.index_select(0, rows)
    out = F.grouped_mm(a, weight, offs=offsets)
    # it leaves what is after the last end as the memory was, and the host does not know the end
    place = torch.arange(out.shape[0], device=out.device)
    return out.masked_fill_((place >= offsets[-1:]).unsqueeze(1), 0)


def _torch_outer(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    a = a if rows is None else a.index_select(0, rows)
    if like.stride(1) < like.stride(2):
        return F.grouped_mm(b.t(), a, offs=offsets).mT
    return F.grouped_mm(a.t(), b, offs=offsets)


def _with_idle_experts(args: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    """Draw inputs: of several experts, the first has no place, and the last place has no expert."""
    made = drawn(args, generator)
    offsets = made[3]
    if len(offsets) > 1:
        offsets[0] = 0
        offsets.clamp_(max=max(0, _rows(*args) - 1))
    return made


# -- packed experts, on any device -----------------------------------------------------------------
def _packed_products(
    a: Tensor, rows: Tensor | None, parts: list[Tensor | None], shape: list[int], blocksize: int,
    kind: str, transposed: bool, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    constants = ((shape[0], shape[1]), blocksize, kind)
    weight = PackedExperts(constants, tuple(parts), a.dtype, transposed)
    return _grouped_cpu(a, rows, weight, *rest)


def _packed_products_fake(
    a: Tensor, rows: Tensor | None, parts: list[Tensor | None], shape: list[int], blocksize: int,
    kind: str, transposed: bool, *rest: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weight = a.new_empty(0, *(shape if not transposed else shape[::-1]))
    return _grouped_fake(a, rows, weight, *rest)


# Opaque, as products with one quantized weight are: they dequantize one expert at a time.
_packed_op = library_op(
    "moe_packed(Tensor a, Tensor? rows, Tensor?[] parts, int[] shape, int blocksize, str kind,"
    " bool transposed, Tensor offsets, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scale)"
    " -> (Tensor, Tensor)",
    _packed_products,
    _packed_products_fake,
    lambda a, rows, parts, shape, *_: 2 * _rows(a, rows) * math.prod(shape),
    temporary=lambda a, rows, parts, shape, *_: a.element_size() * math.prod(shape),
)


# -- triton ----------------------------------------------------------------------------------------
_triton_mm = library_op(
    f"moe_grouped_mm_triton{_MM}) -> Tensor",
    "moe.moe_experts:grouped_mm",
    lambda a, rows, weight, *_: a.new_empty(_rows(a, rows), weight.shape[2]),
    lambda *args: _grouped_flops(*args, None, None),
    plain=_grouped_mm_cpu,
    libraries=(
        Implementation(
            "F.grouped_mm",
            _torch_mm,
            lambda a, rows, weight, offsets, bias: (
                "it adds no bias" if bias is not None else _why_not_torch(a, weight)
            ),
        ),
    ),
    inputs=_with_idle_experts,
)
_triton_lora = library_op(
    f"moe_grouped_lora_triton{_MM}, Tensor lora_a, Tensor lora_b, float scale) -> (Tensor, Tensor)",
    "moe.moe_experts:grouped_lora",
    _grouped_fake,
    _grouped_flops,
    plain=_grouped_cpu,
)
_triton_outer = library_op(
    f"moe_grouped_outer_triton{_OUTER}",
    "moe.moe_experts:grouped_outer",
    _grouped_outer_fake,
    _outer_flops,
    plain=_grouped_outer_cpu,
    libraries=(
        Implementation(
            "F.grouped_mm",
            _torch_outer,
            lambda a, rows, b, offsets, like: _why_not_torch(a, b, like),
        ),
    ),
    inputs=_with_idle_experts,
)
_triton_combine = library_op(
    f"moe_combine_triton{_COMBINE}", "moe.moe_experts:combine", _combine_fake, plain=_combine_cpu
)


# -- both ------------------------------------------------------------------------------------------
def grouped_mm(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """``out[s] = a[rows[s]] · weight[e] + bias[e]`` (S, N), e being the expert of place s.

    ``a`` is (R, K), its rows in order when ``rows`` (S,) is None; weight (E, K, N), any strides;
    bias (E, N) or None. ``offsets`` (E,) are the ends of each expert's places; places after the
    last end are zero. The result is contiguous, in a's dtype. Packed experts are dequantized one at
    a time, and only those that have a place.
    """
    return grouped_lora(a, rows, weight, offsets, bias, None)[0]


def grouped_lora(
    a: Tensor, rows: Tensor | None, weight: Tensor, offsets: Tensor, bias: Tensor | None,
    update: Update | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``grouped_mm`` by the weight with its update, ``a[rows] · weight[e] + low · update.b[e]``.

    Also returns ``low = scale · a[rows] · update.a[e]`` (S, r), at least in fp32: of gradients near
    zero, fp16 would keep few digits.
    """
    thin: tuple[Any, ...] = (None, None, 1.0) if update is None else tuple(update)
    if isinstance(weight, PackedExperts):
        shape, *kind = weight.constants
        stored = list(weight.parts), list(shape), *kind, weight.transposed
        out, low = _packed_op(a, rows, *stored, offsets, bias, *thin)
    elif not use_triton_dot(a, weight, bias, *thin[:2]):
        out, low = _grouped_op(a, rows, weight, offsets, bias, *thin)
    elif update is None:
        out, low = _triton_mm(a, rows, weight, offsets, bias), None
    else:
        out, low = _triton_lora(a, rows, weight, offsets, bias, *thin)
    return out, None if update is None else low


def grouped_outer(
    a: Tensor, rows: Tensor | None, b: Tensor, offsets: Tensor, like: Tensor
) -> Tensor:
    """``out[e] = sum over the places s of e of a[rows[s]]ᵀ b[s]``; zero without places.

    ``a`` (R, K), ``rows`` and ``offsets`` are as in ``grouped_mm``, ``b`` is (S, N); ``like`` (E,
    K, N) has the dtype and layout of the result. Beside rows of 16 bits, thin ones may be in fp32.
    """
    run = _outer_op
    if use_triton_dot(a, b, like):  # a kernel multiplies numbers of one dtype
        run, a, b = _triton_outer, a.to(like.dtype), b.to(like.dtype)
    result: Tensor = run(a, rows, b, offsets, like)
    return result


def combine(y: Tensor, where: Tensor, weights: Tensor | None, active: int) -> Tensor:
    """``out[t] = sum over k of weights[t·K + k] · y[where[t·K + k]]``, summed at least in fp32.

    ``y`` is (S, N), ``where`` (S,), ``weights`` (S,) or None for ones, ``active`` is K; the result
    (T, N) has y's dtype.
    """
    run = _triton_combine if use_triton(y, weights) else _combine_op
    result: Tensor = run(y, where, weights, active)
    return result


def segment_sum(rows: Tensor, offsets: Tensor) -> Tensor:
    """The sum (E, N) of each expert's rows (S, N), at least in fp32."""
    # On the CPU ``index_add`` adds one row after the other, where a plain sum goes by pairs: in
    # fp32 the error would grow with the rows.
    on_cpu = rows.device.type == "cpu"
    wide = torch.float64 if on_cpu else torch.promote_types(rows.dtype, torch.float32)
    place = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets, place, right=True)
    total = rows.new_zeros(offsets.shape[0] + 1, rows.shape[1], dtype=wide)
    return total.index_add(0, expert, rows.to(wide))[:-1]


# -- routing ---------------------------------------------------------------------------------------
def moe_route(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the pairs of a token and an expert by expert.

    ``ids`` (S,) is the expert of each pair, those of one token adjacent. A pair whose expert is
    ``experts`` or more has none here, and adds nothing. Returns the pair at each sorted place (S,),
    the place of each pair (S,), and the end of each expert's places (E,) in int32.
    """
    ordered, order = torch.sort(ids, stable=True)
    ends = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ordered, ends, right=True, out_int32=True)
    return order, inverse_permutation(order), offsets


def inverse_permutation(order: Tensor) -> Tensor:
    """The place of each number in the permutation ``order`` (S,) of 0 .. S - 1."""
    places = torch.arange(order.shape[0], device=order.device, dtype=order.dtype)
    return torch.zeros_like(order).scatter(0, order, places)


# -- autograd --------------------------------------------------------------------------------------
def _double_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, _, weights, weight, bias, order, _, offsets, a, b, _ = ctx.saved_tensors
    is_saved, pairs, gathers = x is not None, order.shape[0], weights is None
    why = "the experts are frozen and their weights in the sum are not"
    require_saved(is_saved or not ctx.needs_input_grad[1], "moe_experts", why)
    if not is_saved:
        x = absent((pairs // ctx.active if gathers else pairs, weight.shape[1]), weight)
    if gathers and ctx.bias is not None:
        bias = absent((weight.shape[0], weight.shape[2]), weight)
    tokens = order // ctx.active

    def formula(x: Tensor, weights: Any, weight: Tensor, bias: Any, *rest: Any) -> Any:
        weight = _updated(weight, _update(rest[-2], rest[-1], ctx.scale))
        y = _by_expert(x.index_select(0, tokens) if gathers else x, weight, bias, offsets)
        if gathers:
            return y
        y = y * weights.index_select(0, order).unsqueeze(1)
        total = y.new_zeros(pairs // ctx.active, y.shape[1])
        return total.index_add(0, tokens, y).to(x.dtype)

    inputs = (x, weights, weight, bias, None, None, None, None, a, b)
    return gradients(formula, inputs, ctx.needs_input_grad, (grad,))


def _low(rows: Tensor, at: Tensor | None, factor: Tensor, offsets: Tensor, scale: float) -> Any:
    """``scale · rows[at] · factor[e]`` (S, r) alone, as ``grouped_lora`` returns it."""
    nothing = (
        rows.new_empty(*factor.shape[:2], 0),
        factor.new_empty(len(factor), factor.shape[2], 0),
    )
    return grouped_lora(rows, at, nothing[0], offsets, None, Update(factor, nothing[1], scale))[1]


def _factors(update: Update | None, weight: Tensor) -> tuple[Any, Any, float]:
    if update is None:
        return None, None, 1.0
    # matrices whose rows and columns both lie apart would be copied by each product
    a, b = (t if 1 in t.stride()[1:] else t.contiguous() for t in update[:2])
    if use_triton_dot(weight, a, b):  # a kernel multiplies numbers of one dtype
        a, b = a.to(weight.dtype), b.to(weight.dtype)
    return a, b, update.scale


def _update(a: Tensor | None, b: Tensor | None, scale: float) -> Update | None:
    return None if a is None or b is None else Update(a, b, scale)


@capturable
class _Projection(torch.autograd.Function):
    """Rows by their experts: gathered from their tokens, or (with ``weights``) added up for them.

    The weight of a pair is a factor of its row. In backward it goes onto the narrower operand of
    each product, and then the wide ones need not be gathered.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, weight: Tensor, bias: Tensor | None,
        order: Tensor, where: Tensor, offsets: Tensor, active: int, lora_a: Tensor | None,
        lora_b: Tensor | None, scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        w_weights, w_weight, w_a, w_b = (ctx.needs_input_grad[i] for i in (1, 2, 8, 9))
        gathers, update = weights is None, _update(lora_a, lora_b, scale)
        rows = order // active if gathers else None
        y, low = grouped_lora(x, rows, weight, offsets, bias, update)
        keeps_x = w_weight or w_a
        # of gradients near zero, fp16 would lose more digits before a large weight than after it
        ctx.weighs_first = not gathers and (not keeps_x or x.dtype is torch.float16)
        ctx.save_for_backward(
            x if keeps_x else None, y if w_weights and ctx.weighs_first else None, weights, weight,
            None if gathers else bias, order, where, offsets, lora_a, lora_b, low if w_b else None,
        )  # fmt: skip
        ctx.active, ctx.bias, ctx.scale = active, None if bias is None else bias.dtype, scale
        return y if weights is None else combine(y, where, weights, active)

    @staticmethod
    @differentiable(_double_backward)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weights, weight, bias, order, where, offsets, a, b, low = ctx.saved_tensors
        w_x, w_weights, w_weight, w_bias, *_, w_a, w_b, _ = ctx.needs_input_grad
        dx = dweights = dweight = dbias = da = db = dlow = None
        gathers, tokens, wide = weights is None, order // ctx.active, _wide(grad.dtype)
        x_at = tokens if gathers else None
        by_place = None if gathers else weights.index_select(0, order).unsqueeze(1)

        def weighted(rows: Any) -> Any:
            return rows if by_place is None else (rows * by_place).to(rows.dtype)

        def outer(left: Any, left_at: Tensor | None, like: Tensor) -> Tensor:
            """The sums of ``left[left_at]ᵀ source[at]``."""
            if gathers:
                return grouped_outer(left, left_at, source, offsets, like)
            return grouped_outer(source, at, factor(left), offsets, like.mT).mT

        # ``factor``: what the other operand of a product with ``source`` is multiplied by
        source, at, factor = grad, None if gathers else tokens, weighted
        if ctx.weighs_first:
            source, at, factor = grad.index_select(0, tokens), None, lambda rows: rows
        if w_weights and y is not None:
            dweights = (source.to(wide) * y).sum(1)
        if ctx.weighs_first:
            source = weighted(source)
        rows: Any = None
        if w_x or (w_weights and y is None):
            update = None if a is None else Update(b.mT, a.mT, ctx.scale)
            rows, dlow = grouped_lora(source, at, weight.mT, offsets, None, update)
        elif w_a:
            dlow = _low(source, at, b.mT, offsets, ctx.scale)
        if w_weights and y is None:  # y · dout = x · (D · dout)
            dweights = (rows.to(wide) * x).sum(1)
            if bias is not None:
                dweights += grouped_mm(grad, tokens, bias.unsqueeze(2), offsets, None).squeeze(1)
        if dweights is not None:
            dweights = dweights.index_select(0, where).to(weights.dtype)
        if w_weight:
            dweight = outer(x, x_at, weight)
        if w_a and dlow is not None:
            da = grouped_outer(x, x_at, factor(dlow), offsets, a)
        if w_b:
            db = outer(low, None, b)
        if w_bias:
            gathered = source if at is None else weighted(source.index_select(0, at))
            dbias = segment_sum(gathered, offsets).to(ctx.bias)
        if w_x:
            dx = combine(rows, where, None, ctx.active) if gathers else factor(rows)
        return dx, dweights, dweight, dbias, None, None, None, None, da, db, None


def moe_up(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor, offsets: Tensor,
    active: int, update: Update | None = None,
) -> Tensor:  # fmt: skip
    """``x[t] · weight[e] + bias[e]`` for each pair of a token and an expert, sorted by expert.

    ``x`` is (T, H), weight (E, H, F) in x's dtype, any strides (the transpose of (E, F, H) as
    well), bias (E, F) or None; ``order``, ``where`` and ``offsets`` are from ``moe_route``,
    ``active`` is the number K of experts of a token, ``update`` is added to the weight. The result
    (S, F), S = T·K, is in the order of ``order``.
    """
    factors = _factors(update, weight)
    routing = order, where, offsets, active
    return _Projection.apply(x, None, weight, bias, *routing, *factors)  # type: ignore[no-any-return, no-untyped-call]


def moe_down(
    h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, where: Tensor,
    offsets: Tensor, active: int, update: Update | None = None,
) -> Tensor:  # fmt: skip
    """Project each pair's row, and add up each token's rows by their weights.

    ``h`` is (S, F), in the order of ``order``; ``weights`` (S,) in the order of the tokens; weight
    (E, F, H) in h's dtype, any strides; bias (E, H) or None; the rest as in ``moe_up``. The result
    (T, H) is summed in fp32, and in h's dtype.
    """
    factors = _factors(update, weight)
    routing = order, where, offsets, active
    return _Projection.apply(h, weights, weight, bias, *routing, *factors)  # type: ignore[no-any-return, no-untyped-call]


def moe_experts(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    activation: Callable[[Tensor], Tensor], up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, up_update: Update | None = None,
    down_update: Update | None = None,
) -> Tensor:  # fmt: skip
    """Send each token through its experts. Backward may run more than once.

    Args:
        x: (T, H).
        index: (T, K), the experts of each token.
        weights: (T, K), what their outputs are multiplied by; any floating dtype.
        up: (E, H, F), in x's dtype, any strides; frozen or trainable.
        down: (E, F', H), in x's dtype, any strides; frozen or trainable.
        activation: from the rows (S, F) of the first product to the rows (S, F') of the second.
        up_bias: (E, F) or None.
        down_bias: (E, H) or None.
        up_update: what is added to ``up``, or None.
        down_update: what is added to ``down``, or None.

    Returns:
        (T, H) in x's dtype.
    """
    active = index.shape[1]
    routing = moe_route(index.reshape(-1), up.shape[0])
    h = activation(moe_up(x, up, up_bias, *routing, active, up_update))
    return moe_down(h, weights.reshape(-1), down, down_bias, *routing, active, down_update)


# -- OP --------------------------------------------------------------------------------------------
def unsupported(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    activation: Callable[[Tensor], Tensor], up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, up_update: Update | None = None,
    down_update: Update | None = None,
) -> list[str]:  # fmt: skip
    """Why the op cannot take these arguments."""
    devices = [] if index.device == weights.device == x.device else ["several devices"]
    inner = x.new_empty(0, down.shape[1])
    return [
        *devices,
        *_unsupported(x, up, up_bias, update=up_update),
        *_unsupported(inner, down, down_bias, update=down_update),
    ]


def _unsupported(
    rows: Tensor, weight: Tensor, bias: Tensor | None, order: Any = None, where: Any = None,
    offsets: Any = None, active: Any = None, update: Update | None = None,
) -> list[str]:  # fmt: skip
    # Of one of the two projections: ``moe_up``, or (with h for x) ``moe_down``.
    reasons = []
    if rows.ndim != 2 or weight.ndim != 3:
        reasons.append("the rows are not (N, in), or the weights are not (E, in, out)")
    elif rows.shape[1] != weight.shape[1]:
        reasons.append(f"shapes do not fit: {tuple(rows.shape)}, {tuple(weight.shape)}")
    factors = () if update is None else update[:2]
    if update is not None and (*update.a.shape[:2], update.b.shape[2]) != tuple(weight.shape):
        reasons.append("the update is not one for each matrix")
    if len({t.dtype for t in factors}) > 1 or any(
        t.dtype not in (weight.dtype, _wide(weight.dtype)) for t in factors
    ):
        reasons.append("the update is neither in the dtype of the weights nor in fp32")
    tensors = [t for t in (rows, weight, bias) if t is not None]
    if len({t.dtype for t in tensors}) > 1:
        reasons.append(f"several dtypes: {', '.join(str(t.dtype) for t in tensors)}")
    return (
        reasons + not_16_bits(rows) + on_several_devices(*tensors, *factors, order, where, offsets)
    )


def _down_unsupported(
    h: Tensor, weights: Tensor, weight: Tensor, bias: Tensor | None, *routing: Any
) -> list[str]:
    return _unsupported(h, weight, bias, *routing) + on_several_devices(h, weights)


def _example(m: Maker, bias: bool = False, lora: bool = False) -> tuple[Any, ...]:
    hidden, inner, experts, active = m.sizes.hidden, m.sizes.inner // 2, m.sizes.experts, 2
    x = m.x(hidden).detach().flatten(0, 1).requires_grad_()
    first, used = m.integers(experts - 1, len(x), 1), experts - 1
    index = (first + torch.arange(active, device=m.device)) % used
    weights = m.normal(len(x), active).requires_grad_()
    up, down = m.weight(experts, inner, hidden), m.weight(experts, hidden, inner)
    biases = (m.weight(experts, inner), m.weight(experts, hidden)) if bias else (None, None)
    if not lora:
        return x, index, weights, up.mT, down.mT, F.silu, *biases, None, None
    sizes = (hidden, inner), (inner, hidden)
    updates = (
        Update(m.adapter(experts, 4, k).mT, m.adapter(n, 4, experts).permute(2, 1, 0), 0.5)
        for k, n in sizes
    )
    return x, index, weights, up.detach().mT, down.detach().mT, F.silu, *biases, *updates


def _example_up(m: Maker, bias: bool = False, lora: bool = False) -> tuple[Any, ...]:
    x, index, _, up, _, _, up_bias, _, update, _ = _example(m, bias, lora)
    return x, up, up_bias, *moe_route(index.reshape(-1), len(up)), index.shape[1], update


def _example_down(m: Maker, bias: bool = False, lora: bool = False) -> tuple[Any, ...]:
    _, index, weights, _, down, _, _, down_bias, _, update = _example(m, bias, lora)
    routing, pair_weights = moe_route(index.reshape(-1), len(down)), weights.detach().reshape(-1)
    h = m.normal(index.numel(), down.shape[1]).requires_grad_()
    return h, pair_weights.requires_grad_(), down, down_bias, *routing, index.shape[1], update


def _variants(example: Callable[..., tuple[Any, ...]]) -> dict[str, Callable[..., Any]]:
    return {
        "bias": lambda m: example(m, True),
        "lora": lambda m: example(m, False, True),
        "bias-lora": lambda m: example(m, True, True),
    }


OP = Op(
    "moe_experts",
    reference,
    moe_experts,
    unsupported,
    rule=None,
    example=_example,
    variants=_variants(_example),
)
UP = Op(
    "moe_up",
    up_reference,
    moe_up,
    _unsupported,
    rule="moe_experts",
    example=_example_up,
    variants=_variants(_example_up),
)
DOWN = Op(
    "moe_down",
    down_reference,
    moe_down,
    _down_unsupported,
    rule="moe_experts",
    example=_example_down,
    variants=_variants(_example_down),
)
