"""Projections that a tracer cannot follow: each is one node of its block's graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright import explain, optimize

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class _Sparse(nn.Module):
    """A projection with a sparse update, which TorchDynamo does not trace; it counts its calls."""

    in_features, out_features = 16, 16

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.update = nn.Parameter(torch.randn(8))
        self.register_buffer("count", torch.zeros(()))
        self.calls, self.turned, self.factor = 0, False, 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        places = torch.arange(16).view(2, 8)
        weight = self.base.weight * self.factor
        weight += torch.sparse_coo_tensor(places, self.update, (16, 16), check_invariants=False)
        result = nn.functional.linear(nn.functional.dropout(x, 0.2, self.training), weight)
        return result.double() if self.turned else result


class _Layer(nn.Module):
    def __init__(self, kind: type[nn.Module] = _Sparse) -> None:
        super().__init__()
        self.norm, self.part = nn.RMSNorm(16, eps=1e-6), kind()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(self.norm(x)).to(x.dtype)
        return x + nn.functional.dropout(y, 0.1, self.training)


class _Stack(nn.Module):
    def __init__(self, kind: type[nn.Module] = _Sparse) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([_Layer(kind) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _step(model: Any, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    x = torch.randn(2, 5, 16).requires_grad_()
    model.zero_grad()
    model(x).pow(2).sum().backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return {"x": x.grad, "next draw": torch.rand(3), **grads}


def _assert_equal(ours: nn.Module, eager: nn.Module, seed: int) -> None:
    mine, theirs = _step(ours, seed), _step(eager, seed)
    for key, value in theirs.items():
        if value is None:
            assert mine[key] is None, key
        else:
            torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-5, msg=key)


def _checkpointed(model: Any) -> Any:
    forwards = [layer.forward for layer in model.layers]
    for layer, forward in zip(model.layers, forwards, strict=True):
        layer.forward = lambda x, f=forward: torch.utils.checkpoint.checkpoint(
            f, x, use_reentrant=False
        )
    return model


@pytest.mark.parametrize("memory", ["speed", pytest.param("min", marks=pytest.mark.long)])
def test_a_projection_that_cannot_be_traced_is_a_node(memory: Any) -> None:
    eager = _Stack(_Sparse).train()
    ours = optimize(copy.deepcopy(eager), codegen="eager", memory=memory)
    for seed in range(2):
        _assert_equal(ours, eager, seed)
    report = explain(ours)
    assert report.by_rule()["rms_norm"] == 3
    assert any("runs as it was" in b.reason for b in report.bypasses)
    if memory == "speed":
        assert [m.part.calls for m in ours.layers] == [m.part.calls for m in eager.layers]


@pytest.mark.long
def test_parts_in_a_checkpoint_and_parts_that_share_weights() -> None:
    eager = _Stack(_Sparse).train()
    for layer in eager.layers:
        layer.part.base = eager.layers[0].part.base
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, 0)
    _assert_equal(_checkpointed(ours), _checkpointed(eager), 1)


@pytest.mark.long
def test_a_part_that_returns_something_else_is_no_node_any_more() -> None:
    eager = _Stack(_Sparse).train()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager, 0)
    for layer in (*ours.layers, *eager.layers):
        layer.part.turned = True
    for seed in range(2):
        _assert_equal(ours, eager, seed)
    assert [m.part.count for m in ours.layers] == [m.part.count for m in eager.layers]


@pytest.mark.long
def test_parts_with_the_same_parameters_are_no_nodes() -> None:
    eager = _Stack(_Sparse).train()
    for number, layer in enumerate(eager.layers):
        layer.part.base, layer.part.update = eager.layers[0].part.base, eager.layers[0].part.update
        layer.part.factor = 1.0 + number
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for seed in range(2):
        _assert_equal(ours, eager, seed)
