"""The gated MLP as one op: parity, gradients, layouts, tiles, what is kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fusewright.kernels.linear import projections
from fusewright.kernels.mlp import mlp_block as module
from fusewright.kernels.mlp.glu import ACTIVATIONS, glu, glu_packed
from fusewright.kernels.mlp.mlp_block import KEEPS, LAYOUTS
from fusewright.kernels.tolerance import exceeded

from .by_parts import LORA, records
from .by_parts import MLP as OP
from .test_qkv_block import Given, make, operands, present
from .util import Watch, assert_parity_of_draws, saved_tensors

lora_linear, mlp_block, reference = LORA.call, OP.call, OP.reference
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def mlp(
    inner: int,
    wide: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    *,
    layout: str = "two",
    ranks: tuple[int, ...] = (3, 3, 3),
    **more: bool,
) -> Given:
    """The lists of gate, up, down, or of gate and up, down."""
    outs = [wide, wide] if layout == "two" else [2 * wide]
    ins = operands(inner, outs, dtype, adapter, ranks=list(ranks[: len(outs)]), **more)
    down = operands(wide, [inner], dtype, adapter, ranks=[ranks[-1]], **more)
    return [a + b for a, b in zip(ins, down, strict=True)]


def over(fn: Callable[..., Tensor], lists: Given, *options: str) -> Callable[..., Tensor]:
    """``fn`` as a function of x and of the tensors that are there."""
    places = [(i, j) for i, v in enumerate(lists) for j, t in enumerate(v) if t is not None]
    scales = [2.0, 0.37, 1.0][: len(lists[0])]

    def call(x: Tensor, *given: Tensor) -> Tensor:
        full: Given = [[None] * len(v) for v in lists]
        for (i, j), t in zip(places, given, strict=True):
            full[i][j] = t
        return fn(x, *full[:4], scales, full[4], *options)

    return call


def _separate_ops(
    x: Tensor, weights, biases, lora_as, lora_bs, scales, lora_biases, activation, layout
) -> Tensor:
    """What the block replaces: a linear or ``lora_linear`` each, and ``glu``."""

    def one(x: Tensor, w, bias, a, b, scale: float, lora_bias) -> Tensor:
        if a is None:
            return F.linear(x, w, bias)
        return lora_linear(x, w, bias, a, b, scale, None, lora_bias)

    *ins, down = zip(weights, biases, lora_as, lora_bs, scales, lora_biases, strict=True)
    outs = [one(x, *arguments) for arguments in ins]
    if layout == "two":
        return one(glu(*outs, activation), *down)
    return one(glu_packed(*outs, activation, layout == "gate first"), *down)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    # the largest error of a few elements is a matter of luck; small sizes are exact in fp64 below
    shape=st.sampled_from([(97, 16), (33, 65), (2, 25, 24), (3, 1, 32, 17)]),
    wide=st.sampled_from([31, 48, 95]),
    ranks=st.sampled_from([(3, 5, 4), (4, 0, 4), (0, 0, 0), (2, 2, 0), (0, 0, 3)]),
    dtypes=st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]),
    bias=st.booleans(),
    lora_bias=st.booleans(),
    frozen=st.booleans(),
    need_x=st.booleans(),
    activation=st.sampled_from(tuple(ACTIVATIONS)),
    layout=st.sampled_from(LAYOUTS),
    keep=st.sampled_from(KEEPS),
)
def test_parity(
    shape, wide, ranks, dtypes, bias, lora_bias, frozen, need_x, activation, layout, keep
):
    """Against the definition; where adapters are wider than the base, against the single ops.

    There a gradient is in fp32 and as exact as the bf16 values that it is made of, so that its
    largest error is that of single values, by luck. The single ops are held to the budget in
    their own tests.
    """
    dtype, adapter = dtypes
    definition = reference if dtype is adapter else _separate_ops

    def draw() -> list[Tensor]:
        lists = mlp(
            shape[-1], wide, dtype, adapter,
            layout=layout, ranks=ranks, bias=bias, lora_bias=lora_bias,
        )  # fmt: skip
        for t in lists[0] + lists[1] if frozen else ():
            if t is not None:
                t.requires_grad_(False)
        draw.lists = lists
        return [make(*shape, dtype=dtype).requires_grad_(need_x), *present(lists)]

    torch.manual_seed(0)
    draw()
    assert_parity_of_draws(
        over(mlp_block, draw.lists, activation, layout, keep),
        over(definition, draw.lists, activation, layout),
        draw,
    )


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, BF16), (BF16, F32), (F32, F32)])
def test_parity_at_a_real_size(dtype, adapter, keep, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 1 << 19)  # several tiles, the last smaller

    def draw() -> list[Tensor]:
        draw.lists = mlp(576, 1536, dtype, adapter, ranks=(16, 16, 16))
        for t in draw.lists[0]:
            t.requires_grad_(False)
        return [make(2, 150, 576, dtype=dtype), *present(draw.lists)]

    draw()
    assert_parity_of_draws(
        over(mlp_block, draw.lists, "silu", "two", keep), over(reference, draw.lists, "silu"), draw
    )


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129, 200])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_every_size_add_up(rows, layout, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 1)  # tiles of 64 rows at most
    lists = mlp(6, 5, F64, F64, layout=layout, bias=True, lora_bias=True)
    leaves = [make(rows, 6, dtype=F64), *present(lists)]
    upstream = torch.randn(rows, 6, dtype=F64)
    results = []
    for fn in (
        over(mlp_block, lists, "gelu", layout, "input"), over(reference, lists, "gelu", layout)
    ):  # fmt: skip
        y = fn(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, upstream)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", KEEPS)
def test_trained_weights_over_many_tiles_stay_in_the_budget(keep, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 1)

    def draw() -> list[Tensor]:
        draw.lists = mlp(48, 40, BF16, BF16, ranks=(0, 0, 0), bias=True)
        return [make(1000, 48, dtype=BF16), *present(draw.lists)]

    draw()
    assert_parity_of_draws(
        over(mlp_block, draw.lists, "silu", "two", keep), over(reference, draw.lists, "silu"), draw
    )


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_choice_of_gradients(keep, layout):
    """Each tensor alone, and all but each."""
    lists = mlp(4, 3, F64, F64, layout=layout, bias=True)
    leaves = [make(5, 4, dtype=F64), *present(lists)]
    upstream = torch.randn(5, 4, dtype=F64)
    for chosen, others in itertools.product(range(len(leaves)), (False, True)):
        for i, t in enumerate(leaves):
            t.requires_grad_((i == chosen) != others)
        wanted = [t for t in leaves if t.requires_grad]
        mine, theirs = (
            torch.autograd.grad(fn(*leaves), wanted, upstream)
            for fn in (
                over(mlp_block, lists, "silu", layout, keep),
                over(reference, lists, "silu", layout),
            )
        )
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("keep", KEEPS)
def test_non_contiguous_operands(keep):
    def draw() -> list[Tensor]:
        lists = mlp(16, 12, F32, F32)
        lists[0][0] = (torch.randn(16, 12) / 4).t().requires_grad_()
        lists[2][0] = (torch.randn(3, 32) / 4)[:, ::2].requires_grad_()
        lists[3][2] = torch.randn(3, 16).t().requires_grad_()
        draw.lists = lists
        return [torch.randn(10, 16, 6).permute(2, 0, 1).requires_grad_(), *present(lists)]

    draw()
    assert_parity_of_draws(
        over(mlp_block, draw.lists, "silu", "two", keep), over(reference, draw.lists, "silu"), draw
    )


def _kept(call: Callable[[], Tensor], own: list[Tensor]) -> int:
    with saved_tensors() as saved:
        call()
    found = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}
    mine = {t.data_ptr() for t in own}
    return sum(size for pointer, size in found.items() if pointer not in mine)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_kept(layout):
    lists = mlp(32, 40, BF16, F32, layout=layout)
    x, leaves = make(9, 32, dtype=BF16), present(lists)
    scales = [2.0] * len(lists[0])
    sizes = {}
    for keep in KEEPS:
        call = over(mlp_block, lists, "silu", layout, keep)
        sizes[keep] = _kept(lambda call=call: call(x, *leaves), leaves)
    assert sizes["input"] == x.nbytes
    narrow = 9 * 3 * 4 * len(scales)
    assert sizes["gate_up"] == x.nbytes + 2 * 9 * 40 * 2 + narrow


def test_nothing_of_tokens_times_intermediate_exists(monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 1)
    lists, rows, wide = mlp(8, 80, F32, F32, ranks=(2, 2, 2)), 1000, 80
    for t in lists[0]:
        t.requires_grad_(False)
    tensors, _ = projections.flat(records(*lists[:4], [1.0] * 3, lists[4]), torch.empty(0))
    x, grad = torch.randn(rows, 8), torch.randn(rows, 8)
    options = (tensors, [1.0] * 3, [], [], None, None, "silu", "two")
    sizes: list[int] = []
    with torch.no_grad(), Watch(lambda op, args, outs: sizes.extend(t.numel() for t in outs)):
        module._tiled_forward(x, *options)
        needed = [True, *(t is not None and t.requires_grad for t in tensors)]
        module._tiled_backward(grad, x, needed, F32, *options)
    assert max(sizes) < rows * wide // 4


@pytest.mark.parametrize("keep", KEEPS)
def test_autocast_is_that_of_the_reference(keep):
    lists = mlp(32, 48, F32, F32, bias=True)
    wanted = [make(9, 32, dtype=F32), *present(lists)]
    calls = (over(mlp_block, lists, "silu", "two", keep), over(reference, lists, "silu"))
    with torch.autocast("cpu", BF16):
        mine, theirs = (call(*wanted) for call in calls)
    leaves = [t.detach().double().requires_grad_() for t in wanted]
    exact = calls[1](*leaves)
    assert mine.dtype is theirs.dtype is BF16
    assert exceeded(mine, theirs, exact) is None
    upstream = torch.randn_like(mine)
    grads = [torch.autograd.grad(y, wanted, upstream) for y in (mine, theirs)]
    truth = torch.autograd.grad(exact, leaves, upstream.double())
    for t, a, b, c in zip(wanted, *grads, truth, strict=True):
        assert a.dtype is b.dtype is t.dtype
        # autocast computes in bf16 and widens afterwards, so bf16's unit of rounding is the slack
        assert exceeded(a.to(BF16), b.to(BF16), c) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["avx512_bf16", "amx"])
def test_the_tiled_ops_keep_the_rules_of_the_library(layout, kind, choose_for):
    choose_for(kind)
    lists = mlp(6, 5, F32, F32, layout=layout, bias=True)
    x, scales = torch.randn(7, 6), [1.0] * len(lists[0])
    tensors, _ = projections.flat(records(*lists[:4], scales, lists[4]), x)
    tensors = [None if t is None else t.detach() for t in tensors]
    ops = torch.ops.fusewright
    options = (tensors, scales, [], [], None, None, "silu", layout)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.mlp_block_forward.default, (x, *options), test_utils=utils)
    needed = [True, *(t is not None for t in tensors)]
    torch.library.opcheck(
        ops.mlp_block_backward.default,
        (torch.randn(7, 6), x, needed, F32, *options),
        test_utils=utils,
    )


def test_reasons():
    lists, x = mlp(16, 12, BF16, F32), make(6, 16, dtype=BF16)

    def reasons(*options: str) -> list[str]:
        return OP.unsupported(x, *lists[:4], [1.0] * 3, lists[4], *options)

    assert reasons("silu") == []
    assert "'swish' is not one of" in reasons("swish")[0]
    assert "3 linears for the layout" in reasons("silu", "gate first")[0]
    lists[0][1] = make(14, 16, dtype=BF16)
    assert any("do not fit down" in r for r in reasons("silu"))
    with pytest.raises(ValueError, match="swish"):
        mlp_block(x, *lists[:4], [1.0] * 3, lists[4], "swish")


def test_adapters_that_read_another_input_are_refused() -> None:
    x = torch.randn(6, 16)
    up, down = (projections.Linear(torch.randn(*size), None) for size in ((12, 16), (16, 12)))
    a, b = torch.randn(4, 16), torch.randn(12, 4)
    gate = up._replace(lora_a=a, lora_b=b)
    assert module.unsupported(x, [gate, up, down], "silu") == []
    other = gate._replace(x_lora=torch.randn(6, 16))
    reasons = module.unsupported(x, [other, up, down], "silu")
    assert reasons == ["an adapter reads another input than its layer"]
