"""What the ops return where tensors are on a GPU: the code of that case, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fusewright.kernels.linear import products, projections

from .by_parts import LORA, MLP, QKV
from .util import assert_parity_of_draws

F64 = torch.float64
WIDE, OUT, RANK = 64, 48, 4
DTYPES = [torch.bfloat16, torch.float32]
"""Of adapters over a base in bfloat16."""


def _made(*shape: int, dtype: torch.dtype = torch.bfloat16, trained: bool = True) -> Tensor:
    size = 1.0 if len(shape) == 3 else shape[-1] ** -0.5  # activations, and weights
    return (size * torch.randn(shape)).to(dtype).requires_grad_(trained)


def _linears(dtype: torch.dtype, *outs: int, into: int = WIDE) -> list[list[Any]]:
    """Frozen weights, no biases, A's, B's, scales, no biases of B."""
    return [
        [_made(out, into, trained=False) for out in outs],
        [None] * len(outs),
        [_made(RANK, into, dtype=dtype) for _ in outs],
        [_made(out, RANK, dtype=dtype) for out in outs],
        [2.0] * len(outs),
        [None] * len(outs),
    ]


def _lora(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Any]]:
    one = [parts[0] for parts in _linears(dtype, OUT)]
    return LORA.call(x, *one), one


def _qkv(x: Tensor, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    several = _linears(dtype, OUT, 8, 8)
    return QKV.call(x, *several, "all"), several


def _mlp(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Any]]:
    pairs = zip(_linears(dtype, OUT, OUT), _linears(dtype, WIDE, into=OUT), strict=True)
    several = [a + b for a, b in pairs]
    return MLP.call(x, *several, "silu", "two", "gate_up"), several


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (products, projections):
        monkeypatch.setattr(module, "on_cpu", lambda t: False)
    monkeypatch.setattr(projections, "one_by_one", lambda device: False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [_lora, _qkv, _mlp], ids=lambda f: f.__name__)
def test_gradients_of_adapters_have_the_strides_of_the_parameters(
    build: Any, dtype: torch.dtype
) -> None:
    """Autograd would clone them otherwise, and DDP's buckets would not fit."""
    out, given = build(_made(2, 35, WIDE), dtype)
    outs = tree_leaves(out)
    trained = [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(outs, trained, [torch.empty_like(o) for o in outs])
    assert [g.stride() for g in grads] == [t.stride() for t in trained]
    assert {g.dtype for g in grads} == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", [_lora, _qkv, _mlp], ids=lambda f: f.__name__)
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients(build: Any, dtype: torch.dtype, autocast: bool) -> None:
    """What a GPU's form of products and casts gives is within the budget of eager's."""
    torch.manual_seed(0)
    op = {_lora: LORA, _qkv: QKV, _mlp: MLP}[build]

    def parts() -> tuple[list[Any], Any]:
        with torch.no_grad():
            return tree_flatten(build(_made(2, 35, WIDE), dtype)[1])

    flat, spec = parts()
    places = [i for i, t in enumerate(flat) if isinstance(t, Tensor)]
    more = {_lora: (), _qkv: ("all",), _mlp: ("silu", "two", "gate_up")}[build]

    def run(call: Any) -> Any:
        def of(x: Tensor, *tensors: Tensor) -> Any:
            own = list(flat)
            for i, t in zip(places, tensors, strict=True):
                own[i] = t
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast and x.dtype is not F64):
                out = call(x, *tree_unflatten(own, spec), *more)
            return tuple(out) if isinstance(out, list) else out

        return of

    def draw() -> list[Tensor]:
        made = parts()[0]
        return [_made(2, 35, WIDE), *(made[i] for i in places)]

    assert_parity_of_draws(run(op.call), run(op.reference), draw)


def test_operands_are_cast_as_one() -> None:
    tensors = [torch.randn(3, 4).requires_grad_(), None, torch.randn(5).requires_grad_()]
    tensors += [torch.randn(2, dtype=torch.bfloat16), torch.randn(2, dtype=F64)]
    made = projections._cast_in_one_launch(tensors, torch.bfloat16)
    assert made[1] is None
    assert made[3] is tensors[3]
    assert made[4] is tensors[4]
    first, last = made[0], made[2]
    assert torch.equal(first, tensors[0].bfloat16())
    assert torch.equal(last, tensors[2].bfloat16())
    weight = torch.randn(3, 4).bfloat16()
    (grad,) = torch.autograd.grad((first * weight).sum(), tensors[0], create_graph=True)
    assert torch.equal(grad, weight.float())
    assert grad.dtype is torch.float32
    loss = (first.float() ** 3).sum() + last.float().sum()
    one, other = torch.autograd.grad(loss, (tensors[0], tensors[2]), create_graph=True)
    (again,) = torch.autograd.grad(one.sum(), tensors[0])
    torch.testing.assert_close(again, 6 * tensors[0].bfloat16().float(), rtol=2e-2, atol=1e-2)
    assert torch.equal(other, torch.ones(5))
