"""What changes in a model after its graphs were captured: hooks, classes, forwards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from fusewright import explain, optimize
from fusewright.compiler.install import installed


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))

    @property
    def factor(self) -> float:
        return 1.0

    def activation(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x)) * self.factor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    eager = Stack()
    return optimize(copy.deepcopy(eager), **{"codegen": "eager", **options}), eager


def _assert_equal(ours: nn.Module, eager: nn.Module) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    results = []
    for model in (ours, eager):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def _other_forward(self: Any, x: Tensor) -> Tensor:
    return self.down(torch.tanh(self.gate(x)) + self.up(x))


PATCHES = {
    "the block's class": (Block, "forward", lambda self, x: 3 * x - self.mlp(x)),
    "a submodule's class": (Gate, "forward", _other_forward),
    "a method of a submodule's class": (Gate, "activation", lambda self, x: torch.tanh(x)),
    "a property of a submodule's class": (Gate, "factor", property(lambda self: 0.25)),
    "a class of PyTorch": (nn.Linear, "forward", lambda self, x: F.linear(x, 0.5 * self.weight)),
}


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_class_patched_after_the_first_step(
    monkeypatch: pytest.MonkeyPatch, patch: tuple[type, str, Any], codegen: str
) -> None:
    ours, eager = _pair(codegen=codegen)
    _assert_equal(ours, eager)
    with monkeypatch.context() as patched:
        patched.setattr(*patch)
        _assert_equal(ours, eager)
        assert not explain(ours).bypasses  # captured anew, not passed by
    _assert_equal(ours, eager)


def _with_defaults(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return lambda x, gate=gate, factor=factor: factor * _other_forward(gate, x)


def _with_keyword_defaults(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return lambda x, *, gate=gate, factor=factor: factor * _other_forward(gate, x)


def _with_a_closure(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return lambda x: factor * _other_forward(gate, x)


def _with_a_partial(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return functools.partial(_times_other_forward, gate, factor)


def _times_other_forward(gate: nn.Module, factor: float, x: Tensor) -> Tensor:
    return factor * _other_forward(gate, x)


@pytest.mark.parametrize(
    "make", [_with_defaults, _with_keyword_defaults, _with_a_closure, _with_a_partial]
)
def test_a_forward_put_into_a_submodule_after_the_first_step(make: Callable[..., Any]) -> None:
    ours, eager = _pair()
    _assert_equal(ours, eager)
    for factor in (2.0, 3.0):
        for model in (ours, eager):
            gate = model.layers[1].mlp
            gate.forward = make(gate, factor)
        _assert_equal(ours, eager)
    for model in (ours, eager):
        del model.layers[1].mlp.forward
    _assert_equal(ours, eager)


def test_a_submodule_replaced_and_a_class_swapped_after_the_first_step() -> None:
    class Other(Gate):
        forward = _other_forward

    ours, eager = _pair()
    _assert_equal(ours, eager)
    for model in (ours, eager):
        model.layers[0].mlp.__class__ = Other
        torch.manual_seed(3)
        model.layers[1].mlp = Other()
    _assert_equal(ours, eager)


@pytest.mark.parametrize(
    "register",
    [
        all_modules.register_module_forward_pre_hook,
        all_modules.register_module_forward_hook,
        all_modules.register_module_full_backward_pre_hook,
        all_modules.register_module_full_backward_hook,
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_hooks_of_all_modules_are_called_as_in_eager(register: Callable[..., Any], early) -> None:
    ours, eager = _pair()
    if not early:
        _assert_equal(ours, eager)
    seen: list[str] = []
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    calls = []
    for model in (ours, eager):
        seen.clear()
        model(torch.randn(2, 5, 16, requires_grad=True)).sum().backward()
        calls.append(list(seen))
    handle.remove()
    assert calls[0] == calls[1]
    assert "Linear" in calls[0]
    assert any("for all modules" in b.reason for b in explain(ours).bypasses)
    _assert_equal(ours, eager)
    assert explain(ours).by_rule()["glu"] == 2


def test_equal_blocks_share_a_graph_and_nothing_is_captured_twice() -> None:
    ours, eager = _pair()
    for _ in range(3):
        _assert_equal(ours, eager)
    assert explain(ours).graphs == 1
    watches = installed(ours.layers[0]).session.state.watches
    assert watches.get(ours.layers[0]).code == watches.get(ours.layers[1]).code
