"""fp32 products by oneDNN, and the ops with them and without them, whichever this machine takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels import onednn
from fusewright.kernels.linear import products
from fusewright.rewrite.tolerance import exceeded

from . import (
    test_attention,
    test_lora_linear,
    test_mlp_block,
    test_qkv_block,
    test_quantized_blocks,
)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN"
)

OPS: list[Callable[..., None]] = [
    test_attention.test_parity,
    test_lora_linear.test_parity,
    test_lora_linear.test_gradcheck,
    test_mlp_block.test_parity,
    test_qkv_block.test_parity,
    test_quantized_blocks.test_parity_of_linears,
]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with oneDNN's products, of parts as small as examples are."""
    monkeypatch.setattr(onednn, "IS_FASTER", True)
    monkeypatch.setattr(onednn, "PART", 5)
    monkeypatch.setattr(onednn, "ROWS", 3)
    monkeypatch.setattr(onednn, "LEAST", 0)


EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WIDE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def _drawn(generator: torch.Generator, shape: tuple[int, ...], form: str) -> Tensor:
    if form == "turned":
        return torch.randn(shape[::-1], generator=generator).t()
    if form == "sliced":
        return torch.randn(shape[0], 2 * shape[1], generator=generator)[:, ::2]
    return torch.randn(shape, generator=generator)


@EXAMPLES
@given(
    sizes=st.tuples(st.integers(0, 17), st.integers(0, 17), st.integers(1, 9)),
    forms=st.tuples(*[st.sampled_from(["whole", "turned", "sliced"])] * 2),
    dtype=WIDE,
    seed=st.integers(0, 99),
)
def test_products_in_parts(in_parts, sizes, forms, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    n, k, r = sizes
    wide = _drawn(generator, (n, k), forms[0]).to(dtype)
    rows, columns = _drawn(generator, (n, r), forms[1]), _drawn(generator, (k, r), forms[1])
    for found, exact in (
        (onednn.sum_over_rows(rows, wide), rows.double().t() @ wide.double()),
        (onednn.rows_times(wide, columns), wide.double() @ columns.double()),
    ):
        assert found.dtype is torch.float32
        assert found.shape == exact.shape
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "r"), [(1024, 1536, 16), (1024, 576, 48), (2048, 320, 8)])
def test_long_sums_are_as_exact_as_the_budget_asks(
    n: int, k: int, r: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(n, k, generator=generator).to(dtype)
    rows, columns = (torch.randn(m, r, generator=generator) for m in (n, k))
    exact = wide.double()
    for ours, theirs, right in (
        (onednn.sum_over_rows(rows, wide), rows.t() @ wide.float(), rows.double().t() @ exact),
        (onednn.rows_times(wide, columns), wide.float() @ columns, exact @ columns.double()),
    ):
        assert exceeded(ours, theirs, right) is None


@EXAMPLES
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    turned=st.booleans(),
    seed=st.integers(0, 99),
)
def test_batches(in_parts, sizes, turned, seed):
    batch, n, m, k = sizes
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, n, k, generator=generator)
    right = torch.randn(batch, m, k, generator=generator)
    if turned:  # heads after positions
        right = right.transpose(0, 1).contiguous().transpose(0, 1)
    out = torch.full((batch, n, m), torch.nan)
    assert onednn.transposed_products(left, right, out) is out
    assert torch.allclose(out, left @ right.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_are_multiplied_as_they_are(
    in_parts: None, dtype: torch.dtype, scale: float
) -> None:
    x, a, t = torch.randn(7, 11).to(dtype), torch.randn(11, 2), torch.randn(7, 2)
    assert products.beside(x, a) is x
    made = products.scaled_mm(x, a, scale)
    assert torch.allclose(made, x.float() @ a * scale, rtol=1e-5, atol=1e-5)
    of_a, of_b = products.gradient_of_a(x, t), products.gradient_of_b(t, x)
    for found, shape in ((of_a, (2, 11)), (of_b.t(), (2, 11))):
        assert found.shape == shape
        assert torch.allclose(found, t.t() @ x.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The factors of each product that oneDNN makes."""
    found: list[tuple[Tensor, Tensor]] = []
    known = onednn._linear

    def run(left: Tensor, right: Tensor, *args: object) -> Tensor:
        found.append((left, right))
        return known(left, right, *args)  # type: ignore[no-any-return]

    monkeypatch.setattr(onednn, "IS_FASTER", True)
    monkeypatch.setattr(onednn, "_linear", run)
    return found


def _scores(batch: int, rows: int, keys: int) -> None:
    q, k = torch.randn(batch, rows, 64), torch.randn(batch, keys, 64)
    made = onednn.transposed_products(q, k, torch.empty(batch, rows, keys))
    assert torch.allclose(made, q @ k.mT, rtol=1e-5, atol=1e-4)


def _narrow_products(rows: int, features: int) -> None:
    x, a, t = torch.randn(rows, features).bfloat16(), torch.randn(8, features), torch.randn(rows, 8)
    for found, exact in (
        (products.scaled_mm(x, a.t(), 0.5), x.float() @ a.t() * 0.5),
        (products.gradient_of_a(x, t), t.t() @ x.float()),
        (products.gradient_of_b(t, x), x.float().t() @ t),
        (products.gradient_of_a(x.float(), t), t.t() @ x.float()),
    ):
        assert torch.allclose(found, exact, rtol=1e-4, atol=1e-3)


def test_small_products_are_not_worth_a_call(calls: list[tuple[Tensor, Tensor]]) -> None:
    _scores(64, 8, 8)
    _narrow_products(1, 576)
    _narrow_products(64, 64)
    assert not calls
    _scores(1, 384, 128)
    assert len(calls) == 1
    _narrow_products(640, 640)
    assert len(calls) > 4


def test_nothing_is_made_by_onednn_where_it_is_switched_off(
    calls: list[tuple[Tensor, Tensor]],
) -> None:
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
        _scores(1, 384, 128)
        _narrow_products(640, 640)
    assert not calls


def test_no_factor_has_strides_that_onednn_is_slow_with(
    calls: list[tuple[Tensor, Tensor]],
) -> None:
    rows = torch.randn(640, 1280)[:, :640]
    onednn.sum_over_rows(torch.randn(640, 8), rows)
    onednn.rows_times(rows.bfloat16(), torch.randn(8, 640).t())
    for left, right in calls:
        assert left.is_contiguous()
        assert right.is_contiguous() or right.t().is_contiguous()
    turned = [right for _, right in calls[:2]]
    assert all(r.stride(0) == 1 for r in turned), "copied in the order in which they lie"


def test_the_copies_of_wide_rows_are_of_few_features(calls: list[tuple[Tensor, Tensor]]) -> None:
    with Largest() as found:
        onednn.rows_times(torch.randn(600, 2048).bfloat16(), torch.randn(2048, 8))
    assert found.elements <= onednn.ROWS * onednn.PART


class Largest(TorchDispatchMode):
    """The elements of the largest fp32 copy."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and made.dtype is torch.float32:
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("op", OPS, ids=[f"{f.__module__[-12:]}.{f.__name__}" for f in OPS])
def test_ops(op: Callable[..., None], faster: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the products of either kind of machine, of however small an example."""
    monkeypatch.setattr(onednn, "IS_FASTER", faster)
    monkeypatch.setattr(onednn, "LEAST", 0)
    op()
