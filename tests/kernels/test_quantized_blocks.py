"""``qkv_block`` and ``mlp_block`` over quantized weights: parity, gradients, what is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.linear import projections
from fusewright.kernels.linear.linear import KEEPS, quant_linear
from fusewright.kernels.linear.quantized import Quantized, flat_weights
from fusewright.kernels.mlp import mlp_block
from fusewright.kernels.mlp.glu import glu, glu_packed
from fusewright.kernels.tolerance import exceeded

from .by_parts import LORA, MLP, QKV, records
from .quantized_weights import random_weight
from .test_qkv_block import make
from .util import Watch, assert_parity_of_draws, saved_tensors

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32)]
KINDS = [("nf4", 64, True), ("fp4", 32, False), ("int8", 0, False)]
SCALES = [2.0, 0.37, 1.0]
SHAPES = [(97, 64), (33, 65), (2, 25, 128), (3, 1, 32, 64)]
"""Of x: rows of whole blocks, or odd ones; for others bitsandbytes' CPU kernel errs (0.50)."""

Lists = list[list[Any]]


def _linears(
    sizes: list[tuple[int, int]],
    dtype: torch.dtype,
    adapter: torch.dtype,
    kind: tuple[str, int, bool] = KINDS[0],
    *,
    ranks: tuple[int, ...] = (3, 5, 4),
    bias: bool = False,
    lora_bias: bool = False,
) -> Lists:
    """Quantized weights, biases, A's, B's and their biases; a rank of 0 means no adapter."""
    lists: Lists = [[], [], [], [], []]
    for (out, into), rank in zip(sizes, ranks, strict=False):
        lists[0].append(random_weight((out, into), *kind))
        lists[1].append(make(out, dtype=dtype) if bias else None)
        lists[2].append(make(rank, into, dtype=adapter, spread=into**-0.5) if rank else None)
        lists[3].append(make(out, rank, dtype=adapter, spread=0.3) if rank else None)
        lists[4].append(make(out, dtype=adapter) if rank and lora_bias else None)
    return lists


def _trained(lists: Lists) -> list[Tensor]:
    return [t for v in lists[1:] for t in v if t is not None]


def _drawn(
    shape: tuple[int, ...], dtype: torch.dtype, need_x: bool, made: Callable[[], Lists]
) -> tuple[Lists, Callable[[], list[Tensor]]]:
    """Linears whose weights stay, and what makes x and other tensors beside the weights."""
    torch.manual_seed(0)

    def draw() -> list[Tensor]:
        return [make(*shape, dtype=dtype).requires_grad_(need_x), *_trained(made())]

    return made(), draw


def _over(fn: Callable[..., Any], lists: Lists, *options: str) -> Callable[..., Any]:
    """``fn`` as a function of x and of the tensors beside the weights."""
    places = [(i, j) for i, v in enumerate(lists) for j, t in enumerate(v) if i and t is not None]

    def call(x: Tensor, *tensors: Tensor) -> Any:
        full: Lists = [list(lists[0]), *([None] * len(v) for v in lists[1:])]
        for (i, j), t in zip(places, tensors, strict=True):
            full[i][j] = t
        return fn(x, *full[:4], SCALES[: len(full[0])], full[4], *options)

    return call


def _one(x: Tensor, w: Quantized, bias, a, b, scale: float, lora_bias) -> Tensor:
    if a is None:
        return quant_linear(x, w, bias)
    return LORA.call(x, w, bias, a, b, scale, None, lora_bias)


def separate(x: Tensor, *lists: Any) -> tuple[Tensor, ...]:
    """The ops that ``qkv_block`` replaces."""
    return tuple(_one(x, *each) for each in zip(*lists, strict=True))


def separate_mlp(x: Tensor, *given: Any) -> Tensor:
    """The ops that ``mlp_block`` replaces."""
    *lists, activation, layout = given
    *ins, down = zip(*lists, strict=True)
    outs = [_one(x, *each) for each in ins]
    if layout == "two":
        return _one(glu(*outs, activation), *down)
    return _one(glu_packed(*outs, activation, layout == "gate first"), *down)


