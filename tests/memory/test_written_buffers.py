"""A block that writes into its buffers runs once, however lean the plan, and however it writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.explained import explain

from ..compiler.test_effects import _norm, _pair, _step, _x


@torch.library.custom_op("written_buffers::raise_", mutates_args=("t",))
def _raise(t: Tensor) -> None:
    t.add_(1)


@_raise.register_fake
def _(t: Tensor) -> None: ...


class _Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: Tensor, x: Tensor) -> Tensor:
        count.add_(1)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad * 2


def _data(block: Any, x: Tensor) -> Tensor:
    block.mean.data.mul_(0.5).add_(1)
    return x + block.d(_norm(block, x)) * block.mean


def _copied(block: Any, x: Tensor) -> Tensor:
    block.mean.copy_(block.mean + block.u(x).detach().mean((0, 1)))
    return x + block.d(_norm(block, x)) * block.mean


def _operator(block: Any, x: Tensor) -> Tensor:
    block.mean += 1
    return x + block.d(_norm(block, x)) * block.mean


def _item(block: Any, x: Tensor) -> Tensor:
    block.mean[0] = block.mean[0] + x.detach()[0, 0, 0]
    return x + block.d(_norm(block, x)) * block.mean


def _of_a_view(block: Any, x: Tensor) -> Tensor:
    block.mean.view(4, 4)[0].add_(1)
    return x + block.d(_norm(block, x)) * block.mean


def _out(block: Any, x: Tensor) -> Tensor:
    torch.add(block.mean, 1, out=block.mean)
    return x + block.d(_norm(block, x)) * block.mean


def _of_a_library(block: Any, x: Tensor) -> Tensor:
    _raise(block.mean)
    return x + block.d(_norm(block, x)) * block.mean


def _function(block: Any, x: Tensor) -> Tensor:
    y: Tensor = _Counting.apply(block.mean, _norm(block, x))
    return x + block.d(y) * block.mean


def _batch_norm(block: Any, x: Tensor) -> Tensor:
    rows = block.u(x).flatten(0, 1)
    return x + F.batch_norm(rows, block.mean, block.var, None, None, True).view(x.shape)


def _instance_norm(block: Any, x: Tensor) -> Tensor:
    return x + F.instance_norm(block.u(x).transpose(1, 2), block.mean, block.var).transpose(1, 2)


BODIES = [
    _data, _copied, _operator, _item, _of_a_view, _out, _of_a_library, _function, _batch_norm,
    _instance_norm,
]  # fmt: skip


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("body", BODIES)
def test_buffers_are_written_once(body: Any, codegen: str) -> None:
    eager, ours = _pair(body, memory="min", codegen=codegen)
    for _ in range(2):
        for a, b in zip(_step(ours, _x()), _step(eager, _x()), strict=True):
            assert torch.allclose(a.double(), b.double(), atol=1e-4, rtol=1e-4)
    assert "writes into an input of the block, or into its buffers" in explain(ours).memory


@pytest.mark.parametrize("memory", ["speed", "min"])
@pytest.mark.parametrize("body", [_data, _copied, _of_a_view])
def test_a_checkpointed_part_may_write_its_module_s_buffers(body: Any, memory: str) -> None:
    """A checkpoint keeps what its function is given, and not what it reads from its module."""

    def part(block: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: body(block, x), x, use_reentrant=False)  # type: ignore[no-any-return]

    eager, ours = _pair(part, memory=memory, codegen="eager")
    for _ in range(2):
        for a, b in zip(_step(ours, _x()), _step(eager, _x()), strict=True):
            assert torch.allclose(a.double(), b.double(), atol=1e-4, rtol=1e-4)
    assert [s.rule for s in explain(ours).sites if s.status == "rewritten"]


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("around", [True, False], ids=["inside another", "alone"])
def test_checkpointed_parts_write_as_often_as_in_eager_mode(
    around: bool, reentrant: bool, codegen: str
) -> None:
    """A reentrant checkpoint runs once more than others do inside a checkpoint."""

    def part(block: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda x: _batch_norm(block, x), x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    pair = _pair(part, codegen=codegen)
    for model in pair:
        for _ in range(2):
            x = _x().requires_grad_() * 1
            for layer in model.layers:
                x = checkpoint(layer, x, use_reentrant=False) if around else layer(x)
            x.square().sum().backward()
    for a, b in zip(*(m.buffers() for m in pair), strict=True):
        torch.testing.assert_close(a, b)
