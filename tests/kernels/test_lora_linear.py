from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fusewright.kernels.linear import products
from fusewright.kernels.processor import KINDS
from fusewright.kernels.tolerance import exceeded

from .by_parts import LORA as OP
from .util import assert_parity, saved_tensors

lora_linear, reference = OP.call, OP.reference
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def operands(
    shape: tuple[int, ...],
    out: int,
    rank: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    *,
    bias: bool = False,
    own_input: torch.dtype | None = None,
    lora_bias: bool = False,
    seed: int = 0,
) -> list[Tensor | None]:
    """x, weight, bias, A, B, x_lora, lora_bias; all of them require a gradient."""
    torch.manual_seed(seed)
    inner = shape[-1]

    def make(*size: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
        return (torch.randn(*size, dtype=F64) * spread).to(dtype).requires_grad_()

    return [
        make(*shape, dtype=dtype),
        make(out, inner, dtype=dtype, spread=inner**-0.5),
        make(out, dtype=dtype) if bias else None,
        make(rank, inner, dtype=adapter, spread=inner**-0.5),
        make(out, rank, dtype=adapter, spread=0.3),
        make(*shape, dtype=own_input) if own_input else None,
        make(out, dtype=adapter) if lora_bias else None,
    ]


def parity(args: list[Tensor | None], scale: float, seed: int = 0) -> None:
    """The op against its reference over the operands that are given."""
    present = [i for i, t in enumerate(args) if t is not None]

    def over(fn):
        def call(*given: Tensor) -> Tensor:
            full: list[Tensor | None] = [None] * 7
            for i, t in zip(present, given, strict=True):
                full[i] = t
            return fn(*full[:5], scale, *full[5:])

        return call

    assert_parity(over(lora_linear), over(reference), *(args[i] for i in present), seed=seed)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(7, 16), (33, 65), (2, 5, 24), (3, 1, 2, 17)]),
    out=st.sampled_from([8, 31, 96]),
    rank=st.sampled_from([3, 4, 17]),
    dtypes=st.sampled_from([(F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)]),
    bias=st.booleans(),
    own_input=st.booleans(),
    lora_bias=st.booleans(),
    scale=st.sampled_from([1.0, 2.0, 0.37, 16 / 8**0.5]),
    seed=st.integers(0, 1000),
)
def test_parity(shape, out, rank, dtypes, bias, own_input, lora_bias, scale, seed):
    dtype, adapter = dtypes
    args = operands(
        shape, out, rank, dtype, adapter,
        bias=bias, own_input=adapter if own_input else None, lora_bias=lora_bias, seed=seed,
    )  # fmt: skip
    parity(args, scale, seed)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(1,), (1, 1), (0, 3), (2, 0, 5), (4, 7), (1, 3, 2)]),
    out=st.sampled_from([1, 2, 9]),
    rank=st.sampled_from([1, 2, 5]),
    given=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_degenerate_sizes_are_exact_in_fp64(shape, out, rank, given):
    """Sizes too small for the error budget's statistics."""
    bias, own_input, lora_bias = given
    args = operands(
        shape, out, rank, F64, F64,
        bias=bias, own_input=F64 if own_input else None, lora_bias=lora_bias,
    )  # fmt: skip
    wanted = [t for t in args if t is not None]
    results = []
    for fn in (lora_linear, reference):
        y = fn(*args[:5], 0.7, *args[5:])
        grads = torch.autograd.grad(
            y, wanted, torch.linspace(1, 2, y.numel(), dtype=F64).view_as(y)
        )
        results.append((y, *grads))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("adapter", [BF16, F32])
def test_parity_at_a_real_size(adapter):
    parity(operands((2, 150, 576), 1536, 16, BF16, adapter), 2.0)


def test_adapter_that_dominates_the_base_stays_in_the_budget():
    args = operands((64, 96), 80, 8, BF16, F32)
    args[1] = (args[1].detach() * 1e-3).requires_grad_()
    parity(args, 4.0)


def test_fp32_adapters_get_fp32_accurate_gradients():
    x, weight, _, a, b, *_ = operands((256, 96), 80, 8, BF16, F32)
    upstream = torch.randn(256, 80, dtype=F64).to(BF16)
    out = lora_linear(x, weight, None, a, b, 2.0)
    mine = torch.autograd.grad(out, (a, b), upstream)
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = torch.autograd.grad(
        reference(x.double(), weight.double(), None, *exact, 2.0), exact, upstream.double()
    )
    for got, want in zip(mine, truth, strict=True):
        assert got.dtype is F32
        assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_either_order_of_a_narrow_and_a_wide_factor(dtype, kind, choose_for):
    choose_for(kind)
    narrow, wide = torch.randn(33, 4).to(dtype), torch.randn(33, 20).to(dtype)
    truth = narrow.double().t() @ wide.double()
    found = products.gradient_of_a(wide, narrow), products.gradient_of_b(narrow, wide).t()
    for mine in found:
        assert exceeded(mine, narrow.t() @ wide, truth) is None


