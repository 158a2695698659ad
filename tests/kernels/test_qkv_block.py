"""Several linears on one input: parity, gradients, layouts, what is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.linear import linear
from fusewright.kernels.linear.linear import KEEPS, Linear
from fusewright.kernels.tolerance import exceeded

from .by_parts import QKV as OP
from .util import assert_parity_of_draws, saved_tensors

qkv_block, reference = OP.call, OP.reference
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
Given = list[list[Tensor | None]]


def make(
    *size: int, dtype: torch.dtype, spread: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    values = torch.randn(*size, dtype=F64, generator=generator) * spread
    return values.to(dtype).requires_grad_()


def operands(
    inner: int,
    outs: list[int],
    dtype: torch.dtype,
    adapter: torch.dtype,
    *,
    ranks: list[int],
    bias: bool = False,
    lora_bias: bool = False,
) -> Given:
    """Weights, biases, A's, B's and their biases of linears; a rank of 0 means no adapter."""
    lists: Given = [[], [], [], [], []]
    for out, rank in zip(outs, ranks, strict=True):
        lists[0].append(make(out, inner, dtype=dtype, spread=inner**-0.5))
        lists[1].append(make(out, dtype=dtype) if bias else None)
        lists[2].append(make(rank, inner, dtype=adapter, spread=inner**-0.5) if rank else None)
        lists[3].append(make(out, rank, dtype=adapter, spread=0.3) if rank else None)
        lists[4].append(make(out, dtype=adapter) if rank and lora_bias else None)
    return lists


def over(fn: Callable[..., object], lists: Given, scales: list[float]) -> Callable[..., object]:
    """``fn`` as a function of x and of the tensors that are there."""
    places = [(i, j) for i, v in enumerate(lists) for j, t in enumerate(v) if t is not None]

    def call(x: Tensor, *given: Tensor) -> object:
        full: Given = [[None] * len(v) for v in lists]
        for (i, j), t in zip(places, given, strict=True):
            full[i][j] = t
        return fn(x, *full[:4], scales, full[4])

    return call


def present(lists: Given) -> list[Tensor]:
    return [t for v in lists for t in v if t is not None]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(7, 16), (33, 65), (2, 5, 24), (3, 1, 2, 17)]),
    outs=st.sampled_from([[8, 31], [12, 4, 4], [7, 7, 7, 9]]),
    ranks=st.sampled_from([[3, 5, 3, 2], [4, 0, 4, 0], [0, 0, 0, 0], [2, 2, 2, 2]]),
    dtypes=st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]),
    bias=st.booleans(),
    lora_bias=st.booleans(),
    frozen=st.booleans(),
    need_x=st.booleans(),
    keep=st.sampled_from(KEEPS),
)
def test_parity(shape, outs, ranks, dtypes, bias, lora_bias, frozen, need_x, keep):
    dtype, adapter = dtypes
    ranks, scales = ranks[: len(outs)], [1.0, 2.0, 0.37, 4.0][: len(outs)]

    def draw() -> list[Tensor]:
        lists = operands(
            shape[-1], outs, dtype, adapter, ranks=ranks, bias=bias, lora_bias=lora_bias
        )
        for t in lists[0] + lists[1] if frozen else ():
            if t is not None:
                t.requires_grad_(False)
        draw.lists = lists
        return [make(*shape, dtype=dtype).requires_grad_(need_x), *present(lists)]

    torch.manual_seed(0)
    draw()
    ours = over(lambda *a: qkv_block(*a, keep=keep), draw.lists, scales)
    assert_parity_of_draws(ours, over(reference, draw.lists, scales), draw)


@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (BF16, F32), (F32, F32)])
def test_parity_at_a_real_size(dtype, adapter):
    def draw() -> list[Tensor]:
        draw.lists = operands(576, [576, 192, 192], dtype, adapter, ranks=[16, 16, 16])
        return [make(2, 150, 576, dtype=dtype), *present(draw.lists)]

    draw()
    assert_parity_of_draws(
        over(qkv_block, draw.lists, [2.0] * 3), over(reference, draw.lists, [2.0] * 3), draw
    )


def test_non_contiguous_operands():
    lists = operands(16, [12, 8], F32, F32, ranks=[4, 4])
    lists[0][0] = torch.randn(16, 12).t().requires_grad_()
    lists[2][0] = torch.randn(4, 32)[:, ::2].requires_grad_()
    lists[3][1] = torch.randn(4, 8).t().requires_grad_()
    x = torch.randn(10, 16, 6).permute(2, 0, 1).requires_grad_()
    assert_parity_of_draws(
        over(qkv_block, lists, [2.0, 2.0]),
        over(reference, lists, [2.0, 2.0]),
        lambda: [x, *present(lists)],
    )


def test_the_input_is_kept_once_and_only_for_wanted_gradients():
    lists = operands(32, [12, 4, 4], F32, F32, ranks=[4, 4, 4])
    x = make(9, 32, dtype=F32)

    def kept(keep: str) -> int:
        with saved_tensors() as saved:
            over(lambda *a: qkv_block(*a, keep=keep), lists, [2.0] * 3)(x, *present(lists))
        found = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}
        own = {t.data_ptr() for t in present(lists)}
        return sum(size for pointer, size in found.items() if pointer not in own)

    assert kept("all") == x.nbytes + 3 * 9 * 4 * 4
    assert kept("input") == x.nbytes
    for t in lists[0] + lists[2]:
        t.requires_grad_(False)
    assert kept("all") == 3 * 9 * 4 * 4


def test_a_bias_may_change_before_backward():
    """It is not kept: no gradient depends on it."""
    lists = operands(6, [4, 3], F32, F32, ranks=[2, 0], bias=True, lora_bias=True)
    x = make(5, 6, dtype=F32)
    outs = over(qkv_block, lists, [1.0, 1.0])(x, *present(lists))
    with torch.no_grad():
        lists[1][1].add_(1)
    (grad,) = torch.autograd.grad(outs[1].sum(), lists[1][1])
    assert torch.equal(grad, torch.full((3,), 5.0))


def test_outputs_without_a_gradient_have_none():
    lists = operands(6, [4, 3], F32, F32, ranks=[2, 0])
    lists[0][0].requires_grad_(False)
    lists[0][1].requires_grad_(False)
    x = torch.randn(5, 6)
    first, second = over(qkv_block, lists, [1.0, 1.0])(x, *present(lists))
    assert first.requires_grad
    assert not second.requires_grad


@pytest.mark.parametrize("adapter", [F32, BF16])
def test_autocast_is_that_of_the_reference(adapter):
    lists = operands(32, [24, 16], F32, adapter, ranks=[4, 4], bias=True)
    x = make(9, 32, dtype=F32)
    wanted = [x, *present(lists)]
    with torch.autocast("cpu", BF16):
        mine, theirs = (over(f, lists, [2.0, 1.0])(*wanted) for f in (qkv_block, reference))
    exact_leaves = [t.detach().double().requires_grad_() for t in wanted]
    exact = over(reference, lists, [2.0, 1.0])(*exact_leaves)
    upstream = [torch.randn_like(o) for o in mine]
    grads = [torch.autograd.grad(outs, wanted, upstream) for outs in (mine, theirs)]
    truth = torch.autograd.grad(exact, exact_leaves, [u.double() for u in upstream])
    for a, b, c in zip(mine, theirs, exact, strict=True):
        assert exceeded(a, b, c) is None
    for t, a, b, c in zip(wanted, *grads, truth, strict=True):
        assert a.dtype is b.dtype is t.dtype
        # autocast computes in bf16 and widens afterwards, so bf16's unit of rounding is the slack
        assert exceeded(a.to(BF16), b.to(BF16), c) is None


def test_reasons():
    lists = operands(16, [12, 8], BF16, F32, ranks=[4, 0])
    x = make(6, 16, dtype=BF16)
    assert OP.unsupported(x, *lists[:4], [1.0, 1.0], lists[4]) == []
    lists[3][0] = None
    assert "a part of the adapter" in OP.unsupported(x, *lists[:4], [1.0, 1.0], lists[4])[0]
    lists[0][1] = lists[0][1].detach().to(torch.uint8)
    assert "linear 1: an operand is not" in OP.unsupported(x, *lists[:4], [1.0, 1.0], lists[4])[-1]
    with pytest.raises(ValueError, match="keep"):
        qkv_block(x, *lists[:4], [1.0, 1.0], lists[4], keep="nothing")


@pytest.mark.parametrize("frozen_a", [False, True])
@pytest.mark.parametrize("own", [(True, True), (True, False)])
def test_adapters_with_other_inputs_get_the_same_gradients_from_less(
    own: tuple[bool, ...], frozen_a: bool
) -> None:
    torch.manual_seed(0)
    x, zs = torch.randn(6, 16, dtype=F64), [torch.randn(6, 16, dtype=F64) for _ in own]
    parts = [
        (torch.randn(8, 16, dtype=F64), torch.randn(4, 16, dtype=F64), torch.randn(8, 4, dtype=F64))
        for _ in own
    ]
    results = []
    for keep in ("reference", *KEEPS):
        leaves = [t.clone().requires_grad_() for t in (x, *zs, *(t for p in parts for t in p[1:]))]
        inputs, adapters = leaves[1 : 1 + len(own)], leaves[1 + len(own) :]
        for a in adapters[::2]:
            a.requires_grad_(not frozen_a)
        layers = [
            Linear(w, None, *adapters[2 * i : 2 * i + 2], 2.0, x_lora=z if is_own else None)
            for i, ((w, *_), z, is_own) in enumerate(zip(parts, inputs, own, strict=True))
        ]
        if keep == "reference":
            outs = [linear.reference(leaves[0], layer) for layer in layers]
        else:
            assert linear.qkv_block_unsupported(leaves[0], layers, keep) == []
            outs = list(linear.qkv_block(leaves[0], layers, keep))
        sum(out.sin().sum() for out in outs).backward()
        results.append([t.grad for t in leaves])
    for other in results[1:]:
        assert [g is None for g in other] == [g is None for g in results[0]]
        for a, b in zip(results[0], other, strict=True):
            if a is not None:
                torch.testing.assert_close(b, a)
