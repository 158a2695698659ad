"""Adapters in fp32 over bf16 activations as a GPU multiplies them, by the same sums on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fusewright.kernels.linear import products, projections
from fusewright.kernels.tolerance import exceeded

from .by_parts import LORA, MLP, QKV
from .native import libraries
from .quantized_weights import random_weight
from .util import assert_parity_of_draws

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
WIDE, OUT, RANK = 64, 48, 4


def _parts(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``lora_linear_triton.wide_product_kernel`` splits a factor."""
    high = t.bfloat16()
    rest = t - high.float()
    middle = rest.bfloat16()
    return high, middle, (rest - middle.float()).bfloat16()


def _wide_product(wide: Tensor, narrow: Tensor, scale: float, transposed: bool) -> Tensor:
    """The kernel's sums: by 32 of the inner dimension, the smallest parts first."""
    total = torch.zeros(wide.shape[0], narrow.shape[1])
    for a, b in zip(wide.float().split(32, 1), narrow.split(32), strict=True):
        high, middle, low = (part.float() for part in _parts(b))
        total += a @ low + a @ middle + a @ high
    total *= scale
    return total.t().contiguous() if transposed else total


def _rank_update(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    kind = base.dtype
    update = left.to(kind).float() @ right.to(kind).float()
    return (base.float() + update).to(kind)


class _NoWideCopies(TorchDispatchMode):
    """Refuses casts of 16-bit tensors of an activation's size, but inside the emulated kernels."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.calls, self.is_inside = least, [], False

    def inside(self, name: str, run: Any) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            self.is_inside = True
            try:
                return run(*args)
            finally:
                self.is_inside = False

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and not self.is_inside:
            copied = args[0].itemsize == 2 and made.dtype is F32 and made.numel() >= self.least
            assert not copied, f"{tuple(made.shape)} was copied to fp32"
        return made


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, choose_for: Callable[[str], None]) -> _NoWideCopies:
    """The ops choose as they do on a GPU; its kernels are emulated."""
    choose_for("avx512_bf16")  # the CPU's products stand for those of the GPU's libraries
    mode = _NoWideCopies(70 * 8)

    def use_triton_dot(*given: Tensor) -> bool:
        return all(t.dtype is not F64 for t in given)

    for module in (products, projections):
        monkeypatch.setattr(module, "on_cpu", lambda t: False)
        monkeypatch.setattr(module, "use_triton_dot", use_triton_dot)
        monkeypatch.setattr(module, "rank_update", mode.inside("rank_update", _rank_update))
    monkeypatch.setattr(products, "_wide_product_op", mode.inside("wide_product", _wide_product))
    monkeypatch.setattr(projections, "one_by_one", lambda device: False)
    return mode


# -- the numbers -----------------------------------------------------------------------------------


@given(st.lists(st.floats(2.0**-100, 2.0**127, width=32), min_size=1), st.booleans())
def test_three_parts_are_the_number(numbers: list[float], negative: bool) -> None:
    t = torch.tensor(numbers) * (-1.0 if negative else 1.0)
    high, middle, low = (part.double() for part in _parts(t))
    assert torch.equal(high + middle + low, t.double())
    assert (high.abs() >= 2.0**7 * middle.abs()).all()  # so that the smallest come first


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.sampled_from([(33, 16, 300), (64, 4, 2048), (7, 48, 64)]),
    size=st.sampled_from([1e-12, 1.0, 1e6]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_are_as_exact_as_those_of_fp32(
    sizes: tuple[int, int, int], size: float, transposed: bool, seed: int
) -> None:
    m, r, k = sizes
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(m, k, generator=generator).bfloat16()
    narrow = torch.randn(r, k, generator=generator).t() * size
    eager, exact = (wide.to(kind) @ narrow.to(kind) * 1.7 for kind in (F32, F64))
    made = _wide_product(wide, narrow, 1.7, transposed)
    problem = exceeded(made.t() if transposed else made, eager, exact)
    assert problem is None, problem


# -- which path is taken ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "narrow", "is_taken"),
    [
        (BF16, F32, True), (BF16, BF16, False), (F32, F32, False), (F32, BF16, False),
        (F16, F32, False),  # three parts of 1e-5 in fp16 have 20 bits, not 24
        (BF16, F64, False),
    ],
)  # fmt: skip
def test_only_bf16_stays_beside_fp32(
    wide: torch.dtype, narrow: torch.dtype, is_taken: bool, on_a_gpu: _NoWideCopies
) -> None:
    x, factor = torch.randn(5, 8).to(wide), torch.randn(8, 2).to(narrow)
    beside = products.beside(x, factor)
    assert beside.dtype is (wide if is_taken else narrow)
    assert products.Rows(x).beside(factor).dtype is beside.dtype
    made = products.scaled_mm(beside, factor, 2.0)
    assert ("wide_product" in on_a_gpu.calls) == is_taken
    assert made.dtype is narrow


def test_the_cpu_copies_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.use(monkeypatch, None)
    assert not products.multiplies_as_is(torch.zeros(2, 2, dtype=BF16), torch.zeros(2, 2))


def _made(*shape: int, dtype: torch.dtype = BF16, trained: bool = True) -> Tensor:
    size = 1.0 if len(shape) == 3 else shape[-1] ** -0.5  # activations, and weights
    return (size * torch.randn(shape)).to(dtype).requires_grad_(trained)


def _adapted(*outs: int, into: int = WIDE, weight: Any = None) -> list[list[Any]]:
    """Frozen weights, no biases, A's, B's, scales, no biases of B."""
    return [
        [weight or _made(out, into, trained=False) for out in outs],
        [None] * len(outs),
        [_made(RANK, into, dtype=F32) for _ in outs],
        [_made(out, RANK, dtype=F32) for out in outs],
        [2.0 + i for i in range(len(outs))],  # of several scales, each part has its own
        [None] * len(outs),
    ]


def _lora() -> tuple[Any, list[Any], tuple[Any, ...]]:
    return LORA, [parts[0] for parts in _adapted(OUT)], ()


def _quantized() -> tuple[Any, list[Any], tuple[Any, ...]]:
    weight = random_weight((OUT, WIDE))
    return LORA, [parts[0] for parts in _adapted(OUT, weight=weight)], ()


def _qkv() -> tuple[Any, list[Any], tuple[Any, ...]]:
    return QKV, _adapted(OUT, 8, 8), ("all",)


def _mlp() -> tuple[Any, list[Any], tuple[Any, ...]]:
    pairs = zip(_adapted(OUT, OUT), _adapted(WIDE, into=OUT), strict=True)
    return MLP, [a + b for a, b in pairs], ("silu", "two", "gate_up")


def _mlp_in_tiles() -> tuple[Any, list[Any], tuple[Any, ...]]:
    op, parts, _ = _mlp()
    return op, parts, ("silu", "two", "input")


BUILDS = [_lora, _quantized, _qkv, _mlp, _mlp_in_tiles]


@pytest.mark.parametrize("build", BUILDS, ids=lambda f: f.__name__)
def test_no_activation_is_copied_to_fp32(build: Any, on_a_gpu: _NoWideCopies) -> None:
    op, parts, more = build()
    x = _made(2, 35, WIDE)
    trained = [t for t in tree_leaves(parts) if isinstance(t, Tensor) and t.requires_grad]
    with on_a_gpu:
        outs = tree_leaves(op.call(x, *parts, *more))
        upstream = [torch.ones_like(o) for o in outs]
        grads = torch.autograd.grad(outs, [x, *trained], upstream)
    assert on_a_gpu.calls.count("wide_product") >= 4  # h, dY·B, dA and dB
    assert grads[0].dtype is BF16
    for grad, t in zip(grads[1:], trained, strict=True):
        assert grad.dtype is F32
        assert grad.stride() == t.stride()  # autograd would copy it otherwise


@pytest.mark.parametrize("build", BUILDS, ids=lambda f: f.__name__)
def test_values_and_gradients(build: Any, on_a_gpu: _NoWideCopies) -> None:
    torch.manual_seed(0)
    op, _, more = build()
    with torch.no_grad():
        flat, spec = tree_flatten(build()[1])
    places = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.requires_grad]

    def run(call: Any) -> Any:
        def of(x: Tensor, *tensors: Tensor) -> Any:
            own = [t.to(x.dtype) if isinstance(t, Tensor) and t.dtype is BF16 else t for t in flat]
            for i, t in zip(places, tensors, strict=True):
                own[i] = t
            out = call(x, *tree_unflatten(own, spec), *more)
            return tuple(out) if isinstance(out, list) else out

        return of

    def draw() -> list[Tensor]:
        made = tree_flatten(build()[1])[0]
        return [_made(2, 35, WIDE), *(made[i] for i in places)]

    assert_parity_of_draws(run(op.call), run(op.reference), draw)
    assert "wide_product" in on_a_gpu.calls


def test_gradients_of_fp32_adapters_are_fp32_accurate(on_a_gpu: _NoWideCopies) -> None:
    """Far below what bf16 factors would leave, which the budget of bf16 outputs would not show."""
    torch.manual_seed(0)
    op, parts, _ = _lora()
    x, upstream = _made(2, 350, WIDE), _made(2, 350, OUT, trained=False)
    exact = [
        t.detach().to(F64).requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t
        for t in parts
    ]
    mine = torch.autograd.grad(op.call(x, *parts), parts[2:4], upstream)
    eager = torch.autograd.grad(op.reference(x, *parts), parts[2:4], upstream)
    truth = torch.autograd.grad(op.reference(x.double(), *exact), exact[2:4], upstream.double())
    for got, theirs, want in zip(mine, eager, truth, strict=True):
        problem = exceeded(got, theirs, want)
        assert problem is None, problem
