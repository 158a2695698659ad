"""Modes along a graph, and what may be erased from one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from fusewright.graph.cleanup import prune
from fusewright.graph.effects import modes, switches_mode

from ..rewrite.graphs import named, trace

_enter, _exit = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
_grad = torch._C._set_grad_enabled
BF16 = ("cpu", torch.bfloat16, True, None)
S = (2, 3)


class _Graph(fx.Graph):
    """A graph that is written down call by call, with a node between the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.between = [self.placeholder("x")]

    def call(self, function: Any, *args: Any) -> fx.Node:
        """Add a call, and an ordinary node behind it."""
        made = self.call_function(function, args)
        self.between.append(self.call_function(torch.neg, (self.between[0],)))
        return made

    def found(self) -> list[tuple[Any, ...]]:
        """The modes of the ordinary nodes."""
        by_node = modes(self)
        return [by_node[n] for n in self.between]


def test_gradients_are_on_or_off() -> None:
    graph = _Graph()
    for on in (False, True, False):
        graph.call(_grad, on)
    assert graph.found() == [(True,), (False,), (True,), (False,)]
    with torch.no_grad():
        assert graph.found()[0] == (False,)


def test_what_is_entered_and_left() -> None:
    graph = _Graph()
    outer = graph.call(_enter, *BF16)
    inner = graph.call(_enter, *BF16)
    graph.call(_exit, inner)
    graph.call(_exit, outer)
    on = (True,)
    assert graph.found() == [on, (*on, outer), (*on, outer, inner), (*on, outer), on]
    again = graph.call(_enter, *BF16)
    assert graph.found()[-1] == (*on, again)  # another one than the first


def test_what_ends_in_another_order_is_a_mode_of_its_own() -> None:
    graph = _Graph()
    outer = graph.call(_enter, *BF16)
    inner = graph.call(_enter, *BF16)
    odd = graph.call(_exit, outer)
    assert graph.found()[-1] == (True, outer, inner, odd)
    alone = _Graph()
    lost = alone.call(_exit, None)
    assert alone.found()[-1] == (True, lost)


def test_a_call_that_begins_like_an_exit() -> None:
    graph = _Graph()
    outer = graph.call(_enter, *BF16)

    def _increment_nesting(x: Any) -> None: ...

    deeper = graph.call(_increment_nesting, outer)
    assert graph.found()[-1] == (True, outer, deeper)


@pytest.mark.parametrize(
    ("function", "switches"),
    [
        (_enter, True),
        (_exit, True),
        (_grad, True),
        (torch._C._functorch._vmap_increment_nesting, True),
        (torch._C._functorch._vmap_decrement_nesting, True),
        (torch._C._autograd._saved_tensors_hooks_disable, True),
        (torch.neg, False),
        (torch.relu_, False),
    ],
)
def test_what_switches_a_mode(function: Any, switches: bool) -> None:
    assert switches_mode(fx.Graph().call_function(function, ())) is switches


def test_only_functions_switch_modes() -> None:
    graph = fx.Graph()
    assert not switches_mode(graph.placeholder("set_grad_enabled"))
    assert not switches_mode(graph.call_method("neg", (graph.placeholder("x"),)))
    assert not switches_mode(graph.get_attr("set_grad_enabled"))


# ------------------------------------------------------------------------------------ what is dead


def _names(nodes: set[fx.Node]) -> set[str]:
    return {n.name for n in nodes}


def _left(module: fx.GraphModule) -> list[str]:
    return [n.name for n in module.graph.nodes if n.op.startswith("call")]


def test_what_only_dead_nodes_used_is_dead() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        torch.exp(torch.tanh(torch.sin(x)) + torch.cos(y))
        return torch.cos(x)

    module = trace(fn, S, S)
    assert _names(prune(module.graph, [named(module, "exp")])) == {
        "exp", "add", "tanh", "sin", "cos"
    }  # fmt: skip
    assert _left(module) == ["cos_1"]
    assert len(module.graph.find_nodes(op="placeholder")) == 2


def test_what_is_used_stays_and_what_it_uses() -> None:
    def fn(x: Tensor) -> Tensor:
        kept = torch.tanh(torch.sin(x))
        torch.exp(kept)
        return kept + 1

    module = trace(fn, S)
    nodes = [named(module, n) for n in ("tanh", "x", "exp", "sin", "output")]
    assert _names(prune(module.graph, nodes)) == {"exp"}
    assert _left(module) == ["sin", "tanh", "add"]
    # nothing is dead that nobody asked for
    assert prune(module.graph, []) == set()


def test_a_node_that_is_asked_for_twice() -> None:
    module = trace(lambda x: (torch.exp(torch.sin(x)), x)[1], S)
    exp, sin = named(module, "exp"), named(module, "sin")
    assert prune(module.graph, [exp, sin, exp, sin]) == {exp, sin}
    assert _left(module) == []


def test_effects_are_never_dead() -> None:
    def fn(x: Tensor, y: Tensor) -> Tensor:
        torch.tanh(x).add_(1)
        torch.rand_like(x)
        torch.exp(y)
        return y * 2

    module = trace(fn, S, S)
    with module.graph.inserting_before(named(module, "mul")):
        module.graph.call_function(_grad, (False,))
        module.graph.call_function(_grad, (True,))
    nodes = [n for n in reversed(module.graph.nodes) if n.op.startswith("call") and not n.users]
    assert _names(prune(module.graph, nodes)) == {"exp"}
    assert _left(module) == [
        "tanh", "add_", "rand_like", "_set_grad_enabled", "_set_grad_enabled_1", "mul"
    ]  # fmt: skip
