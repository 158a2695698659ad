"""Weights by formula: bit for bit the library's, in parts too, and never whole in a product."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright.graph.opaque.quantized import stored_stack
from fusewright.kernels.linear import quantized
from fusewright.kernels.linear.linear import QUANT_LINEAR
from fusewright.kernels.linear.quantized import FORMATS as KINDS
from fusewright.kernels.moe.moe_experts import reference as moe_experts
from fusewright.kernels.moe.packed_experts import PackedExperts
from fusewright.kernels.tolerance import exceeded

from ..capturing import capture, rewrite, rewritten
from ..models.stored_formats import (
    LIBRARIES,
    STACKS,
    STAND_INS,
    Format,
    StoredExperts,
    adapted,
    peak,
    rewritten_layer,
    run_rewritten,
)
from ..passes.test_moe_experts import _silu_gate
from .util import assert_parity_of_draws, saved_tensors

BF16, F32 = torch.bfloat16, torch.float32
OUT, INTO = 384, 256


def _layer(form: Format, dtype: torch.dtype) -> Any:
    if not form.is_installed():
        pytest.skip(f"{form.library} is not installed")
    torch.manual_seed(0)
    return form.make(OUT, INTO, dtype)


def _each(formats: list[Format]) -> Any:
    return pytest.mark.parametrize("form", formats, ids=lambda form: form.name)


@_each([*STAND_INS, *LIBRARIES])
@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.long), BF16], ids=str)
def test_the_weight_is_the_librarys_bit_for_bit(form, dtype):
    layer = _layer(form, dtype)
    x = torch.randn(2, 3, INTO).to(dtype).requires_grad_()
    _, findings, (w,) = run_rewritten(layer, x)
    assert rewritten(findings) == ["quant_linear"], findings
    theirs = form.dequantized(layer).to(dtype)
    assert w.nbytes() < theirs.numel() * 2
    record = KINDS[w.kind]
    assert record.misfits(w) == []
    assert torch.equal(record.reference(w, dtype), theirs)
    assert record.cuts
    for dim, size in enumerate(w.shape):
        for start, stop in ((0, size), (0, 128), (128, size), (3, 77), (size - 1, size)):
            part = record.part(w, dtype, dim, start, stop)
            assert torch.equal(part, theirs.narrow(dim, start, stop - start)), (dim, start, stop)


@_each(STAND_INS)
@pytest.mark.parametrize("size", [1, pytest.param(1 << 13, marks=pytest.mark.long)], ids=str)
def test_products_in_parts(form, size, monkeypatch):
    """Values and gradients of x are as exact as eager's, and no part is larger than said."""
    layer = _layer(form, BF16)
    x = torch.randn(2, 9, INTO).to(BF16).requires_grad_()
    _, _, (w,) = run_rewritten(layer, x)
    weight = form.dequantized(layer).to(BF16)
    monkeypatch.setattr(quantized, "PART", size)
    seen: list[int] = []
    record = KINDS[w.kind]

    def part(*args: Any) -> Tensor:
        made = record.part(*args)
        seen.append(made.numel())
        return made

    monkeypatch.setitem(KINDS, w.kind, dataclasses.replace(record, part=part))
    upstream = torch.randn(2, 9, OUT).to(BF16)
    mine = QUANT_LINEAR.call(x, w)
    theirs = torch.nn.functional.linear(x, weight)
    wide = x.detach().double().requires_grad_()
    exact = torch.nn.functional.linear(wide, weight.double())
    assert exceeded(mine, theirs, exact) is None
    grads = [
        torch.autograd.grad(y, z, upstream.to(y.dtype))[0]
        for y, z in ((mine, x), (theirs, x), (exact, wide))
    ]
    assert exceeded(*grads) is None
    assert seen
    assert max(seen) <= max(size, 256 * OUT)


@_each([*STAND_INS, *LIBRARIES])
def test_a_step_with_an_adapter(form):
    """One op; its values and gradients are as exact as PEFT's, and it keeps no weight."""
    layer = adapted(_layer(form, BF16), BF16)
    x = torch.randn(2, 17, INTO).to(BF16).requires_grad_()
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(trained) == 3
    theirs, upstream = layer(x), torch.randn(2, 17, OUT).to(BF16)
    with saved_tensors() as kept:
        mine, findings, _ = run_rewritten(layer, x)
    assert rewritten(findings) == ["lora_linear", "quant_linear"], findings
    floats = [t for t in kept if t.is_floating_point() and t.itemsize > 1]
    assert max(t.numel() for t in floats) < OUT * INTO
    bias = layer.base_layer.bias if hasattr(layer.base_layer, "bias") else None
    exact, *wide = _exact(form.dequantized(layer.base_layer), bias, *trained)
    assert exceeded(mine, theirs, exact) is None
    ours, eager = (torch.autograd.grad(y, trained, upstream) for y in (mine, theirs))
    truth = torch.autograd.grad(exact, wide, upstream.double())
    for triple in zip(ours, eager, truth, strict=True):
        assert exceeded(*triple) is None