def _mlp_sizes(inner: int, wide: int, layout: str) -> list[tuple[int, int]]:
    ins = [(wide, inner)] * 2 if layout == "two" else [(2 * wide, inner)]
    return [*ins, (inner, wide)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    outs=st.sampled_from([[48, 31], [64, 16, 16]]),
    ranks=st.sampled_from([(3, 5, 4), (4, 0, 4), (0, 2, 0)]),
    dtypes=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    lora_bias=st.booleans(),
    need_x=st.booleans(),
    keep=st.sampled_from(KEEPS),
)
def test_parity_of_linears(shape, outs, ranks, dtypes, kind, bias, lora_bias, need_x, keep):
    """Against the definition; where adapters are wider than the base, against the single ops.

    There gradients are in fp32 and made of bf16 values: the largest error is that of a few of them.
    """
    dtype, adapter = dtypes
    definition = QKV.reference if dtype is adapter else separate

    made = functools.partial(
        _linears, [(out, shape[-1]) for out in outs], dtype, adapter, kind,
        ranks=ranks, bias=bias, lora_bias=lora_bias,
    )  # fmt: skip
    lists, draw = _drawn(shape, dtype, need_x, made)
    ours = _over(lambda *a: QKV.call(*a, keep=keep), lists)
    assert_parity_of_draws(ours, _over(definition, lists), draw)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    wide=st.sampled_from([64, 95, 128]),
    ranks=st.sampled_from([(3, 5, 4), (4, 0, 4), (0, 0, 0)]),
    dtypes=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    bias=st.booleans(),
    lora_bias=st.booleans(),
    need_x=st.booleans(),
    layout=st.sampled_from(mlp_block.LAYOUTS),
    keep=st.sampled_from(mlp_block.KEEPS),
)
def test_parity_of_mlps(shape, wide, ranks, dtypes, kind, bias, lora_bias, need_x, layout, keep):
    dtype, adapter = dtypes
    definition = MLP.reference if dtype is adapter else separate_mlp

    made = functools.partial(
        _linears, _mlp_sizes(shape[-1], wide, layout), dtype, adapter, kind,
        ranks=ranks, bias=bias, lora_bias=lora_bias,
    )  # fmt: skip
    lists, draw = _drawn(shape, dtype, need_x, made)
    ours = _over(MLP.call, lists, "silu", layout, keep)
    assert_parity_of_draws(ours, _over(definition, lists, "silu", layout), draw)


