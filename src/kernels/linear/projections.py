"""Linear layers on rows: records, and the products of several layers that read one input.

    yᵢ = x·Wᵢᵀ + bᵢ + scaleᵢ·(zᵢ·Aᵢᵀ·Bᵢᵀ + b'ᵢ)

Each weight is plain or quantized, each adapter is there or not, and reads x or an input zᵢ that it
does not share (x after dropout); without an Aᵢ, zᵢ (N, r) goes straight into Bᵢ. Products work on
rows (N, features), without autograd, and return fresh tensors. A's of one input run as one matmul,
and all gradients of one input are summed in one buffer, in the input's dtype, which may be wider
than the products'.

An autograd function takes tensors one by one, and constants separately: ``flat`` and ``linears``
convert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..captured import capturable
from ..direct import direct
from ..launch import library_op, use_triton_dot
from ..matmul import addmm, linear, mm
from .products import (
    Rows,
    beside,
    gradient_of_a,
    gradient_of_b,
    is_wide,
    narrow_copy,
    on_cpu,
    rank_update,
    scaled_mm,
    sum_of_products,
)
from .quantized import (
    Quantized,
    dequantize,
    flat_weights,
    joined_weights,
    parts,
    quantized_products,
)

MIXED = "some of the weights are quantized, some are not"


# -- records ---------------------------------------------------------------------------------------
class Linear(NamedTuple):
    """A linear layer: ``x·Wᵀ + bias + scale·(z·Aᵀ·Bᵀ + lora_bias)``.

    Products with a quantized weight run in ``compute``, or in the input's dtype if that is None;
    others in the weight's. ``dtype`` is that of the result: the product's, or a wider one. The
    adapter may have another dtype than the base. ``linears`` returns the form that the products
    take: there a quantized weight is a ``Quantized``, and no dtype is None.
    """

    # (out, in), frozen or trainable; or a frozen ``Quantized``, or a tuple of its fields
    weight: Any
    bias: Tensor | None = None  # (out,)
    lora_a: Tensor | None = None  # (r, in), or None without an adapter, or without an A
    lora_b: Tensor | None = None  # (out, r), in the dtype of ``lora_a``
    scale: float = 1.0
    lora_bias: Tensor | None = None  # (out,), the bias of B
    # z, the adapter's input where it is not x: (..., in), or without an A (..., r), what B reads
    x_lora: Tensor | None = None
    compute: Any = None  # dtypes, or None
    dtype: Any = None

    def is_quantized(self) -> bool:
        """Whether the weight is packed."""
        return not isinstance(self.weight, Tensor)

    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in)."""
        return tuple(self.weight[1] if isinstance(self.weight, tuple) else self.weight.shape)

    def with_one_bias(self) -> Linear:
        """The same with the adapter's bias in the base's."""
        if self.lora_bias is None:
            return self
        bias = self.lora_bias * self.scale
        bias = bias if self.bias is None else self.bias + bias
        return self._replace(bias=bias, lora_bias=None)

    def unpacked(self) -> Linear:
        """The same with a plain weight, unless that is never to be there as a whole."""
        if not isinstance(self.weight, Quantized) or len(parts([self.weight], 0)) > 1:
            return self
        return self._replace(weight=dequantize(self.weight, self.compute))


class Grads(NamedTuple):
    """The gradient of each tensor of a ``Linear``, or None; or whether it is needed."""

    weight: Any = None
    bias: Any = None
    lora_a: Any = None
    lora_b: Any = None
    lora_bias: Any = None
    x_lora: Any = None


WIDTH = len(Grads._fields)
"""How many tensors ``flat`` gives of each linear."""


class Constants(NamedTuple):
    """The parts of several linears that are not tensors."""

    scales: tuple[float, ...]  # of the adapters
    sizes: tuple[int, ...]  # of the quantized weights: see ``flat_weights``
    kinds: tuple[str, ...]  # of each quantized weight
    compute: torch.dtype | None = None  # of products with quantized weights; None: of plain ones
    dtype: torch.dtype | None = None  # of the results; None is that of the products


