"""The routed experts: parity, gradients, uneven routings, layouts, tracing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.linear.quantized import FORMATS, example_of_quantized
from fusewright.kernels.mlp.glu import glu_packed
from fusewright.kernels.moe import moe_experts as ops
from fusewright.kernels.moe.moe_experts import (
    OP,
    Update,
    inverse_permutation,
    moe_experts,
    moe_route,
)
from fusewright.kernels.moe.packed_experts import PackedExperts
from fusewright.kernels.op import Maker
from fusewright.kernels.processor import KINDS, assume
from fusewright.kernels.tolerance import exceeded

from .util import assert_parity, assert_parity_of_draws, saved_tensors

ROUTINGS = ("spread", "some idle", "one expert")


def _routing(kind: str, tokens: int, experts: int, active: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "one expert":  # a token may even name it twice
        return torch.full((tokens, active), experts - 1)
    used = experts if kind == "spread" else max(active, experts // 2)
    rows = [torch.randperm(used, generator=generator)[:active] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.zeros(0, active, dtype=torch.int64)


def _randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _silu(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def _calls(index: Tensor, turned: bool, gated: bool) -> list[Callable[..., Tensor]]:
    """The op and its reference as functions of tensors alone; ``turned``: weights (E, out, in)."""

    def call(op: Any, fast: bool) -> Callable[..., Tensor]:
        act = (lambda u: glu_packed(u, "silu") if fast else _silu(u)) if gated else torch.tanh

        def run(x: Tensor, w: Tensor, up: Tensor, down: Tensor, *more: Tensor) -> Tensor:
            pair = (up.mT, down.mT) if turned else (up, down)
            biases = more[:2] if len(more) in (2, 6) else (None, None)
            a, b, c, d = more[-4:] if len(more) > 2 else (None,) * 4
            updates = (None, None)
            if a is not None and b is not None and c is not None and d is not None:
                # as PEFT stores them: (E, r, in) and (out, r, E)
                updates = Update(a.mT, b.permute(2, 1, 0), 0.7), Update(c.mT, d.permute(2, 1, 0), 2)
            result: Tensor = op(x, index, w, *pair, act, *biases, *updates)
            return result

        return run

    return [call(moe_experts, True), call(OP.reference, False)]


def _inputs(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    weights: torch.dtype,
    turned: bool,
    gated: bool,
    biased: bool,
    needs: tuple[bool, ...],
    seed: int,
    rank: int = 0,
) -> list[Tensor]:
    tokens, hidden, inner, experts, active = shape
    wide = inner * (1 + gated)
    up, down = (experts, hidden, wide), (experts, inner, hidden)
    if turned:
        up, down = (experts, wide, hidden), (experts, hidden, inner)
    made = [
        _randn(seed, tokens, hidden, dtype=dtype),
        _randn(seed + 1, tokens, active, dtype=weights).abs(),
        _randn(seed + 2, *up, dtype=dtype) / hidden**0.5,
        _randn(seed + 3, *down, dtype=dtype) / inner**0.5,
    ]
    if biased:
        made += [_randn(seed + 4, experts, wide, dtype=dtype)]
        made += [_randn(seed + 5, experts, hidden, dtype=dtype)]
    needed = [*needs, *needs[2:4]][: len(made)]
    if rank:
        sizes = ((experts, rank, hidden), (wide, rank, experts), (experts, rank, inner),
                 (hidden, rank, experts))  # fmt: skip
        made += [_randn(seed + 6 + i, *s, dtype=dtype) / s[2 - i % 2] ** 0.5
                 for i, s in enumerate(sizes)]  # fmt: skip
        needed += needs[4:] or (True,) * 4
    return [t.requires_grad_(need) for t, need in zip(made, needed, strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(((40, 32, 24, 6, 2), (64, 16, 33, 5, 3), (33, 48, 16, 9, 4),
                           (48, 24, 40, 4, 1))),
    dtypes=st.sampled_from(((torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                            (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16))),
    kind=st.sampled_from(ROUTINGS),
    turned=st.booleans(),
    gated=st.booleans(),
    biased=st.booleans(),
    needs=st.sampled_from(((True,) * 4, (True, True, False, False), (False, True, True, False),
                           (False, False, False, True), (True, False, False, False),
                           (False, False, False, False, True, False, True, True),
                           (True, True, False, False, False, True, True, False))),
    rank=st.sampled_from((0, 1, 5)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_parity(
    shape: tuple[int, int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    kind: str,
    turned: bool,
    gated: bool,
    biased: bool,
    needs: tuple[bool, ...],
    rank: int,
    seed: int,
) -> None:
    if not rank and not any(needs[:4]):
        return
    seeds = itertools.count(seed, 10)
    index = _routing(kind, shape[0], shape[3], shape[4], seed)
    assert_parity_of_draws(
        *_calls(index, turned, gated),
        lambda: _inputs(shape, *dtypes, turned, gated, biased, needs, next(seeds), rank),
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("counts", [(17, 0, 30, 1, 25), (40, 3, 0, 0, 19), (0, 0, 21, 0, 0)])
@pytest.mark.parametrize("nowhere", [0, 5])
def test_rows_computed_beyond_an_expert_are_not_seen(
    counts: tuple[int, ...], nowhere: int, biased: bool
) -> None:
    total = sum(counts)
    a, weight = _randn(0, total + nowhere, 24).bfloat16(), _randn(1, 5, 24, 16).bfloat16()
    bias = _randn(2, 5, 16).bfloat16() if biased else None
    a[:1] = torch.inf  # what its own expert makes of it, and nobody else
    ends = torch.tensor(counts).cumsum(0).int()
    ours = ops.grouped_mm(a, None, weight, ends, bias)
    assert ours.shape == (total + nowhere, 16)
    assert not ours[total:].any()
    assert not ours[0].isfinite().any()
    eager, exact = (
        torch.cat([
            part.to(dtype) @ weight[e].to(dtype) + (0 if bias is None else bias[e].to(dtype))
            for e, part in enumerate(a[:total].split(counts))
        ])[1:]
        for dtype in (torch.bfloat16, torch.float64)
    )  # fmt: skip
    assert exceeded(ours[1:total], eager, exact) is None


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
def test_a_product_far_smaller_than_its_bias_is_rounded_once(rows: int) -> None:
    a, weight = _randn(0, rows, 128).float(), _randn(1, 1, 128, 64).float() * 1e-3
    bias = _randn(2, 1, 64).float()
    ours = ops.grouped_mm(a, None, weight, torch.tensor([rows], dtype=torch.int32), bias)
    eager, exact = (
        a.to(dtype) @ weight[0].to(dtype) + bias[0].to(dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert exceeded(ours, eager, exact) is None


def test_large_gradients_are_whole() -> None:
    a, b, like = _randn(0, 40, 256).float(), _randn(1, 40, 512).float(), torch.empty(20, 512, 256)
    assert like.nbytes >= ops._LARGE
    ends = torch.arange(2, 42, 2, dtype=torch.int32)
    for layout, turned in ((like.mT, True), (like.mT.contiguous(), False)):
        ours = ops.grouped_outer(a, None, b, ends, layout)
        assert ours.stride() == layout.stride()
        assert ours.mT.is_contiguous() is turned
        torch.testing.assert_close(ours, torch.bmm(a.view(20, 2, 256).mT, b.view(20, 2, 512)))


def test_frozen_experts_keep_no_rows_for_their_gradients() -> None:
    needs = (True, True, False, False)
    inputs = _inputs((40, 32, 24, 6, 2), torch.float32, torch.float32, True, False, False, needs, 0)
    run, _ = _calls(_routing("spread", 40, 6, 2, 0), True, False)
    with saved_tensors() as kept:
        run(*inputs)
    rows = [t.shape for t in kept if t.is_floating_point() and t.dim() == 2]
    assert rows.count((80, 24)) == 1  # tanh keeps its own result
    assert (40, 32) not in rows
    assert (80, 32) in rows  # for the gradient of the routing weights


@pytest.mark.parametrize("kind", ["avx512", "avx512_bf16"])
def test_adapters_on_other_processors(kind: str) -> None:
    """Through fp32 where 16-bit products are slow, and not: equal to the sum of the stacks."""
    needs, index = (True, True, False, False), _routing("some idle", 64, 6, 2, 0)
    seeds = itertools.count(0, 20)
    with assume(KINDS[kind]):
        assert_parity_of_draws(
            *_calls(index, True, True),
            lambda: _inputs((64, 48, 24, 6, 2), torch.bfloat16, torch.float32, True, True, True,
                            needs, next(seeds), 4),
        )  # fmt: skip


def test_adapters_keep_thin_rows_alone() -> None:
    """Neither a sum of weights, nor the rows of the second product, nor gathered ones."""
    needs, index = (True, True, False, False), _routing("spread", 40, 6, 2, 0)
    shape, dtype = (40, 32, 24, 6, 2), torch.float32
    inputs = _inputs(shape, dtype, dtype, True, True, False, needs, 0, 4)
    run, _ = _calls(index, True, True)
    with saved_tensors() as kept:
        run(*inputs)
    given = {t.untyped_storage().data_ptr() for t in inputs}
    rows = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    shapes = [tuple(t.shape) for t in rows if t.is_floating_point() and t.dim() > 1]
    factors = {(6, 4, 48), (6, 4, 32)}  # copies of the two B's, which are stored apart
    assert set(shapes) == {(80, 4), (80, 48), (80, 24), *factors}, shapes


def test_a_trained_weight_gets_its_gradient_in_its_own_layout() -> None:
    up = _randn(0, 6, 48, 32).float().requires_grad_()
    x, index = _randn(1, 40, 32).float(), _routing("spread", 40, 6, 2, 0)
    weights, down = _randn(2, 40, 2).float(), _randn(3, 6, 48, 32).float()
    moe_experts(x, index, weights, up.mT, down, torch.tanh).sum().backward()
    assert up.grad is not None
    assert up.grad.is_contiguous()


def test_routing() -> None:
    order, where, offsets = moe_route(torch.tensor([2, 0, 2, 1, 0, 4]), 6)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert where.tolist() == [3, 0, 4, 2, 1, 5]
    assert offsets.tolist() == [2, 3, 5, 5, 6, 6]
    assert torch.equal(inverse_permutation(order), where)


def test_pairs_without_an_expert_here_add_nothing() -> None:
    shape, every = (24, 16, 12, 5, 2), (True,) * 4
    inputs = _inputs(shape, torch.float32, torch.float32, True, True, True, every, 0)
    index = _routing("spread", 24, 5, 2, 0)
    absent = index == 4
    ours, reference = _calls(index, True, True)[0], _calls(index.clone(), True, True)[1]
    index[absent] = 7
    x, w, *rest = inputs

    def without(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return reference(x, w.masked_fill(absent, 0), *rest)

    assert_parity(ours, without, x, w, *rest)


def test_reasons() -> None:
    x, index, w = torch.empty(8, 4), torch.zeros(8, 2, dtype=torch.int64), torch.empty(8, 2)
    up, down = torch.empty(3, 4, 10), torch.empty(3, 5, 4)
    assert OP.unsupported(x, index, w, up, down, _silu) == []
    assert OP.unsupported(x.bfloat16(), index, w, up, down, _silu)
    assert OP.unsupported(x[:, :3], index, w, up, down, _silu)


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("lora", [False, True])
def test_packed_experts(kind: str, lora: bool) -> None:
    """Values and gradients are those of the same numbers in plain tensors, in every bit."""
    m = Maker(torch.float32, train=False, generator=torch.Generator().manual_seed(0))
    x, index, w, up, down, act, *rest = OP.variants["lora"](m) if lora else OP.example(m)

    def pack(stack: Tensor) -> PackedExperts:  # (E, in, out), from matrices (out, in)
        parts = [example_of_quantized(m, *stack[0].mT.shape, kind) for _ in stack]
        return PackedExperts.stack(parts, torch.float32).mT  # type: ignore[return-value]

    packed = [pack(up.detach()), pack(down.detach())]
    factors = [f.requires_grad_() for update in rest if update for f in update[:2]]
    results = []
    for weights in (packed, [p.unpacked() for p in packed]):
        out = moe_experts(x, index, w, *weights, act, *rest)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, w, *factors))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