@pytest.mark.parametrize("name", ["gptq", "fp8-blocks", "hqq"])
def test_the_weight_is_never_whole_in_high_precision(name, monkeypatch):
    """A step of forward and backward holds less than the weight in bf16; eager's holds more."""
    monkeypatch.setattr(quantized, "PART", 1 << 14)
    torch.manual_seed(0)
    (form,) = (f for f in STAND_INS if f.name == name)
    layer = form.make(2048, 256, BF16)
    x = torch.randn(1, 3, 256, dtype=BF16, requires_grad=True)
    ours, findings, _ = rewritten_layer(layer)
    upstream = torch.randn_like(ours(x))
    assert rewritten(findings) == ["quant_linear"]
    highest = [
        peak(lambda call=call: torch.autograd.grad(call(x), x, upstream)) for call in (ours, layer)
    ]
    assert highest[0] < 2 * 2048 * 256 < highest[1]


def _exact(weight: Tensor, bias: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """PEFT's formula in fp64, and its inputs there."""
    wide = [t.detach().double().requires_grad_() for t in inputs]
    x, a, b = wide
    base = torch.nn.functional.linear(
        x, weight.to(BF16).double(), None if bias is None else bias.detach().to(BF16).double()
    )
    return base + 2.0 * (x @ a.t() @ b.t()), *wide


class Packed(Tensor):
    """Codes and a scale, as libraries make subclasses of tensors; with ``sharp``, x is rounded."""

    @staticmethod
    def __new__(cls: Any, codes: Tensor, scale: Tensor, sharp: bool) -> Packed:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]
        made.codes, made.scale, made.sharp = codes, scale, sharp
        return made

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], self.sharp

    @staticmethod
    def __tensor_unflatten__(inner: Any, sharp: bool, *_: Any) -> Packed:
        return Packed(inner["codes"], inner["scale"], sharp)

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            x, w = args[:2]
            x = x.mul(8).round().div(8) if w.sharp else x
            return (x @ w.codes.to(x.dtype).t()) * w.scale.t()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return Packed(args[0].codes, args[0].scale, args[0].sharp)
        raise NotImplementedError(str(func))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("sharp", [False, True])
