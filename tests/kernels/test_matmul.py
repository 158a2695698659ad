"""16-bit products through fp32, and the ops with the products that this machine does not take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels import matmul
from fusewright.kernels.attention import attention
from fusewright.kernels.loss import linear_cross_entropy
from fusewright.kernels.norms import rms_norm_linear
from fusewright.kernels.processor import KINDS, processor
from fusewright.kernels.tolerance import unit

from . import (
    test_attention,
    test_head,
    test_lora_linear,
    test_mlp_block,
    test_moe_experts,
    test_qkv_block,
    test_quantized_blocks,
    test_rms_norm_linear,
)
from .by_parts import LORA
from .native import libraries
from .util import Watch

HALF = st.sampled_from([torch.bfloat16, torch.float16])
OPS = [
    test_attention.test_parity,
    test_head.test_parity_of_losses,
    test_head.test_parity_of_outputs,
    test_lora_linear.test_parity,
    test_mlp_block.test_parity,
    test_moe_experts.test_parity,
    test_qkv_block.test_parity,
    test_quantized_blocks.test_parity_of_linears,
    test_rms_norm_linear.test_parity,
]


@pytest.fixture
def without_products(monkeypatch: pytest.MonkeyPatch, choose_for: Callable[[str], None]) -> None:
    """A CPU that multiplies no 16-bit matrices, and slices of few elements; no C++ compiler."""
    libraries.use(monkeypatch, None)
    monkeypatch.setattr(matmul, "SLICE_ELEMENTS", 100)
    monkeypatch.setattr(matmul, "LEAST", 3)
    choose_for("avx2")


def _close(result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype is dtype
    error = (result.double() - exact).abs()
    # half of the last place, and what fp32 loses where the terms cancel
    assert (error <= unit(dtype) / 2 * exact.abs() + 1e-5).all(), error.max()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 40)),
    flips=st.tuples(*[st.booleans()] * 2),
    dtype=HALF,
    seed=st.integers(0, 99),
)
def test_each_is_rounded_once(without_products, sizes, flips, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, flip: bool = False) -> Tensor:
        t = torch.randn(shape[::-1] if flip else shape, generator=generator).to(dtype)
        return t.t() if flip else t

    n, k, m = sizes
    left, right = draw(n, k, flip=flips[0]), draw(k, m, flip=flips[1])
    bias, total = draw(m), draw(n, m)
    exact = left.double() @ right.double()
    _close(matmul.mm(left, right), exact, dtype)
    _close(matmul.addmm(bias, left, right), exact + bias.double(), dtype)
    _close(matmul.addmm(total, left, right), exact + total.double(), dtype)
    for out in (torch.full((n, m), torch.nan, dtype=dtype), draw(n, 2 * m)[:, ::2]):
        assert matmul.mm(left, right, out=out) is out
        _close(out, exact, dtype)
        assert matmul.addmm(bias, left, right, out=out) is out
        _close(out, exact + bias.double(), dtype)
    before = total.double()
    assert matmul.addmm_(total, left, right) is total
    _close(total, exact + before, dtype)
    x = left[None].expand(2, n, k)
    for given_bias in (None, bias):
        result = matmul.linear(x, right.t(), given_bias)
        shift = 0 if given_bias is None else bias.double()
        _close(result, (exact + shift).expand(2, n, m), dtype)
        assert not result._is_view()  # a model may write into what an op returns


def test_wide_and_foreign_tensors_are_left_to_pytorch(without_products: None) -> None:
    half = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert matmul.through_fp32(half)
    assert not matmul.through_fp32(half.float())
    assert not matmul.through_fp32(half.double())
    assert not matmul.through_fp32(half.to("meta"))


def test_operands_of_two_dtypes_are_refused_as_by_pytorch(without_products: None) -> None:
    half = torch.zeros(2, 2, dtype=torch.bfloat16)
    for call in (
        lambda: matmul.mm(half, half.float()),
        lambda: matmul.addmm(half[0], half, half.float()),
        lambda: matmul.addmm_(half.clone(), half, half.float()),
        lambda: matmul.linear(half, half.float()),
    ):
        with pytest.raises(RuntimeError, match="dtype"):
            call()


@pytest.mark.parametrize("transposed", [True, False])
def test_no_more_than_slices_are_in_fp32(without_products: None, transposed: bool) -> None:
    left, right = torch.randn(40, 20).bfloat16(), torch.randn(50, 20).bfloat16().t()
    made: list[Tensor] = []
    with Watch(lambda op, args, outs: made.extend(outs)):
        matmul.mm(left, right if transposed else right.contiguous())
    sizes = [t.numel() for t in made if t.dtype is torch.float32]
    assert 0 < max(sizes) <= 150  # three rows, at the least, of fifty columns


@pytest.mark.parametrize("autocast", [False, True])
def test_no_op_multiplies_in_16_bits(
    without_products: None, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither forward nor backward, and inside autocast no operand is cast back."""
    seen: list[tuple[torch.dtype, bool]] = []

    def watching(real: Any, at: int) -> Any:
        def call(*args: Any, **out: Any) -> Any:
            seen.append((args[at].dtype, torch.is_autocast_enabled("cpu")))
            return real(*args, **out)

        return call

    for name, at in (("mm", 0), ("addmm", 1), ("bmm", 0), ("baddbmm", 1)):
        monkeypatch.setattr(torch, name, watching(getattr(torch, name), at))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).mul_(0.1).bfloat16().requires_grad_()

    x, w, a, b = draw(2, 5, 16), draw(24, 16), draw(4, 16), draw(24, 4)
    labels, heads = torch.randint(24, (2, 5)), draw(1, 2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outs = [
            LORA.call(x, w, None, a, b, 2.0),
            *rms_norm_linear.rms_norm_linear(x, draw(16), 1e-6, 0.0, "inner", [w], [None]),
            linear_cross_entropy.linear_cross_entropy(x, w, None, labels),
            attention.attention(heads, heads, heads, None, True),
        ]
        before = len(seen)
        sum(o.float().sum() for o in outs).backward()
    assert before > 5
    assert len(seen) > before + 10
    assert set(seen) == {(torch.float32, False)}


@pytest.mark.parametrize("parity", OPS, ids=lambda f: f"{f.__module__}.{f.__name__}")
@pytest.mark.parametrize("kind", ["avx2", "avx512_bf16", "amx"])  # avx512 has the same products
def test_ops_on_other_processors(
    parity: Callable[[], None], kind: str, choose_for: Callable[[str], None]
) -> None:
    """Each op's own test takes the products of this machine; here it takes those of others."""
    here, other = processor(), KINDS[kind]
    if (here.slow_products, here.amx) == (other.slow_products, other.amx):
        pytest.skip("this machine has the same products: the op's own test takes them")
    choose_for(kind)
    parity()
