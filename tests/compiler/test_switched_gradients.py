"""What a block says of its output, and of its input, where the input needs no gradient."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import optimize
from tests.explained import explain

from ..models.tiny import Stack


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(self.norm(x))
        return x + y


class _Trained(_Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class _FrozenInAMethod(_Trained):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x)

    def part(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.linear(self.norm(x))  # type: ignore[no-any-return]


class _Checkpointed(_Trained):
    """A reentrant checkpoint of what needs no gradient has none."""

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.part, x, use_reentrant=True)

    def part(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))  # type: ignore[no-any-return]


class _AsksByName(_Trained):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        return x + y if getattr(x, "requires_grad") else x + y.detach()  # noqa: B009


class _AsksByOneOfSomeNames(_Trained):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        for name in ("is_cuda", "requires_grad"):
            y = y if getattr(x, name) else y.detach()
        return x + y


class _Asks(_Trained):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        return x + y if x.requires_grad else x + y.detach()  # type: ignore[no-any-return]


class _Adds(_Trained):
    """It writes into its input, which cannot be a leaf then."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(self.norm(x)))


class _Asked(_Trained):
    """It lets its input need a gradient, which stays."""

    def forward(self, x: Tensor) -> Tensor:
        return x.requires_grad_() + self.linear(self.norm(x))


class _FrozenInACheckpoint(_FrozenInAMethod):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda t: t + self.part(t), x, use_reentrant=False)  # type: ignore[no-any-return]


class _Unused(_Trained):
    """What is trained has no part in the output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(self.norm(x), self.linear.weight)


def _two(kind: type[nn.Module]) -> Stack:
    return Stack(kind() for _ in range(2))


@pytest.mark.parametrize(
    "kind",
    [
        _Frozen, _FrozenInAMethod, _Checkpointed, _Asks,
        _AsksByName, _AsksByOneOfSomeNames, _Adds, _Trained, _Asked, _FrozenInACheckpoint,
    ],
)  # fmt: skip
def test_an_output_needs_a_gradient_where_it_does_in_eager_mode(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 5, 16), _two(kind)
    given = x.clone(), x.clone()
    expected = model(given[0])
    made = optimize(model, codegen="inductor")(given[1])
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(*given)
    assert made.requires_grad is expected.requires_grad
    assert given[0].requires_grad is given[1].requires_grad


class _Detached(_Trained):
    def forward(self, x: Tensor) -> Tensor:
        n = F.rms_norm(x, (16,), self.norm.weight.detach())
        return x + F.linear(n, self.linear.weight.detach())


class _Compared(_Trained):
    def forward(self, x: Tensor) -> Tensor:
        return x * (self.norm.weight > 0) + F.linear(x, self.linear.weight.data)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("kind", [_Frozen, _Detached, _Compared, _FrozenInACheckpoint])
def test_hooks_of_weights_that_get_no_gradient_are_not_called(
    kind: type[nn.Module], codegen: str
) -> None:
    seen: list[list[str]] = [[], []]
    model = _two(kind)
    for layer in model.layers:
        layer.other = nn.Linear(16, 16)
    eager = copy.deepcopy(model)
    for m, calls in ((eager, seen[0]), (optimize(model, codegen=codegen), seen[1])):
        for name, p in m.named_parameters():
            p.register_hook(lambda g, n=name, c=calls: c.append(n))
        x = torch.randn(2, 5, 16, requires_grad=True)
        m(x * 1).sum().backward()
        assert x.grad is not None
    assert seen == [[], []]


def test_an_output_needs_no_gradient_of_what_is_not_used() -> None:
    torch.manual_seed(0)
    eager = _two(_Unused).requires_grad_(False)
    for layer in eager.layers:
        layer.linear.bias.requires_grad_()
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    x = torch.randn(2, 5, 16)
    for _ in range(2):
        assert [m(x).requires_grad for m in (eager, ours)] == [False, False]
        for model in (eager, ours):
            model.layers[0].norm.weight.requires_grad_()
        assert [m(x).requires_grad for m in (eager, ours)] == [True, True]
        for model in (eager, ours):
            model.layers[0].norm.weight.requires_grad_(False)
    assert explain(ours).by_rule()


def test_a_weight_that_is_unfrozen_later_has_its_gradient() -> None:
    torch.manual_seed(0)
    eager = _two(_Trained)
    eager.layers[0].norm.requires_grad_(False)
    eager.layers[1].norm.requires_grad_(False)
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    x = torch.randn(2, 5, 16)
    for unfrozen in (False, True):
        for model in (eager, ours):
            model.layers[0].norm.requires_grad_(unfrozen)
            model(x).square().sum().backward()
    expected, found = (m.layers[0].norm.weight.grad for m in (eager, ours))
    torch.testing.assert_close(found, expected)


def test_a_block_that_writes_into_a_first_input_without_a_gradient_is_captured() -> None:
    model = optimize(_two(_Adds), codegen="inductor")
    model(torch.randn(2, 5, 16)).sum().backward()
    found = explain(model)
    assert found.by_rule()["rms_norm"] == 2
    assert not found.bypasses


@dataclasses.dataclass
class _Result:
    y: Tensor
    x: Tensor


class _Holder(_Trained):
    """It keeps its input in several places, returns it, and reads and sets its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = [{}]
        self.register_buffer("last", torch.zeros(1), persistent=False)
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> _Result:
        self.own = self.last = self.kept[0]["x"] = x
        x.seen = True  # type: ignore[attr-defined]
        return _Result(x + self.linear(self.norm(x)) * getattr(x, "factor", 1.0), x)