def test_tensors_that_multiply_by_themselves(sharp, lora):
    """They are opened where their product is that of ``dequantize``; else the layer is left."""
    torch.manual_seed(0)
    codes = torch.randint(-8, 8, (48, 32), dtype=torch.int8)
    layer: Any = torch.nn.Linear(32, 48, bias=False)
    layer.weight = torch.nn.Parameter(Packed(codes, torch.rand(48, 1), sharp), requires_grad=False)
    layer = adapted(layer, F32) if lora else layer
    x = torch.randn(2, 5, 32, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    call, findings, weights = rewritten_layer(layer)
    mine, theirs = call(x), layer(x)
    rules = ["quant_linear", "lora_linear"][: 1 + lora]
    assert rewritten(findings) == ([] if sharp else sorted(rules)), findings
    assert len(weights) == (not sharp)
    assert not sharp or any("Packed, multiplies by itself" in f.reason for f in findings)
    pairs = [(mine, theirs)]
    pairs += zip(*(torch.autograd.grad(y.sum(), trained) for y in (mine, theirs)), strict=True)
    for ours, eager in pairs:
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("name", "lora", "kind"),
    [
        *((name, lora, None) for name in STACKS for lora in (False, True)),
        *(("mxfp4", True, kind) for kind in ("avx512", "avx512_bf16")),
    ],
)
def test_experts_are_unpacked_one_at_a_time(name, lora, kind, monkeypatch, choose_for):
    """Values and gradients are as exact as eager's; experts without tokens are never unpacked."""
    if kind is not None:
        choose_for(kind)
    torch.manual_seed(0)
    experts, hidden, inner, tokens = 6, 64, 32, 24
    layer = StoredExperts(name, experts, hidden, inner, BF16)
    index = torch.stack([torch.randperm(experts - 2)[:2] for _ in range(tokens)])
    shapes = ((2 * inner, 3), (3, hidden), (hidden, 3), (3, inner)) if lora else ()

    def drawn() -> list[Tensor]:
        x, weights = torch.randn(tokens, hidden).to(BF16), torch.rand(tokens, 2)
        factors = ((torch.randn(experts, *s) * 0.1).to(BF16) for s in shapes)
        return [t.requires_grad_() for t in (x, weights, *factors)]

    x, weights, *factors = inputs = drawn()
    call, findings, _ = rewritten_layer(layer)
    call(x, index, weights, *factors)
    assert "moe_experts" in rewritten(findings), findings
    seen: list[int] = []
    one = PackedExperts.expert
    monkeypatch.setattr(PackedExperts, "unpacked", lambda self: pytest.fail("unpacked whole"))
    monkeypatch.setattr(PackedExperts, "expert", lambda self, e: seen.append(e) or one(self, e))
    with saved_tensors() as kept:
        mine = call(x, index, weights, *factors)
    torch.autograd.grad(mine.sum(), inputs)
    assert sorted(set(seen)) == list(range(experts - 2))
    plain = [t.numel() for t in kept if t.itemsize > 1 and type(t) is Tensor]
    assert max(plain) < experts * hidden * inner

    unpack = layer.unpack

    def eager(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        if x.dtype is not torch.float64:
            layer.unpack = unpack
            return layer(x, index, weights, *factors)
        layer.unpack = functools.partial(_in_fp64, unpack)
        return moe_experts(x, index, weights, *_exact_stacks(layer, factors), _silu_gate)

    def ours(x: Tensor, weights: Tensor, *factors: Tensor) -> Tensor:
        layer.unpack = unpack
        return call(x, index, weights, *factors)

    assert_parity_of_draws(ours, eager, drawn)


def _in_fp64(unpack: Any, parts: Any, dtype: torch.dtype) -> Tensor:
    return unpack(parts, dtype).double()


def _exact_stacks(layer: Any, factors: Sequence[Tensor]) -> list[Tensor]:
    stacks = [layer.stack(role) for role in ("up", "down")]
    if factors:
        a, b, c, d = factors
        stacks = [stacks[0] + 2.0 * a @ b, stacks[1] + 2.0 * c @ d]
    return [w.mT for w in stacks]


def test_a_stack_whose_experts_are_not_computed_alike_is_left():
    """A scale by the expert's number, and experts that are turned round."""
    codes = torch.randint(-8, 8, (4, 6, 10), dtype=torch.int8)
    for formula in (
        lambda c: c.float() * torch.arange(4.0).view(4, 1, 1),
        lambda c: c.float()[torch.tensor([3, 2, 1, 0])],
        lambda c: c.flip(0).float(),
    ):
        module = capture(lambda c, x: torch.bmm(x, formula(c)), codes, torch.randn(4, 2, 6))  # noqa: B023
        (product,) = (n for n in module.graph.nodes if n.target is torch.bmm)
        assert stored_stack(product.args[1]) is None
    module = capture(lambda c, x: torch.bmm(x, c.float() * 0.5), codes, torch.randn(4, 2, 6))
    (product,) = (n for n in module.graph.nodes if n.target is torch.bmm)
    stack = stored_stack(product.args[1])
    assert (stack.rows, stack.shape) == ((1,), (6, 10))


def test_what_is_not_known_is_said():
    class Sorted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(0, 16, (64, 32), dtype=torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.codes.to(F32).erfinv())

    findings = rewrite(capture(Sorted(), torch.randn(3, 32).requires_grad_()))
    assert [(f.rule, f.status) for f in findings] == [("quant_linear", "missed")]
    assert findings[0].reason == "its weight is computed from packed tensors by erfinv"


@pytest.mark.parametrize("change", ["trained scale", "activation", "wide"])
def test_what_is_no_stored_weight(change):
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("codes", torch.randint(0, 16, (64, 32), dtype=torch.uint8))
            if change == "wide":
                self.codes = torch.randn(64, 32)
            trained = change == "trained scale"
            self.scale = torch.nn.Parameter(torch.rand(64, 1), requires_grad=trained)

        def forward(self, x: Tensor) -> Tensor:
            scale = x.mean() if change == "activation" else self.scale
            return torch.nn.functional.linear(x, self.codes.to(F32) * scale)

    findings = rewrite(capture(Layer(), torch.randn(3, 32).requires_grad_()))
    assert not rewritten(findings)
