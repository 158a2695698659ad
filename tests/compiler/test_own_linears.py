"""Linears that are autograd functions, as DeepSpeed puts them in the place of ``F.linear``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright import optimize
from tests.explained import explain

from ..models.tiny import Body, CausalLM

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        if bias is not None:
            y += bias
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return grad.matmul(weight), rows.t().matmul(x.reshape(-1, x.shape[-1])), bias


class _Scaled(_Linear):
    """A linear in forward only."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = _Linear.backward(ctx, grad)
        assert dx is not None
        return dx * 0.5, dw, db


class Own(nn.Linear):
    function: Any = _Linear

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.function.apply(x, self.weight, self.bias)
        return made


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = Own(16, 24, bias=False), Own(16, 24, bias=False)
        self.down = Own(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def _model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(Body(Block() for _ in range(2)), Own(16, 32, bias=False))


def _assert_equal(ours: nn.Module, eager: nn.Module) -> None:
    for length in (7, 5, 9):
        ids = torch.arange(2 * length).view(2, length)
        seen = []
        for model in (ours, eager):
            model.zero_grad()
            loss, z = model(ids, labels=ids)
            (loss + z.pow(2).mean()).backward()
            seen.append([loss.detach(), z.detach(), *(p.grad for p in model.parameters())])
        for mine, theirs in zip(*seen, strict=True):
            torch.testing.assert_close(mine + 0, theirs + 0, rtol=1e-4, atol=1e-6)


def test_they_are_linears() -> None:
    eager = _model()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    rewrites = explain(ours).by_rule()
    assert rewrites["mlp_block"] == 2
    assert rewrites["linear_cross_entropy"] == 1


@pytest.mark.parametrize("verify", ["off", "first"])
def test_a_backward_that_does_more_is_kept(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Own, "function", _Scaled)
    eager = _model()
    ours = optimize(copy.deepcopy(eager), codegen="eager", verify=verify)
    _assert_equal(ours, eager)
    rewrites = explain(ours).by_rule()
    assert "mlp_block" not in rewrites
    assert "linear_cross_entropy" not in rewrites


class Attending(nn.Module):
    """A norm that feeds three linears and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.q, self.k, self.v = (Own(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y), is_causal=True)
        return x + mixed


def test_a_norm_that_only_feeds_them_is_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "Block", Attending)
    eager = _model()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    assert explain(ours).by_rule()["rms_norm_linear"] == 2
