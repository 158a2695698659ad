"""Products of wide matrices in bf16 with narrow ones in fp32, in C++."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.linear import products
from fusewright.kernels.native import library
from fusewright.kernels.native import low_rank as native
from fusewright.kernels.processor import this_machine
from fusewright.kernels.tolerance import exceeded

from . import libraries

B16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def kernels() -> None:
    libraries.require()


def _wide(
    count: int, rows: int, features: int, how: str, generator: torch.Generator
) -> Sequence[Tensor]:
    if how == "a part":
        made = torch.randn(count, rows, features + 5, generator=generator).to(B16)[..., 3:-2]
    elif how == "transposed":
        made = torch.randn(count, features, rows, generator=generator).to(B16).mT
    elif how == "one row":
        made = torch.randn(count, 1, features, generator=generator).to(B16).expand(-1, rows, -1)
    else:
        made = torch.randn(count, rows, features, generator=generator).to(B16)
    return made.unbind()


def _narrow(
    count: int, length: int, rank: int, turned: bool, generator: torch.Generator
) -> Sequence[Tensor]:
    shape = (rank, length) if turned else (length, rank)
    made = torch.randn(count, *shape, generator=generator)
    return (made.mT if turned else made).unbind()


@pytest.mark.long
@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 11, 12, 13, 64, 100, 257]),
    features=st.sampled_from([1, 3, 16, 31, 32, 33, 64, 200, 576]),
    rank=st.sampled_from([1, 4, 8, 15, 16, 17, 32, 48, 65]),
    how=st.sampled_from(["dense", "a part", "transposed", "one row"]),
    turned=st.booleans(),
    transposed=st.booleans(),
    scale=st.sampled_from([1.0, 2.0, -0.3]),
    size=st.sampled_from([1e-12, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
def test_as_exact_as_products_of_fp32(
    rows: int, features: int, rank: int, how: str, turned: bool, transposed: bool, scale: float,
    size: float, seed: int,
) -> None:  # fmt: skip
    # the error of a few sums is a matter of luck
    count = 1 + 5_000 // (rows * rank)
    generator = torch.Generator().manual_seed(seed)
    wides = _wide(count, rows, features, how, generator)
    narrows = [size * t for t in _narrow(count, features, rank, turned, generator)]
    ours, eager = [], []
    for wide, narrow in zip(wides, narrows, strict=True):
        assert native.takes(wide, narrow)
        made = native.product(wide, narrow, scale, transposed)
        assert made.shape == ((rank, rows) if transposed else (rows, rank))
        assert made.is_contiguous()
        ours.append(made.t() if transposed else made)
        eager.append(wide.float() @ narrow * scale)
    exact = torch.stack(wides).double() @ torch.stack(narrows).double() * scale
    assert exceeded(torch.stack(ours), torch.stack(eager), exact, draws=count) is None


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0, 3), (5, 3, 0)])
def test_empty_matrices(shape: tuple[int, int, int]) -> None:
    rows, features, rank = shape
    wide, narrow = torch.zeros(rows, features, dtype=B16), torch.zeros(features, rank)
    made = products.scaled_mm(wide, narrow, 2.0)
    assert made.shape == (rows, rank)
    assert not made.any()


def test_what_lies_apart_is_left_to_pytorch() -> None:
    wide, narrow = torch.randn(9, 16)[:, ::2].to(B16).repeat(1, 2)[:, ::2], torch.randn(8, 3)
    assert not native.takes(wide, narrow)
    torch.testing.assert_close(products.scaled_mm(wide, narrow, 1.0), wide.float() @ narrow)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int) -> None:
    wide, narrow = torch.randn(300, 200).to(B16), torch.randn(200, 16)
    tall = torch.randn(300, 16)
    before = torch.get_num_threads()
    made = native.product(wide, narrow, 1.0, False), native.product(wide.t(), tall, 1.0, True)
    try:
        torch.set_num_threads(threads)
        again = native.product(wide, narrow, 1.0, False), native.product(wide.t(), tall, 1.0, True)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, made, again))


@pytest.mark.parametrize(("level", "vectors"), [(3, ("AVX2", "AVX512")), (4, ("AVX512",))])
def test_on_a_lesser_cpu(
    level: int, vectors: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if this_machine().vectors not in vectors:
        pytest.skip(f"this CPU has no {vectors[0]}")
    libraries.use(monkeypatch, libraries.compiled(tmp_path, f"-march=x86-64-v{level}"))
    for how in ("dense", "transposed"):
        inner: Any = test_as_exact_as_products_of_fp32
        inner.hypothesis.inner_test(100, 200, 17, how, True, False, 2.0, 1.0, 3)


def test_without_kernels_rows_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = torch.randn(9, 16).to(B16), torch.randn(16, 3)
    assert products.beside(wide, narrow) is wide
    libraries.use(monkeypatch, None)
    assert products.beside(wide, narrow).dtype is F32
    made = products._native_product_op(wide, narrow, 2.0, True)
    assert made.is_contiguous()
    torch.testing.assert_close(made.t(), 2.0 * (wide.float() @ narrow))


@pytest.mark.parametrize("kind", [B16, F64])
def test_the_default_dtype_does_not_matter(kind: torch.dtype) -> None:
    wide, narrow = torch.randn(40, 16).to(B16), torch.randn(16, 3)
    made = native.product(wide, narrow, 2.0, False)
    torch.set_default_dtype(kind)
    try:
        again = [native.product(wide, narrow, 2.0, t) for t in (False, True)]
    finally:
        torch.set_default_dtype(F32)
    assert torch.equal(again[0], made)
    assert torch.equal(again[1].t(), made)


def test_the_default_device_does_not_matter() -> None:
    wide, narrow = torch.randn(40, 16).to(B16), torch.randn(16, 3)
    with torch.device("meta"):
        assert native.product(wide, narrow, 2.0, False).device.type == "cpu"


def test_opcheck() -> None:
    wide, narrow = torch.randn(9, 16).to(B16), torch.randn(16, 3)
    for transposed in (False, True):
        torch.library.opcheck(
            torch.ops.fusewright.lora_native_product.default, (wide, narrow, 1.5, transposed)
        )
        torch.library.opcheck(
            torch.ops.fusewright.lora_native_product.default,
            (wide.t(), torch.randn(9, 3), 1.5, transposed),
        )


def test_a_failed_allocation_is_an_error() -> None:
    library.check(0)
    with pytest.raises(MemoryError, match="could not allocate"):
        library.check(1)
