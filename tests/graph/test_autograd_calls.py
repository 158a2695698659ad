"""Captured autograd functions: what they save, and for how long; derivatives of derivatives."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fusewright.graph import facts, functionalize
from fusewright.graph.effects import Effects
from fusewright.graph.functionalize import require_marked_writes
from fusewright.graph.opaque import autograd_functions
from fusewright.graph.opaque.autograd_functions import drop_unread_results, is_wrapped
from fusewright.graph.run import eager
from fusewright.rewrite.verify_exact import Plain

from ..capturing import capture

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class _Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, power: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.power = power
        return x**power

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.power * x ** (ctx.power - 1) * grad, None


class _Kept(torch.autograd.Function):
    """Keeps a number and a tensor besides what it saves, and returns what has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.amax(-1, keepdim=True)
        ctx.save_for_backward(weight)
        ctx.x, ctx.size = x, x.shape[-1]
        ctx.mark_non_differentiable(largest)
        return x * weight, largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return grad * weight, (grad * ctx.x).sum(0) * (ctx.size / ctx.x.shape[-1])


class _Doubled(torch.autograd.Function):
    """Writes to its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class _Sigmoid(torch.autograd.Function):
    """Saves its own output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = 1 / (1 + (-x).exp())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            return grad * y * (1 - y)