def flat(layers: Sequence[Linear], x: Tensor) -> tuple[list[Tensor | None], Constants]:
    """The tensors of several linears in a row, and the rest.

    ``WIDTH`` of each linear. Then the rest of each quantized weight, whose first tensor is among
    those before. ``x`` is the linears' input.

    Raises:
        ValueError: some of the weights are quantized and some are not, or they differ in
            ``compute`` or ``dtype``.
    """
    tensors: list[Tensor | None] = []
    packed: list[Quantized] = []
    first, scales = layers[0], []
    for weight, bias, lora_a, lora_b, scale, lora_bias, x_lora, compute, dtype in layers:
        first_tensor: Any = weight
        if not isinstance(weight, Tensor):
            w = Quantized(*weight)
            packed.append(w._replace(tensors=tuple(map(_outside_inference, w.tensors))))
            first_tensor = packed[-1].tensors[0]
        if compute is not first.compute or dtype is not first.dtype:
            raise ValueError("the linears compute, or return, in several dtypes")
        tensors += (first_tensor, bias, lora_a, lora_b, lora_bias, x_lora)
        scales.append(scale)
    if not packed:
        return tensors, Constants(tuple(scales), (), (), None, first.dtype)
    if len(packed) < len(layers):
        raise ValueError(MIXED)
    for w in packed:
        tensors += w.tensors[1:]
    sizes, kinds = flat_weights(packed)
    constant = tuple(scales), tuple(sizes), tuple(kinds), first.compute or x.dtype, first.dtype
    return tensors, Constants(*constant)


def _outside_inference(t: Tensor | None) -> Tensor | None:
    # HQQ makes its tensors in inference mode; autograd would not keep them for backward.
    if t is None or torch.compiler.is_dynamo_compiling() or not t.is_inference():
        return t
    there = t.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(*there)  # type: ignore[call-overload,no-any-return]


def linears(tensors: Sequence[Any], constants: tuple[Any, ...]) -> list[Linear]:
    """The linears of ``flat``'s list; ``constants`` are those, or a plain tuple of them."""
    scales, sizes, kinds, compute, dtype = constants
    end = WIDTH * len(scales)
    resolved = []
    stored: list[Tensor | None] = []
    if kinds:
        rest = iter(tensors[end:])
        for i, count in enumerate(sizes[3::4]):
            stored += [tensors[WIDTH * i], *itertools.islice(rest, count - 1)]
    weights = joined_weights(stored, sizes, kinds)
    for i, scale in enumerate(scales):
        weight, bias, lora_a, lora_b, lora_bias, x_lora = tensors[WIDTH * i : WIDTH * (i + 1)]
        if kinds:
            weight = weights[i]
        low = compute or weight.dtype  # quantized weights come with ``compute``
        adapter = (lora_a, lora_b, scale, lora_bias, x_lora)
        resolved.append(Linear(weight, bias, *adapter, low, dtype or low))
    return resolved


def unflattened(tensors: Sequence[Any], constants: Constants) -> list[Linear]:
    """The linears of ``flat``'s list as arguments of a reference, biases in the products' dtype."""
    return [
        v if v.bias is None else v._replace(bias=v.bias.to(v.compute))
        for v in linears(tensors, constants)
    ]


_T = TypeVar("_T")


def with_operands(
    run: Callable[[list[Tensor | None], Constants], _T], layers: Sequence[Linear], x: Tensor
) -> _T:
    """Call ``run`` with ``flat``'s results, the operands cast as autocast casts a linear layer's.

    Autocast is then off: nothing is cast a second time.
    """
    tensors, constants = flat(layers, x)
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return run(tensors, constants)
    dtype, end = torch.get_autocast_dtype(device), WIDTH * len(layers)
    # over quantized weights the adapters alone are cast
    first = Grads._fields.index("lora_a") if constants.kinds else 0
    operands = [t if i % WIDTH >= first else None for i, t in enumerate(tensors[:end])]
    if one_by_one(device):
        copies = [t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in operands]
    else:
        copies = _cast_in_one_launch(operands, dtype)
    copies = [t if c is None else c for t, c in zip(tensors[:end], copies, strict=True)]
    with torch.autocast(device, enabled=False):
        return run([*copies, *tensors[end:]], constants)


def wanted(needed: Sequence[bool], count: int) -> list[Grads]:
    """Which gradients of each linear ``needs_input_grad`` asks for, in its part of the linears."""
    return [Grads(*needed[i : i + WIDTH]) for i in range(0, WIDTH * count, WIDTH)]


# -- casts of autocast -----------------------------------------------------------------------------
def one_by_one(device: str) -> bool:
    """Whether each operand is cast by itself: where nothing is launched."""
    return device == "cpu"