def test_base_in_fp32_under_a_bf16_adapter():
    parity(operands((9, 24), 31, 4, F32, BF16, bias=True, lora_bias=True), 1.5)


def test_bf16_input_of_the_adapter_under_fp32_weights():
    parity(operands((9, 24), 31, 4, BF16, F32, own_input=BF16), 1.5)


def test_non_contiguous_operands():
    args = operands((6, 10, 16), 12, 4, F32, F32)
    args[0] = torch.randn(10, 16, 6).permute(2, 0, 1).requires_grad_()
    args[1] = torch.randn(16, 12).t().requires_grad_()
    args[3] = torch.randn(4, 32)[:, ::2].requires_grad_()
    args[4] = torch.randn(4, 12).t().requires_grad_()
    parity(args, 2.0)


@pytest.mark.parametrize("make", [lambda y: y.sum(), lambda y: y.transpose(0, 1)[1].mean()])
def test_expanded_and_strided_upstream_gradients(make):
    args = operands((3, 4, 8), 6, 2, F32, F32)[:5]
    wanted = [t for t in args if t is not None]
    mine = torch.autograd.grad(make(lora_linear(*args, 2.0)), wanted)
    theirs = torch.autograd.grad(make(reference(*args, 2.0)), wanted)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_nothing_is_kept_for_gradients_that_nobody_wants():
    x, weight, _, a, b, *_ = operands((6, 16), 12, 4, F32, F32)
    for t in (weight, a, b):
        t.requires_grad_(False)
    with saved_tensors() as kept:
        lora_linear(x, weight, None, a, b, 2.0)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (weight, a, b)}


@pytest.mark.parametrize("adapter", [F32, BF16])
def test_autocast_is_that_of_the_reference(adapter):
    args = operands((6, 16), 12, 4, F32, adapter)[:5]
    wanted = [t for t in args if t is not None]
    with torch.autocast("cpu", BF16):
        mine, theirs = lora_linear(*args, 2.0), reference(*args, 2.0)
    assert mine.dtype is theirs.dtype is BF16
    upstream = torch.randn_like(mine)
    exact_args = [t if t is None else t.detach().double().requires_grad_() for t in args]
    exact = reference(*exact_args, 2.0)
    assert exceeded(mine, theirs, exact) is None
    grads = [torch.autograd.grad(y, wanted, upstream) for y in (mine, theirs)]
    leaves = [t for t in exact_args if t is not None]
    truth = torch.autograd.grad(exact, leaves, upstream.double())
    for t, a, b, c in zip(wanted, *grads, truth, strict=True):
        assert a.dtype is b.dtype is t.dtype
        # autocast computes in bf16 and widens afterwards, so bf16's unit of rounding is the slack
        assert exceeded(a.to(BF16), b.to(BF16), c) is None


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("float32_adapter", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_bias": True}])
def test_peft_layer(dtype, float32_adapter, options):
    torch.manual_seed(0)
    model = nn.ModuleDict({"proj": nn.Linear(48, 40, bias=True)}).to(dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["proj"], lora_dropout=0.3, **options)
    model = get_peft_model(model, config, autocast_adapter_dtype=float32_adapter)
    layer = model.base_model.model["proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
    nn.init.normal_(b.weight, std=0.3)
    x = torch.randn(2, 33, 48).to(dtype).requires_grad_()
    wanted = [x, a, b.weight, *([b.bias] if b.bias is not None else [])]

    def fused() -> Tensor:
        dropped = layer.lora_dropout["default"](x.to(a.dtype))
        base = layer.base_layer
        return lora_linear(
            x, base.weight, base.bias, a, b.weight, layer.scaling["default"], dropped, b.bias
        )

    upstream = torch.randn(2, 33, 40).to(dtype)
    results = []
    for call in (lambda: layer(x), fused):
        torch.manual_seed(1)  # the same dropout mask
        y = call()
        results.append((y, *torch.autograd.grad(y, wanted, upstream)))
    for theirs, mine in zip(*results, strict=True):
        assert mine.dtype is theirs.dtype
        rounding = torch.finfo(theirs.dtype).eps if theirs.dtype is BF16 else 1e-6
        assert (mine - theirs).norm() / theirs.norm() < rounding


def test_reasons():
    x, w, bias, a, b, *_ = operands((6, 16), 12, 4, BF16, F32, bias=True)
    assert OP.unsupported(x, w, bias, a, b, 2.0) == []
    assert "floating-point dtype" in " ".join(
        OP.unsupported(x, w.detach().to(torch.uint8), bias, a, b, 2.0)
    )
    assert "do not chain" in OP.unsupported(x, w, bias, a[:, :8], b, 2.0)[0]
    assert OP.unsupported(x, w, bias, a.double(), b, 2.0) == [f"A is {F64}, B is {b.dtype}"]
    assert "several devices" in OP.unsupported(x, w, bias, a.to("meta"), b, 2.0)[0]
    assert "the adapter's input is (5, 16)" in OP.unsupported(x, w, bias, a, b, 2.0, x[1:])[0]
    w.requires_grad_(False)
