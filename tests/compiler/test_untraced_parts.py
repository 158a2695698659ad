"""Parts of blocks that a tracer cannot follow: branches on values are held, others are nodes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright import explain, optimize

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class _Part(nn.Module):
    """A projection that trained parameters change, but for some calls."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.update = nn.Parameter(torch.randn(16, 16) * 0.1)
        self.dropout, self.limit = 0.0, 1e9

    def delta(self, x: Tensor) -> Tensor:
        if (x.abs() > self.limit).any():
            raise ValueError("beyond the limit")
        return self.update * 2

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        self.last_shape = x.shape[-1]
        if (not self.training) or (self.training and torch.rand(1) > self.dropout):
            result = result + nn.functional.linear(x, self.delta(x))
        return result


class _Sparse(nn.Module):
    """A projection with a sparse update, which TorchDynamo does not trace; it counts its calls."""

    in_features, out_features = 16, 16

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 16, bias=False).requires_grad_(False)
        self.update = nn.Parameter(torch.randn(8))
        self.calls, self.turned = 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        places = torch.arange(16).view(2, 8)
        weight = self.base.weight.clone()
        weight += torch.sparse_coo_tensor(places, self.update, (16, 16), check_invariants=False)
        result = nn.functional.linear(nn.functional.dropout(x, 0.2, self.training), weight)
        return result.double() if self.turned else result


class _Layer(nn.Module):
    def __init__(self, kind: type[nn.Module] = _Part) -> None:
        super().__init__()
        self.norm, self.part = nn.RMSNorm(16, eps=1e-6), kind()

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(self.norm(x)).to(x.dtype)
        return x + nn.functional.dropout(y, 0.1, self.training)


class _Stack(nn.Module):
    def __init__(self, kind: type[nn.Module] = _Part) -> None:
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


def _pair(dropout: float) -> tuple[nn.Module, nn.Module]:
    eager = _Stack().train()
    for layer in eager.layers:
        layer.part.dropout = dropout
    return optimize(copy.deepcopy(eager), codegen="eager"), eager


def test_blocks_are_captured_although_they_branch_on_values() -> None:
    ours, eager = _pair(0.0)
    for seed in range(2):
        _assert_equal(ours, eager, seed)
    assert all(layer.part.last_shape == 16 for layer in ours.layers)
    report = explain(ours)
    assert report.by_rule()["rms_norm"] == 3
    assert report.by_rule()["lora_linear"] == 3
    assert not report.bypasses


def test_a_block_runs_as_it_was_where_a_value_says_otherwise() -> None:
    ours, eager = _pair(0.02)
    out = [_leaves_out(eager, seed) for seed in range(40)]
    common, rare = [s for s in range(40) if not out[s]], [s for s in range(40) if out[s]]
    for seed in (*common[:6], *rare[:2], common[6]):
        _assert_equal(ours, eager, seed)
    assert explain(ours).by_rule()["lora_linear"] == 3


def _leaves_out(model: nn.Module, seed: int) -> bool:
    return any(v is None for n, v in _step(model, seed).items() if n.endswith("update"))


@pytest.mark.long
def test_a_branch_that_goes_both_ways_is_left_alone() -> None:
    ours, eager = _pair(0.5)
    for seed in range(8):
        _assert_equal(ours, eager, seed)
    assert any("Data-dependent branching" in b.reason for b in explain(ours).bypasses)


@pytest.mark.long
def test_an_error_behind_a_branch_is_raised() -> None:
    ours, _ = _pair(0.0)
    _step(ours, 0)
    for layer in ours.layers:
        layer.part.limit = 100.0
    _step(ours, 0)
    with torch.no_grad():
        ours.layers[1].norm.weight.mul_(1e3)
    with pytest.raises(ValueError, match="beyond the limit"):
        _step(ours, 0)


@pytest.mark.long
def test_a_checkpoint_recomputes_what_was_held() -> None:
    ours, eager = _pair(0.0)

    _assert_equal(_checkpointed(ours), _checkpointed(eager), 0)


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
