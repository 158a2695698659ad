"""Writes that become values: only where nothing can tell; and casts that are made once."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusewright.graph.cleanup import remove_noops
from fusewright.graph.effects import draws, writes
from fusewright.graph.functionalize import remove_writes

from ..capturing import capture

Fn = Callable[[Tensor, Tensor], Tensor]


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 8, generator=generator), torch.randn(8, 8, generator=generator)
    return x.requires_grad_(), w.requires_grad_()


def _results(run: Callable[..., object]) -> list[Tensor]:
    x, w = _inputs()
    given = run(x, w)
    out = given[0] if isinstance(given, tuple) else given
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (x, w))]


def _writes(module: fx.GraphModule) -> int:
    return sum(bool(writes(n)) for n in module.graph.nodes)


def _assert_exact(module: fx.GraphModule, before: fx.GraphModule) -> None:
    names = [n.target for n in module.graph.nodes if n.op == "placeholder"]
    first = next(n for n in module.graph.nodes if n.op == "placeholder")
    swapped = first.meta["example_value"].shape[0] == 8
    assert len(names) == 2

    def call(graph: fx.GraphModule) -> Callable[..., object]:
        return lambda x, w: graph(*((w, x) if swapped else (x, w)))

    for ours, theirs in zip(_results(call(module)), _results(call(before)), strict=True):
        assert torch.equal(ours, theirs)


def _add(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y.add_(x)
    return y * 2


def _clamp(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y.clamp_(max=0.5)
    return y * x


def _fill(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y.masked_fill_(x > 0, 0.0)
    return y * x


def _invert(x: Tensor, w: Tensor) -> Tensor:
    _, order = torch.sort(x[:, 0])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return F.linear(x, w)[inverse]


def _broadcast(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y.add_(x[0])
    return y * x


def _operator(x: Tensor, w: Tensor) -> Tensor:
    y = x + F.linear(x, w)
    y *= x
    return y


def _activation(x: Tensor, w: Tensor) -> Tensor:
    g = F.linear(x, w)
    h = F.silu(g, inplace=True)
    return h * 2 + g


def _positional(x: Tensor, w: Tensor) -> Tensor:
    g = F.linear(x, w)
    return F.relu(g, True) * x + g


@pytest.mark.parametrize(
    "fn",
    [_add, _clamp, _fill, _invert, _broadcast, _operator, _activation, _positional],
)
def test_a_write_into_a_fresh_value_becomes_a_value(fn: Fn) -> None:
    module = capture(fn, *_inputs())
    before = copy.deepcopy(module)
    assert _writes(module) == 1
    assert remove_writes(module) == 1
    assert _writes(module) == 0
    _assert_exact(module, before)


def _under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    with torch.no_grad():
        y.clamp_(max=0.1)
    return x + F.linear(y, w)


def _chunk_before(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    a, b = y.chunk(2, -1)
    y.add_(x)
    return torch.cat((b, a), -1)


def _unbind_before(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    rows = y.unbind(0)
    y.add_(x)
    return torch.stack(rows[::-1]) * x


def _view_before(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    seen = y.view(-1)
    y.add_(x)
    return seen.view(6, 8) * x


def _detached_before(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    seen = y.detach()
    y.add_(x)
    return y + seen


def _into_a_view(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    y[0].add_(x[0])
    return y * x


def _of_the_caller(x: Tensor, w: Tensor) -> Tensor:
    y = x.float()  # x itself
    y += 1
    return F.linear(y, w)


def _random(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    F.dropout(y, 0.5, True, True)
    return y * x


def _in_a_checkpoint(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)

    def body(t: Tensor) -> Tensor:
        return t.add_(x)

    z = torch.utils.checkpoint.checkpoint(body, y, use_reentrant=False)
    return y * z


def _a_part(x: Tensor, w: Tensor) -> Tensor:
    _, order = torch.sort(x[:, 0])
    inverse = torch.zeros_like(order)
    inverse[order] = torch.arange(order.shape[0]) + 0
    return F.linear(x, w)[inverse]


@pytest.mark.parametrize(
    "fn",
    [_under_no_grad, _chunk_before, _unbind_before, _view_before, _detached_before, _into_a_view,
     _of_the_caller, _random, _in_a_checkpoint, _a_part],
)  # fmt: skip
def test_a_write_that_something_else_sees_stays(fn: Fn) -> None:
    # PyTorch itself refuses a write below several views at once where gradients are recorded
    with torch.set_grad_enabled(fn not in (_chunk_before, _unbind_before, _of_the_caller)):
        module = capture(fn, *_inputs())
    before = copy.deepcopy(module)
    assert remove_writes(module) == 0
    assert _writes(module) == _writes(before) > 0


def test_a_cast_is_not_shared_with_another_mode() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        h = F.linear(x, w)
        with torch.no_grad():
            largest = h.double().abs().max()
        return (h.double() / largest).float()

    module = capture(fn, *_inputs())
    before = copy.deepcopy(module)
    remove_noops(module)
    _assert_exact(module, before)


def test_a_cast_that_is_made_twice_is_made_once() -> None:
    module = capture(lambda x, w: x.double().sum() + x.double().max() + w.sum(), *_inputs())
    before = copy.deepcopy(module)
    assert remove_noops(module) == 1
    _assert_exact(module, before)


Made = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

TWICE: dict[str, Made] = {
    "both are returned": lambda x, w: (x.double(), x.double() + w.sum()),
    "a view is returned": lambda x, w: (x.double()[0], x.double() + w.sum()),
    "one is written to": lambda x, w: (x.double().mul_(2) * 1, x.double() + w.sum()),
}


@pytest.mark.parametrize("name", TWICE)
def test_two_casts_that_a_write_would_tell_apart_stay_two(name: str) -> None:
    module = capture(TWICE[name], *_inputs())
    assert remove_noops(module) == 0


@pytest.mark.parametrize("draw", [lambda x: F.dropout(x, 0.5), torch.rand_like])
def test_an_unused_draw_of_random_numbers_stays(draw: Callable[[Tensor], Tensor]) -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        draw(F.linear(x, w))
        x.neg()  # this may go
        return F.linear(x, w) * 2

    module = capture(fn, *_inputs())
    assert remove_noops(module) == 1
    assert any(draws(n) for n in module.graph.nodes)