class _Holders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Holder(), _Holder()])

    def forward(self, x: Tensor) -> _Result:
        first = self.layers[0](x)
        self.layers[1](first.y)
        return first  # type: ignore[no-any-return]


def test_a_block_that_keeps_and_returns_its_input_has_that_input() -> None:
    torch.manual_seed(0)
    eager = _Holders()
    ours, made = optimize(copy.deepcopy(eager), codegen="inductor"), []
    for model in (eager, ours):
        x: Any = torch.ones(2, 5, 16)
        x.factor = 2.0
        found, block = model(x), model.layers[0]
        assert found.x is x is block.own is block.last is block.kept[0]["x"]
        assert found.y.requires_grad
        assert not x.requires_grad
        assert x.seen
        made.append(found.y)
    torch.testing.assert_close(*made)
    assert not explain(ours).bypasses


@pytest.mark.parametrize("part", ["twice", "mean"])
def test_what_is_made_of_an_input_without_a_gradient_has_none(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: Tensor) -> _Result:
        if part == "mean":
            self.mean.copy_(x.mean((0, 1)))
            return _Result(x + self.linear(self.norm(x)), x)
        y, self.twice = checkpoint(lambda t: (self.linear(t), t * 2), x, use_reentrant=False)
        return _Result(x + y, x)

    monkeypatch.setattr(_Holder, "forward", forward)
    ours = optimize(_Holders(), codegen="inductor")
    assert ours(torch.ones(2, 5, 16)).y.requires_grad
    assert not getattr(ours.layers[0], part).requires_grad


class _Drops(_Adds):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.linear(self.norm(x)) * random.uniform(0.5, 1.0))


def test_a_graph_that_is_refused_draws_no_number_of_python() -> None:
    torch.manual_seed(0)
    eager, made = _two(_Drops), []
    for model in (eager, optimize(copy.deepcopy(eager), codegen="inductor")):
        random.seed(0)
        for needs in (True, False):
            last = model(torch.ones(2, 5, 16, requires_grad=needs) * 1)
        made.append((last, torch.tensor(random.random())))
    torch.testing.assert_close(made[1], made[0])


@pytest.mark.parametrize("kind", [_Unused, _Adds, _Checkpointed])
def test_a_graph_of_an_input_with_a_gradient_is_not_for_one_without(kind: type[nn.Module]) -> None:
    """As where an embedding is frozen between two steps."""
    torch.manual_seed(0)
    eager = _two(kind).to(torch.bfloat16)
    if kind is _Unused:
        eager.requires_grad_(False)
        for layer in eager.layers:
            layer.linear.bias.requires_grad_()
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    for needs in (True, False, True, False):
        x = torch.randn(2, 5, 16).bfloat16().requires_grad_(needs)
        assert [m(x * 1).requires_grad for m in (eager, ours)] == [needs or kind is _Adds] * 2