def test_tiles_add_up_and_nothing_of_tokens_times_intermediate_exists(monkeypatch):
    monkeypatch.setattr(mlp_block, "TILE_BYTES", 1)  # tiles of 64 rows
    lists, rows, wide = _linears(_mlp_sizes(8, 80, "two"), F64, F64), 500, 80
    leaves, upstream = [make(rows, 8, dtype=F64), *_trained(lists)], torch.randn(rows, 8).double()
    results = []
    for fn, options in ((MLP.call, ("input",)), (MLP.reference, ())):
        y = _over(fn, lists, "gelu", "two", *options)(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    tensors, constants = projections.flat(records(*lists[:4], SCALES, lists[4]), leaves[0])
    options = (tensors, *map(list, constants[:3]), F64, None, "gelu", "two")
    sizes: list[int] = []
    with torch.no_grad(), Watch(lambda op, args, outs: sizes.extend(t.numel() for t in outs)):
        mlp_block._tiled_forward(leaves[0], *options)
        needed = [True, *(t is not None and t.requires_grad for t in tensors)]
        mlp_block._tiled_backward(upstream, leaves[0], needed, F64, *options)
    assert max(sizes) < rows * wide // 4


@pytest.mark.long("gate_up", "input")
@pytest.mark.parametrize("keep", mlp_block.KEEPS)
def test_inductor_with_a_dynamic_batch_keeps_no_full_copy(keep):
    joined = _linears([(128, 64), (64, 64)], BF16, BF16)
    mlp = _linears(_mlp_sizes(64, 192, "two"), BF16, BF16)
    count = len(_trained(joined))
    kept_of = {"gate_up": "all", "input": "input"}

    def both(x: Tensor, *tensors: Tensor) -> Tensor:
        block = _over(lambda *a: QKV.call(*a, keep=kept_of[keep]), joined)
        first, second = block(x, *tensors[:count])
        inner = first[..., :64] * second
        return _over(MLP.call, mlp, "silu", "two", keep)(inner, *tensors[count:])

    # rows become symbolic with the second number of them; the sizes of weights are constants
    compiled = torch.compile(both, fullgraph=True, backend="inductor")
    for rows in (3, 5, 7):
        leaves = [make(rows, 20, 64, dtype=BF16), *_trained(joined), *_trained(mlp)]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        results: list[tuple[Tensor, ...]] = []
        kept: list[Tensor] = []
        for fn, inputs in ((compiled, leaves), (both, leaves), (both, exact)):
            with saved_tensors() as saved:
                y = fn(*inputs)
            kept += saved
            upstream = torch.linspace(-1, 1, y.numel()).view_as(y).to(BF16).to(y.dtype)
            results.append((y, *torch.autograd.grad(y, inputs, upstream)))
        sizes = {w.shape[0] * w.shape[1] for w in (*joined[0], *mlp[0])}
        assert kept
        assert not [t for t in kept if t.is_floating_point() and t.numel() in sizes]
        for mine, theirs, truth in zip(*results, strict=True):
            # compiled code does not round between two operations: each is held to the truth
            assert exceeded(mine, theirs, truth) is None


@pytest.mark.parametrize("compute", [F32, BF16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ops_keep_the_rules_of_the_library(kind, compute):
    utils, ops = ("test_schema", "test_faketensor"), torch.ops.fusewright
    lists = _linears(_mlp_sizes(8, 6, "two"), F32, F32, kind, bias=True)
    tensors, constants = projections.flat(records(*lists[:4], SCALES, lists[4]), torch.empty(0))
    tensors = [None if t is None else t.detach() for t in tensors]
    x, constants = torch.randn(7, 8), map(list, constants[:3])
    given = (tensors, *constants, compute, F32, "silu", "two")
    torch.library.opcheck(ops.mlp_block_forward.default, (x, *given), test_utils=utils)
    needed = [True, *(t is not None and i < 18 and i % 6 > 0 for i, t in enumerate(tensors))]
    torch.library.opcheck(
        ops.mlp_block_backward.default,
        (torch.randn(7, 8), x, needed, F32, *given),
        test_utils=utils,
    )
    weights = lists[0][:2]
    arguments = (
        [torch.randn(7, 6, dtype=compute), torch.randn(7, 6, dtype=compute)],
        [t for w in weights for t in w.tensors],
        *flat_weights(weights),
        False,
        None,
        [torch.randn(7, 3)],
        [torch.randn(3, 8)],
        F32,
    )
    torch.library.opcheck(ops.quant_products.default, arguments, test_utils=utils)


def test_reasons():
    x, lists = make(6, 64, dtype=BF16), _linears([(48, 64), (16, 64)], BF16, F32)
    arguments = (*lists[:4], SCALES[:2], lists[4])
    assert QKV.unsupported(x, *arguments) == []
    assert "features" in QKV.unsupported(x[:, :32], *arguments)[0]
    lists[0][1] = make(16, 64, dtype=BF16)
    assert "some are not" in QKV.unsupported(x, *arguments)[0]
    with pytest.raises(ValueError, match="some are not"):
        QKV.call(x, *arguments)
    mlp = _linears(_mlp_sizes(64, 96, "two"), BF16, F32)
    options = (*mlp[:4], SCALES, mlp[4], "silu")
    assert MLP.unsupported(x, *options) == []
    mlp[0][2] = make(64, 96, dtype=BF16)
    assert "some are not" in MLP.unsupported(x, *options)[-1]
    with pytest.raises(ValueError, match="some are not"):
        MLP.call(x, *options)
    mlp[0][0], gate = make(3, 96, 64, dtype=BF16), mlp[0][0]
    assert any("do not fit down" in r for r in MLP.unsupported(x, *options))
    mlp[0][0] = gate
    mlp[0][2] = random_weight((64, 90))
    assert any("do not fit down" in r for r in MLP.unsupported(x, *options))