def _cast_in_one_launch(
    tensors: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Tensor | None]:
    results = list(tensors)
    other = [
        i for i, t in enumerate(tensors) if t is not None and t.dtype not in (dtype, torch.float64)
    ]
    for kind in dict.fromkeys(results[i].dtype for i in other):  # type: ignore[union-attr]
        places = [i for i in other if tensors[i].dtype is kind]  # type: ignore[union-attr]
        copies = _Cast.apply(dtype, *(tensors[i] for i in places))  # type: ignore[no-untyped-call]
        for i, t in zip(places, copies, strict=True):
            results[i] = t
    return results


def _copied(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


@capturable
class _Cast(torch.autograd.Function):
    """``t.to(dtype)`` of several tensors of one dtype: a launch in forward, one in backward."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.before = tensors[0].dtype
        ctx.set_materialize_grads(False)
        return tuple(_copied(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [g for g in grads if g is not None]
        if torch.is_grad_enabled():  # to be differentiated itself
            return None, *(None if g is None else g.to(ctx.before) for g in grads)
        wide = iter(_copied(present, ctx.before) if present else ())
        return None, *(None if g is None else next(wide) for g in grads)


# -- products with stored weights ------------------------------------------------------------------
def stored_products(
    pairs: Sequence[tuple[Tensor, Any]], updates: Sequence[tuple[Tensor, Tensor]],
    dtype: torch.dtype, *, transposed: bool = False, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``bias + Σ xᵢ·Wᵢ + Σ leftⱼ·rightⱼ`` in ``dtype``: all weights are plain, or all quantized.

    The arguments are those of ``quantized_products``.
    """
    x, weight = pairs[0]
    if isinstance(weight, Quantized):
        return quantized_products(pairs, updates, dtype, transposed=transposed, bias=bias)
    if len(pairs) == 1 and not updates:
        return (linear(x, weight, bias) if transposed else mm(x, weight)).to(dtype)
    matrices = [(x, weight.t())] if transposed else list(pairs)
    every = [*matrices, *updates]
    if not (updates and x.dtype is dtype and use_triton_dot(*chain.from_iterable(every))):
        lefts, rights = map(list, zip(*every, strict=True))
        return sum_of_products(bias, lefts, rights, dtype)
    if len(pairs) == 1:
        (pair,) = matrices
        total = mm(*pair) if bias is None else addmm(bias, *pair)
    else:
        lefts, rights = map(list, zip(*matrices, strict=True))
        total = sum_of_products(bias, lefts, rights, dtype)
    for update in updates:
        total = rank_update(total, *update)
    return total


# -- forward ---------------------------------------------------------------------------------------
def _by_dtype(tensors: Sequence[Tensor | None]) -> list[list[int]]:
    groups: dict[torch.dtype, list[int]] = {}
    for i, t in enumerate(tensors):
        if t is not None:
            groups.setdefault(t.dtype, []).append(i)
    return list(groups.values())


# Opaque on the CPU: Inductor would compile kernels for copies that take no time.
_join = direct(library_op("join_matrices(Tensor[] parts, int dim) -> Tensor", torch.cat, torch.cat))


def _joined(parts: Sequence[Any], dim: int) -> Tensor:
    first: Tensor = parts[0]
    if len(parts) == 1:
        return first
    join: Callable[..., Tensor] = _join if on_cpu(first) else torch.cat
    return join(list(parts), dim)


def rows_of(t: Tensor) -> Tensor:
    """``t`` (..., features) as (N, features)."""
    return t.reshape(-1, t.shape[-1])


def through_a(x: Rows | None, layers: Sequence[Linear]) -> list[Tensor | None]:
    """``scale·z·Aᵀ`` (N, r) of each adapter, in its dtype: those on x as one matmul.

    Without x, only those that have another input.
    """
    # the scale goes onto the narrow factor, where it costs nothing and serves dB too
    results: list[Tensor | None] = [None] * len(layers)
    for group in _together(layers):
        i, *others = group
        a, z = layers[i].lora_a, layers[i].x_lora
        if z is not None:
            if a is not None:
                results[i] = scaled_mm(beside(rows_of(z), a), a.t(), layers[i].scale)
            else:
                h = rows_of(z).to(layers[i].lora_b.dtype)  # type: ignore[union-attr]
                results[i] = h if layers[i].scale == 1.0 else h * layers[i].scale
            continue
        if x is None:
            continue
        if a is not None and not others:
            results[i] = scaled_mm(x.beside(a), a.t(), layers[i].scale)
            continue
        stacked = _joined([layers[i].lora_a for i in group], 0)
        rows, right = x.beside(stacked), stacked.t()
        widths = [layers[i].lora_a.shape[0] for i in group]  # type: ignore[union-attr]
        scales = {layers[i].scale for i in group}
        plain = on_cpu(rows) and rows.dtype is right.dtype
        if len(scales) == 1 and not plain:
            whole = scaled_mm(rows, right, scales.pop())
            parts: Sequence[Tensor] = whole.split_with_sizes(widths, 1)
        else:
            whole = mm(rows, right) if plain else scaled_mm(rows, right, 1.0)
            each = zip(group, whole.split_with_sizes(widths, 1), strict=True)
            parts = [part * layers[i].scale for i, part in each]
        for i, part in zip(group, parts, strict=True):
            results[i] = part
    return results


_SHORT = 256
"""Features below which fp32 products stay apart: MKL sums a few short rows more exactly."""


def _together(layers: Sequence[Linear]) -> list[list[int]]:
    # The adapters whose A's run as one matmul.
    if len(layers) == 1:
        return [[0]] if layers[0].lora_b is not None else []
    alone = [[i] for i, v in enumerate(layers) if v.x_lora is not None]
    shared = [v.lora_a if v.x_lora is None else None for v in layers]
    groups = _by_dtype(shared)
    for a in shared:
        if a is not None and a.dtype is torch.float32 and a.shape[1] < _SHORT:
            return [*alone, *([i] for group in groups for i in group)]
    return [*alone, *groups]


def narrow_copy_for(
    x: Tensor, tensors: Sequence[Any], constants: Constants, count: int
) -> Tensor | None:
    """``products.narrow_copy`` for the first ``count`` linears of ``flat``'s list."""
    if not is_wide(x):
        return None
    dtypes: set[torch.dtype] = set()
    for weight, _, lora_a, _, _, x_lora in zip(
        *[iter(tensors[: WIDTH * count])] * WIDTH, strict=True
    ):
        dtypes.add(constants.compute or weight.dtype)
        if lora_a is not None and x_lora is None:
            dtypes.add(lora_a.dtype)
    return narrow_copy(x, dtypes)


def output(x: Rows, layer: Linear, h: Tensor | None) -> Tensor:
    """The output (N, out) of one linear; ``h`` is its part of ``through_a``."""
    weight, bias, _, lora_b, scale, lora_bias, _, compute, dtype = layer
    low = x.to(compute)
    after = None
    if lora_bias is not None:
        scaled = lora_bias * scale
        # a result that is wider than what is rounded to a stored weight's ``compute`` gets it whole
        if dtype is compute or isinstance(weight, Tensor):
            bias = scaled if bias is None else bias + scaled
        else:
            after = scaled
    bias = None if bias is None else bias.to(compute)
    updates = () if h is None or lora_b is None else ((h, lora_b.t()),)
    y = stored_products([(low, weight)], updates, dtype, transposed=True, bias=bias)
    return y if after is None else y.add_(after)


def forward(x: Rows, layers: Sequence[Linear]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs (N, outᵢ) of several linears on x, and their parts of ``through_a``."""
    hs = through_a(x, layers)
    return [output(x, layer, h) for layer, h in zip(layers, hs, strict=True)], hs


# -- backward --------------------------------------------------------------------------------------
class Returned(NamedTuple):
    """The upstream gradients of several linears on one input, and what went through the B's."""

    # (N, out), each in the dtype of its product; None where there is none
    grads: Sequence[Tensor | None]
    through_b: list[Tensor | None]  # ``scale·dY·B`` (N, r), shared by the gradients of z and of A
    of_b: list[tuple[Tensor | None, Tensor | None]]  # the gradients of B and of its bias


def returned(
    layers: Sequence[Linear],
    hs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    need_x: bool,
    needs: Sequence[Grads],
) -> Returned:
    """Pass the upstream gradients through the B's, as far as ``needs`` asks for it."""
    # One after the other: where fp32 adapters need each cast, the copy goes.
    ts: list[Tensor | None] = []
    of_b: list[tuple[Tensor | None, Tensor | None]] = []
    lows: list[Tensor | None] = []
    for layer, h, grad, need in zip(layers, hs, grads, needs, strict=True):
        t = db = dbias = low = None
        if grad is not None:
            low, b = grad.to(layer.compute), layer.lora_b
            need_t = need.lora_a or need.x_lora or (need_x and layer.x_lora is None)
            need_b = need.lora_b and h is not None
            if b is not None and (need_t or need_b or need.lora_bias):
                wide = low if b.dtype is layer.compute else beside(grad, b)
                t = scaled_mm(wide, b, layer.scale, True) if need_t else None
                db = gradient_of_b(h, wide) if h is not None and need_b else None
                if need.lora_bias and layer.lora_bias is not None:
                    exact = torch.promote_types(wide.dtype, torch.float32)
                    dbias = wide.sum(0, dtype=exact).mul_(layer.scale).to(layer.lora_bias.dtype)
        ts.append(t)
        of_b.append((db, dbias))
        lows.append(low)
    return Returned(lows, ts, of_b)


def backward(
    x: Rows | None, layers: Sequence[Linear], hs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None], need_x: bool, needs: Sequence[Grads], dtype: torch.dtype,
    round_updates: bool = False,
) -> tuple[Tensor | None, list[Grads]]:  # fmt: skip
    """The gradients of x (in ``dtype``, or None) and of each of several linears on it.

    ``x`` (N, in) is needed for the gradients of the weights and of the A's, ``hs`` (the parts of
    ``through_a``) for those of the B's. ``grads`` are the upstream gradients (N, out); None where
    there is none. ``round_updates`` is ``gradient_of_input``'s.
    """
    back = returned(layers, hs, grads, need_x, needs)
    gradients = gradients_of_parameters(x, layers, back, needs)
    dx = gradient_of_input(layers, back, dtype, round_updates) if need_x else None
    return dx, gradients


def gradient_of_input(
    layers: Sequence[Linear],
    back: Returned,
    dtype: torch.dtype,
    round_updates: bool = False,
) -> Tensor | None:
    """``Σ dyᵢ·Wᵢ + tᵢ·Aᵢ`` in one buffer of ``dtype``, all adapters as one product.

    Over quantized weights a product of narrower adapters is rounded before it is added only with
    ``round_updates``.
    """
    pairs: list[tuple[Tensor, Any]] = [
        (dy, layer.weight) for dy, layer in zip(back.grads, layers, strict=True) if dy is not None
    ]
    if not pairs:
        return None
    ts = [t if v.x_lora is None else None for v, t in zip(layers, back.through_b, strict=True)]
    updates = [
        (_joined([ts[i] for i in group], 1), _joined([layers[i].lora_a for i in group], 0))
        for group in _by_dtype(ts)
    ]
    if isinstance(pairs[0][1], Quantized) and not round_updates:
        updates = [(left.to(dtype), right) for left, right in updates]
    return stored_products(pairs, updates, dtype)


def gradients_of_parameters(
    x: Rows | None,
    layers: Sequence[Linear],
    back: Returned,
    needs: Sequence[Grads],
) -> list[Grads]:
    """The gradients of each linear's parameters and of its z, None where not needed."""
    das = _gradients_of_a(x, layers, back.through_b, needs)
    gradients = []
    each = zip(layers, needs, back.grads, back.through_b, das, back.of_b, strict=True)
    for layer, need, dy, t, da, of_b in each:
        dweight = dbias = dz = None
        if dy is not None:
            if need.weight and x is not None:
                dweight = mm(dy.t(), x.to(dy.dtype))
            if need.bias:
                dbias = dy.sum(0, dtype=dy.dtype if layer.bias is None else layer.bias.dtype)
            if need.x_lora and layer.x_lora is not None and t is not None:
                kind, a = layer.x_lora.dtype, layer.lora_a
                dz = t.to(kind) if a is None else mm(t.to(kind), a.to(kind))
                dz = dz.view(layer.x_lora.shape)
        db, dlora_bias = of_b
        gradients.append(Grads(dweight, dbias, da, db, dlora_bias, dz))
    return gradients


def _gradients_of_a(
    x: Rows | None,
    layers: Sequence[Linear],
    ts: Sequence[Tensor | None],
    needs: Sequence[Grads],
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * len(layers)
    needed: list[Tensor | None] = [None] * len(layers)
    for i, (layer, t, need) in enumerate(zip(layers, ts, needs, strict=True)):
        if t is None or not need.lora_a:
            continue
        if layer.x_lora is not None:
            gradients[i] = gradient_of_a(rows_of(layer.x_lora), t)
        else:
            needed[i] = t
    for group in _by_dtype(needed):
        if x is None:
            continue
        joined = _joined([needed[i] for i in group], 1)
        stacked = gradient_of_a(x.beside(joined), joined)
        if len(group) == 1:
            gradients[group[0]] = stacked
            continue
        widths = [layers[i].lora_a.shape[0] for i in group]  # type: ignore[union-attr]
        for i, part in zip(group, stacked.split_with_sizes(widths, 0), strict=True):
            gradients[i] = part
    return gradients