def _power(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = _Power.apply(x * weight, 3)
    return made.sin() + x


def _kept(x: Tensor, weight: Tensor) -> Tensor:
    product, largest = _Kept.apply(x, weight)
    made: Tensor = product.sin() * largest
    return made


def _doubled(x: Tensor, weight: Tensor) -> Tensor:
    h = x * weight
    _Doubled.apply(h)
    return h.sin()


def _sigmoid(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = _Sigmoid.apply(x * weight)
    return made * x


class _Wave(torch.autograd.Function):
    """Makes values on its way, one of which it saves, and returns what has no gradient last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        sine = x.sin()
        ctx.save_for_backward(sine, x)
        largest = x.amax()
        ctx.mark_non_differentiable(largest)
        return sine * x.exp(), largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        sine, x = ctx.saved_tensors
        made: Tensor = grad * x.exp() * (sine + x.cos())
        return made


def _waved(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = _Wave.apply(x * weight)[0]
    return made


def _checkpointed(x: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = checkpoint(_sigmoid, x, weight, use_reentrant=False)
    return made


FUNCTIONS = (_power, _kept, _doubled, _sigmoid)


def _inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    return x.requires_grad_(), weight.requires_grad_()


def _by_graph(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    module = capture(fn, *_inputs())
    assert any(is_wrapped(node) for node in module.graph.nodes)
    try:
        require_marked_writes(Effects(module))
    except NotImplementedError as error:
        if functionalize.KNOWS_MARK_DIRTY:
            raise
        pytest.skip(str(error))  # of another version of PyTorch
    run = eager(module)
    assert not any(is_wrapped(node) for node in module.graph.nodes)
    return lambda *inputs: run(*inputs)[0]


def test_a_write_that_is_forgotten_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11 forgets that a function has marked its input as written to."""
    written, other = (capture(fn, *_inputs()) for fn in (_doubled, _power))
    monkeypatch.setattr(functionalize, "KNOWS_MARK_DIRTY", False)
    with pytest.raises(NotImplementedError, match="writes to its input"):
        require_marked_writes(Effects(written))
    require_marked_writes(Effects(other))
    monkeypatch.setattr(functionalize, "KNOWS_MARK_DIRTY", True)
    require_marked_writes(Effects(written))


def test_what_is_returned_twice_is_refused_where_its_gradient_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch 2.11 makes an output of each value that a function computes."""
    module = capture(_sigmoid, *_inputs())
    body = module.fwd_body_0
    returned: Any = body.graph.output_node()
    (outputs, saved), made = returned.args[0], returned.args[0][0][0]
    monkeypatch.setattr(functionalize, "KNOWS_MARK_DIRTY", False)
    require_marked_writes(Effects(module))
    returned.args = (((*outputs, made), saved),)
    with pytest.raises(NotImplementedError, match="loses its gradient"):
        require_marked_writes(Effects(module))


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_values_and_gradients(fn: Callable[..., Tensor]) -> None:
    found = []
    for run in (fn, _by_graph(fn)):
        inputs = _inputs()
        out = run(*inputs)
        loss = out.square().sum()
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        found.append([out, *first, *torch.autograd.grad(loss, inputs)])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _with_values_inside(module: fx.GraphModule) -> fx.Node:
    """Let the function return each tensor that it makes, as PyTorch 2.11 lets all; its call."""
    call = next(node for node in module.graph.nodes if is_wrapped(node))
    forward, backward = module.fwd_body_0, module.bwd_body_0
    output = forward.graph.output_node()
    results, saved = output.args[0]
    inside = [n for n in forward.graph.nodes if isinstance(facts.tensor(n), Tensor)]
    inside = [n for n in inside if n.op != "placeholder" and n not in results]
    output.args = (((*results, *inside), saved),)
    gradients = backward.graph.find_nodes(op="placeholder")
    with backward.graph.inserting_before(gradients[len(results)]):
        for i in range(len(inside)):
            backward.graph.placeholder(f"unused_{i}")
    call.meta["example_value"] = (*call.meta["example_value"], *map(facts.tensor, inside))
    forward.recompile()
    backward.recompile()
    return call


@pytest.mark.parametrize("fn", [_waved, _sigmoid])
def test_what_is_made_inside_is_returned_only_where_it_is_read(fn: Callable[..., Tensor]) -> None:
    module = capture(fn, *_inputs())
    before = [str(body.graph) for body in (module.fwd_body_0, module.bwd_body_0)]
    call = _with_values_inside(module)
    grown = len(call.meta["example_value"])
    assert grown > len(call.users)
    drop_unread_results(module.graph)
    assert len(call.meta["example_value"]) == 1 + max(user.args[1] for user in call.users)
    assert [str(body.graph) for body in (module.fwd_body_0, module.bwd_body_0)] == before
    inputs, others = _inputs(), _inputs()
    ours = torch.autograd.grad(eager(module)(*inputs)[0].square().sum(), inputs)
    theirs = torch.autograd.grad(fn(*others).square().sum(), others)
    assert all(map(torch.equal, ours, theirs))

    module = capture(fn, *_inputs())
    call = _with_values_inside(module)
    with module.graph.inserting_after(call):
        last = module.graph.call_function(operator.getitem, (call, grown - 1))
    (outputs,) = module.graph.output_node().args
    module.graph.output_node().args = ((*outputs, last),)
    drop_unread_results(module.graph)
    assert len(call.meta["example_value"]) == grown


def test_inside_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    own = autograd_functions._Applied.apply

    def noted(*args: Any) -> Any:
        calls.append(None)
        return own(*args)

    monkeypatch.setattr(autograd_functions._Applied, "apply", noted)
    run = eager(capture(_checkpointed, *_inputs()))
    inputs, others = _inputs(), _inputs()
    ours = torch.autograd.grad(run(*inputs)[0].square().sum(), inputs)
    theirs = torch.autograd.grad(_checkpointed(*others).square().sum(), others)
    assert all(map(torch.equal, ours, theirs))
    assert len(calls) == 2  # once in forward, once in backward


def test_arguments_that_are_not_known_are_for_the_operator_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another version of PyTorch may have others."""
    module = capture(_power, *_inputs())
    call = next(node for node in module.graph.nodes if is_wrapped(node))
    given: list[Any] = []
    operator = torch.ops.higher_order.autograd_function_apply
    monkeypatch.setattr(type(operator), "__call__", lambda self, *args, **kw: given.append(kw))
    body: Any = None
    autograd_functions.applied(body, body, **call.kwargs, another=[])
    assert given == [{**call.kwargs, "another": []}]


@pytest.mark.parametrize("fn", [_power, _sigmoid])
def test_derivatives_of_derivatives(fn: Callable[..., Tensor]) -> None:
    """A residual has a second derivative of its own: one that is lost beside it is not noticed."""

    def penalty(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = _inputs()
        grads = torch.autograd.grad(run(*inputs).square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    run = _by_graph(fn)
    for _ in range(2):
        for ours, theirs in zip(penalty(run), penalty(fn), strict=True):
            torch.testing.assert_close(ours, theirs)
    inputs = _inputs()
    assert torch.autograd.gradgradcheck(run, inputs)


def test_under_a_transform() -> None:
    (x, weight), run = _inputs(), _by_graph(_power)
    found = torch.func.grad(lambda x: run(x, weight.detach()).square().sum())(x.detach())
    exact = torch.autograd.grad(_power(x, weight).square().sum(), x)[0]
    torch.testing.assert_close(found, exact)


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("verifying", [False, True])
def test_backward_frees_what_was_saved(verifying: bool) -> None:
    """At once, and not when Python's collector comes by."""
    module = capture(lambda x: _Power.apply(x, 3).sin(), torch.randn(4, requires_grad=True))
    bodies = dict(module.named_children())
    run = Plain(module.graph, bodies).outputs if verifying else eager(module)
    gc.collect()
    leaf = torch.randn(4, requires_grad=True)
    saved = leaf * 1.0
    alive = weakref.ref(saved)
    out = run(saved)[0]
    del saved
    assert alive() is not None
    out.sum().backward()
    del out
    assert alive() is None
    assert leaf.grad is not None
