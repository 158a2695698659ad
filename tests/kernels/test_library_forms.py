"""Implementations by PyTorch and bitsandbytes are verified as candidates, and compute the op."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.kernels import choice
from fusewright.kernels.choice import OWN, CandidateOp, Choice
from fusewright.kernels.linear import products, quantized
from fusewright.kernels.linear.quantized import FourBits, example_of_quantized
from fusewright.kernels.moe import moe_experts
from fusewright.kernels.norms.rms_norm import reference, rms_norm
from fusewright.kernels.op import ExampleSizes, Maker

from .failing_launches import ERRORS, as_on_a_gpu
from .own_choices import own_choices
from .stand_ins import norms
from .util import assert_parity, bound, needs_triton

pytestmark = needs_triton

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "_mm_in_fp32", lambda a, b: torch.mm(a.float(), b.float()))
    with own_choices(tmp_path), as_on_a_gpu(ERRORS["driver"]), norms():
        yield


def _measured(name: str, *args: Any) -> Choice:
    return choice._OPS[name].measure(args)


def _is_taken(name: str, candidate: str, *args: Any) -> None:
    found = _measured(name, *args)
    assert candidate in found.microseconds, str(found)
    assert OWN in found.refused  # nothing can be launched here


def _choosing(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Let the candidate of this name be the fastest; returns what was asked."""
    asked: list[str] = []

    def measure(op: CandidateOp, args: Any) -> Choice:
        asked.append(op.name)
        return Choice(op.bucket(args), name, refused={OWN: "no driver"})

    monkeypatch.setattr(CandidateOp, "measure", measure)
    return asked


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["inner", "outer"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
def test_rms_norm(dtype: torch.dtype, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (torch.randn(n, dtype=dtype) for n in ((3, 7, 48), (48,)))
    rstd = torch.rand(3, 7, 1)
    outer = rounding == "outer"
    _is_taken("rms_norm_forward", "F.rms_norm", x, weight, 1e-6, 0.0, outer)
    for needs in ((True, True), (True, False), (False, True)):
        args = torch.zeros_like(x), x, weight, rstd, None, 0.0, outer, *needs
        _is_taken("rms_norm_backward", "F.rms_norm", *args)
    asked = _choosing(monkeypatch, "F.rms_norm")
    inputs = [t.requires_grad_() for t in (x, weight)]
    options = 1e-6, 0.0, rounding
    assert_parity(bound(rms_norm, inputs, *options), bound(reference, inputs, *options), *inputs)
    assert asked == ["rms_norm_forward", "rms_norm_backward"]


def test_rms_norm_as_pytorch_has_none() -> None:
    x, weight = torch.randn(4, 8, dtype=BF16), torch.randn(8)
    for args in (
        (x, weight, 1e-6, 0.0, False),
        (x, weight.to(BF16), 1e-6, 1.0, False),
        (x, None, 1e-6, 0.0, False),
    ):
        assert "in the dtype of x" in _measured("rms_norm_forward", *args).refused["F.rms_norm"]
    extra = x, x, weight.to(BF16), torch.rand(4, 1), x, 0.0, False, True, True
    assert (
        _measured("rms_norm_backward", *extra).refused["F.rms_norm"] == "it adds no other gradient"
    )


def test_derivatives_by_finite_differences_through_a_chosen_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _choosing(monkeypatch, "F.rms_norm")
    x, weight = (torch.randn(n, dtype=torch.float32, requires_grad=True) for n in ((2, 3, 8), (8,)))
    args = bound(rms_norm, (x, weight), 1e-6)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Input #. requires gradient and is not a double")
        assert torch.autograd.gradcheck(args, (x, weight), eps=1e-2, atol=2e-3, rtol=1e-2)
        assert torch.autograd.gradgradcheck(args, (x, weight), eps=1e-2, atol=1e-2, rtol=2e-2)


# --- products with factors ------------------------------------------------------------------------


def test_three_parts_are_the_number() -> None:
    exponents = torch.randint(-100, 100, (64, 16))
    narrow = torch.ldexp(torch.randn(64, 16), exponents)
    parts = products.in_parts(narrow, BF16).double().unflatten(1, (3, 16))
    assert torch.equal(parts.sum(1), narrow.double())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_wide_product(transposed: bool, tokens_first: bool) -> None:
    wide = torch.randn(96, 320).to(BF16) if tokens_first else torch.randn(320, 96).to(BF16).t()
    narrow = torch.randn(320, 16) * 1e-3
    args = wide, narrow, 0.5, transposed
    _is_taken("lora_wide_product", "in three parts", *args)
    exact = wide.double() @ narrow.double() * 0.5
    exact = exact.t() if transposed else exact
    ours = products.product_of_parts(*args)
    theirs = products._wide_product_plain(*args)
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()  # that of fp32
    one_part = (wide.float() @ narrow.to(BF16).float()) * 0.5
    one_part = one_part.t() if transposed else one_part
    assert (one_part - exact).norm() > 100 * (ours - exact).norm()
    found = _measured("lora_wide_product", wide.half(), narrow, 0.5, transposed)
    assert found.refused["in three parts"] == "parts are numbers of bfloat16"


def test_rank_update() -> None:
    left, right = torch.randn(48, 8, dtype=BF16), torch.randn(8, 64, dtype=BF16)
    base = torch.randn(48, 64, dtype=BF16)
    _is_taken("lora_rank_update", "torch.addmm", base, left, right)
    found = _measured("lora_rank_update", base, left.float(), right.float())
    assert found.refused["torch.addmm"] == "it multiplies and adds in one dtype"


def test_two_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = products.in_parts

    def two(narrow: Tensor, dtype: torch.dtype) -> Tensor:
        parts = whole(narrow, dtype)
        parts[:, : narrow.shape[1]] = 0
        return parts

    monkeypatch.setattr(products, "in_parts", two)
    args = torch.randn(96, 320).to(BF16), torch.randn(320, 16), 1.0, False
    assert "not as exact" in _measured("lora_wide_product", *args).refused["in three parts"]


# --- experts --------------------------------------------------------------------------------------


def _experts(experts: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = torch.randint(experts, (23,))
    order, _, offsets = moe_experts.moe_route(index, experts)
    weight = torch.randn(experts, 16, 24, dtype=BF16) / 4
    return torch.randn(12, 16, dtype=BF16), order // 2, weight, offsets


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    a, rows, weight, offsets = _experts()
    if transposed:
        weight = weight.mT.contiguous().mT
    _is_taken("moe_grouped_mm_triton", "F.grouped_mm", a, rows, weight, offsets, None)
    b = torch.randn(23, 24, dtype=BF16)
    _is_taken("moe_grouped_outer_triton", "F.grouped_mm", a, rows, b, offsets, weight)
    every = a.index_select(0, rows)
    _is_taken("moe_grouped_outer_triton", "F.grouped_mm", every, None, b, offsets, weight)
    asked = _choosing(monkeypatch, "F.grouped_mm")
    args = a, rows, weight, (offsets - 2).clamp_(min=0), None  # the last two places are nobody's
    ours = moe_experts.grouped_mm(*args)
    plain = moe_experts._grouped_mm_cpu(*args)
    assert ours[-2:].count_nonzero() == 0
    assert torch.allclose(ours.float(), plain.float(), rtol=2**-7, atol=2**-10)  # one rounding each
    assert len(asked) == 1


def test_grouped_products_as_pytorch_has_none() -> None:
    a, rows, weight, offsets = _experts()
    name, form = "moe_grouped_mm_triton", "F.grouped_mm"
    biased = _measured(name, a, rows, weight, offsets, torch.zeros(4, 24, dtype=BF16))
    assert biased.refused[form] == "it adds no bias"
    wide = _measured(name, a.float(), rows, weight.float(), offsets, None)
    assert wide.refused[form] == "it takes bfloat16 alone"
    odd = _measured(name, a[:, :15].contiguous(), rows, weight[:, :15].contiguous(), offsets, None)
    assert odd.refused[form] == "rows are not 16 bytes apart"


def test_a_form_that_leaves_nobody_s_places_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts without a place, and places without an expert, are drawn, whatever a call has."""
    op = choice._OPS["moe_grouped_mm_triton"]
    (form, *rest) = op.candidates
    before = form.run

    def leaving(a: Tensor, rows: Any, weight: Tensor, offsets: Tensor, bias: Any) -> Tensor:
        out: Tensor = before(a, rows, weight, offsets, bias)
        out[int(offsets[-1]) :] = 3.0
        return out

    monkeypatch.setattr(op, "candidates", (replace(form, run=leaving), *rest))
    found = _measured("moe_grouped_mm_triton", *_experts(), None)
    assert "not as exact as eager" in found.refused["F.grouped_mm"]


# --- weights in four bits -------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantization(kind: str) -> None:
    import bitsandbytes  # noqa: F401  2026-12-01: registers its operators

    maker = Maker(BF16, generator=torch.Generator().manual_seed(0), sizes=ExampleSizes())
    weight = example_of_quantized(maker, 48, 64, kind)
    tensors = FourBits(*weight.tensors)  # type: ignore[arg-type]
    args = *tensors, *weight.shape, weight.blocksize, weight.kind, BF16
    _is_taken("dequantize_4bit", "bitsandbytes", *args)
    assert quantized._why_not_bitsandbytes(*args) == ""
