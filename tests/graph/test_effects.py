"""What writes, and what draws random numbers: by schema and arguments, however it is spelled."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusewright.graph.effects import Effects, draws, has_effect, is_opaque, writes
from fusewright.kernels.norms import rms_norm

from ..capturing import capture

Fn = Callable[[Tensor, Tensor], Any]

_SHAPED = nn.SiLU(inplace=True)


@torch.library.custom_op("effects_test::scale_", mutates_args=("x",))
def _scale(x: Tensor, factor: float) -> None:
    x.mul_(factor)


@_scale.register_fake
def _(x: Tensor, factor: float) -> None: ...


def _set(x: Tensor, y: Tensor) -> Tensor:
    x[0] = y[0]
    return x


def _add(x: Tensor, y: Tensor) -> Tensor:
    x += y
    return x


def _custom(x: Tensor, y: Tensor) -> Tensor:
    _scale(x, 2.0)
    return x


def _checkpointed(x: Tensor, y: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(lambda t: t.add_(y), x, use_reentrant=False)


WRITES: dict[str, Fn] = {
    "positional": lambda x, y: F.relu(x, True),
    "keyword": lambda x, y: F.silu(x, inplace=True),
    "module": lambda x, y: _SHAPED(x),
    "method": lambda x, y: x.mul_(y),
    "function": lambda x, y: torch.relu_(x),
    "out": lambda x, y: torch.add(y, y, out=x),
    "operator": _add,
    "item": _set,
    "random": lambda x, y: x.bernoulli_(0.5),
    "dropout": lambda x, y: F.dropout(x, 0.5, True, True),
    "init": lambda x, y: nn.init.zeros_(x),
    "operator of a library": _custom,
    "checkpoint": _checkpointed,
    "embedding": lambda x, y: F.embedding(torch.arange(2), x, None, 1.0),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_seen(name: str) -> None:
    with torch.no_grad():
        module = capture(WRITES[name], torch.randn(4, 8), torch.randn(4, 8))
    first = {n for n in module.graph.nodes if n.op == "placeholder" and n.target == "L_x_"}
    assert {w for n in module.graph.nodes for w in writes(n)} == first
    assert all(has_effect(n) for n in module.graph.nodes if writes(n))


READS: dict[str, Fn] = {
    "not in place": lambda x, y: F.relu(x, False) + F.silu(x, inplace=False),
    "sort": lambda x, y: torch.sort(x)[0] + x.sort()[0],
    "statistics at rest": lambda x, y: F.batch_norm(x, y[0], y[1]),
    "statistics given as such": lambda x, y: F.batch_norm(x, y[0], y[1], training=False),
    "no statistics": lambda x, y: F.batch_norm(x, None, None, training=True),
    "embedding": lambda x, y: F.embedding(torch.arange(2), x),
    "numbers": lambda x, y: x * _count(x),
}


def _count(x: Tensor) -> int:
    n = x.shape[0]
    n += 1
    return n


@pytest.mark.parametrize("name", READS)
def test_what_only_reads_writes_nothing(name: str) -> None:
    module = capture(READS[name], torch.randn(4, 8), torch.rand(4, 8))
    assert not any(has_effect(n) for n in module.graph.nodes)


STATISTICS: dict[str, Fn] = {
    "positional": lambda x, y: F.batch_norm(x, y[0], y[1], None, None, True),
    "keyword": lambda x, y: F.batch_norm(x, y[0], y[1], training=True),
    "instance": lambda x, y: F.instance_norm(x[None], y[0], y[1]),
    "operator": lambda x, y: torch.batch_norm(
        x, None, None, y[0], y[1], True, 0.1, 1e-5, False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics_are_written(name: str) -> None:
    shape = (4, 4) if name == "instance" else (4, 8)
    module = capture(STATISTICS[name], torch.randn(shape), torch.rand(2, shape[-1]))
    written = [n for node in module.graph.nodes for n in writes(node)]
    assert len(written) == 2


DRAWS: dict[str, Fn] = {
    "dropout": lambda x, y: F.dropout(x),
    "dropout of features": lambda x, y: F.dropout1d(x, 0.1, True),
    "rand": lambda x, y: torch.rand_like(x) + torch.randn(4, 8),
    "method": lambda x, y: x.clone().normal_(),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, x, x, None, 0.1),
    "rrelu": lambda x, y: F.rrelu(x, training=True),
    "gumbel": lambda x, y: F.gumbel_softmax(x),
    "sample": lambda x, y: torch.multinomial(y, 2),
    "checkpoint": lambda x, y: torch.utils.checkpoint.checkpoint(
        F.dropout, x, use_reentrant=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_are_seen(name: str) -> None:
    module = capture(DRAWS[name], torch.randn(4, 8), torch.rand(4, 8))
    assert any(draws(n) for n in module.graph.nodes)


STEADY: dict[str, Fn] = {
    "evaluation": lambda x, y: F.dropout(x, 0.5, False),
    "evaluation by keyword": lambda x, y: F.dropout(x, training=False),
    "no share": lambda x, y: F.dropout(x, 0.0) + F.dropout1d(x, p=0.0),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "rrelu": lambda x, y: F.rrelu(x),
    "arithmetic": lambda x, y: torch.einsum("ab,cb->ac", x, y).softmax(-1) + x.std(),
}


@pytest.mark.parametrize("name", STEADY)
def test_what_draws_nothing_is_no_draw(name: str) -> None:
    module = capture(STEADY[name], torch.randn(4, 8), torch.rand(4, 8))
    assert not any(has_effect(n) for n in module.graph.nodes)


# ----------------------------------------------------------- nodes that no capture makes, or rarely


def _node(target: Any, *args: Any, kwargs: dict[str, Any] | None = None, op: str = "") -> fx.Node:
    """A call over inputs: tensors (``"x"``, ``"y"``), a number (``"n"``) and constants."""
    graph = fx.Graph()
    given: dict[str, fx.Node] = {}
    for name, value in (("x", torch.randn(4, 8)), ("y", torch.randn(4, 8)), ("n", 3)):
        given[name] = graph.placeholder(name)
        given[name].meta["example_value"] = value

    def place(value: Any) -> Any:
        return given.get(value, value) if isinstance(value, str) else value

    kind = op or ("call_method" if isinstance(target, str) else "call_function")
    named = {key: place(value) for key, value in (kwargs or {}).items()}
    return graph.create_node(kind, target, tuple(place(a) for a in args), named)


def _written(node: fx.Node) -> list[str]:
    return [n.name for n in writes(node)]


def _foreign(*args: Any) -> Any:
    """A function that nobody knows."""
    return args[0]


def test_what_nobody_knows_may_write_into_all_its_tensors() -> None:
    for node in (_node(_foreign, "n", "x", "y"), _node("inner", "n", "x", "y", op="call_module")):
        assert is_opaque(node)
        assert _written(node) == ["x", "y"]
        assert not draws(node)
    assert has_effect(_node(_foreign))
    for node in (_node(torch.neg, "x"), _node("neg", "x"), _node("x", op="get_attr")):
        assert not is_opaque(node)
        assert not has_effect(node)


@pytest.mark.parametrize("module", ["a.library", "z.library", "fusewright_plugin"])
def test_functions_of_other_libraries_are_not_ours(
    monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr(_foreign, "__module__", module)
    assert is_opaque(_node(_foreign, "x"))


def _random(x: Tensor) -> Tensor:
    return torch.rand_like(x)


def test_what_an_opaque_function_calls_is_not_looked_for() -> None:
    assert not draws(_node(_random, "x"))
    assert has_effect(_node(_random, "x"))


def test_ops_of_ours_and_what_a_rule_made_are_known() -> None:
    assert not has_effect(_node(rms_norm.reference, "x", "y", 1e-6))
    made = _node(_foreign, "x")
    made.meta["fusewright_rule"] = "glu"
    assert not has_effect(made)


def test_a_name_that_ends_in_an_underscore() -> None:
    assert _written(_node(nn.init.constant_, kwargs={"tensor": "x", "val": "y"})) == ["x"]
    assert _written(_node(nn.init.zeros_, "x")) == ["x"]
    assert _written(_node("requires_grad_", "x")) == ["x"]
    assert _written(_node("apply_", "x", abs)) == ["x"]  # has no schema
    # "and" is a word of the language
    assert _written(_node(operator.and_, "x", "y")) == []
    assert _written(_node("__and__", "x", "y")) == []
    assert _written(_node("__iand__", "x", "y")) == ["x"]
    assert _written(_node("__setitem__", "x", 0, "y")) == ["x"]
    assert _written(_node(operator.iadd, "x", "y")) == ["x"]


def test_lists_of_tensors_are_written_into() -> None:
    node = _node(torch._foreach_add_, "x", 1.0)
    node.args = ([node.args[0], node.args[0].next], 1.0)
    assert _written(node) == ["x", "y"]


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_share_that_is_given_as_the_operator_wants_it(share: float) -> None:
    assert draws(_node(torch.dropout, "x", share, True)) is (share > 0)
    assert not draws(_node(torch.dropout, "x", share, False))
    assert draws(_node(torch.bernoulli, "x"))
    assert draws(_node(torch.random.manual_seed, 3))


class _Writes(torch.autograd.Function):
    """Writes into what it is given, in forward or in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, early: bool) -> Tensor:
        ctx.early = early
        return x.mul_(2) if early else x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad if ctx.early else grad.mul_(2), None


@pytest.mark.parametrize("early", [True, False])
def test_an_autograd_function_that_writes(early: bool) -> None:
    x = torch.randn(4, 8, requires_grad=True)
    module = capture(lambda x: _Writes.apply(x * 1, early), x)
    node = next(n for n in module.graph.nodes if "autograd_function" in str(n.target))
    # its backward has inputs of its own
    assert bool(writes(node)) is early


# ------------------------------------------------------------------------- of a graph, as a whole


def _names(nodes: Any) -> list[str]:
    return [n.name.removeprefix("l_").strip("_") for n in nodes]


def _inputs(module: fx.GraphModule, places: list[int]) -> list[str]:
    placeholders = module.graph.find_nodes(op="placeholder")
    return _names([placeholders[i] for i in places])


def test_a_record_of_a_graph_that_was_edited_says_nothing() -> None:
    module = capture(lambda x, y: (x + y).sin().mul_(2), _x(), _x())
    effects = Effects(module)
    assert len(effects.writes) == 1
    sin = next(n for n in module.graph.nodes if n.target == "sin")
    edits: list[Callable[[], Any]] = [
        lambda: setattr(sin, "target", "cos"),
        lambda: sin.replace_input_with(sin.args[0], sin.args[0].args[0]),  # type: ignore[union-attr, arg-type]
        lambda: sin.update_kwarg("unknown", 1),
        lambda: module.graph.output_node().prepend(sin.prev),
        lambda: module.graph.erase_node(module.graph.output_node()),
    ]
    for edit in edits:
        assert effects.is_current()
        edit()
        assert not effects.is_current()
        with pytest.raises(RuntimeError, match="was edited"):
            _ = effects.writes
        effects = Effects(module)


def test_an_edit_of_a_nested_graph_is_one() -> None:
    module = capture(_checkpointed, _x(), _x())
    effects = Effects(module)
    inner = effects.graphs[1]
    assert [n.graph for n in effects.writes] == [module.graph, inner.graph]
    inner.graph.inserting_before(inner.graph.output_node())
    assert effects.is_current()
    inner.graph.call_function(torch.neg, (inner.graph.find_nodes(op="placeholder")[0],))
    assert not effects.is_current()


def test_writes_that_outlive_the_graph() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        z.add_(1)
        y.view(-1)[0].mul_(2)
        return z

    effects = Effects(capture(function, _x(), _x()))
    assert [n.target for n in effects.writes] == ["add_", "mul_"]
    assert [n.target for n, _ in effects.lasting_writes] == ["mul_"]


def test_the_last_write_into_each_memory() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        y.add_(1)
        x.view(-1).mul_(2)
        return x + y

    effects = Effects(capture(function, _x(), _x()))
    last = effects.last_writes[effects.module.graph]
    assert [n.target for n in last.values()] == ["mul_", "add_"]


def test_draws_in_a_checkpoint_that_nothing_uses() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        torch.rand(2)
        return torch.utils.checkpoint.checkpoint(_drawing, x, y, use_reentrant=False)

    def _drawing(x: Tensor, y: Tensor) -> Tensor:
        F.dropout(y, 0.5)
        return F.dropout(x, 0.5)

    effects = Effects(capture(function, _x(), _x()))
    assert len(effects.draws) == 4  # the checkpoint's, too
    assert [n.graph for n in effects.unused_draws] == [effects.graphs[1].graph]
    assert len(effects.checkpoints) == 1


def test_inputs_that_a_caller_may_write_into() -> None:
    def block(x: Tensor, states: Tensor, mask: Tensor, w: Tensor, ids: Tensor) -> Any:
        return x @ w + states[ids], mask

    x, states = _x().requires_grad_(), _x().requires_grad_()
    mask, w, ids = torch.ones(4, 1), nn.Parameter(torch.eye(8)), torch.arange(4)
    module = capture(block, x, states, mask, w, ids)
    assert _inputs(module, Effects(module).open_inputs) == ["x", "states"]
    for unchanged in (lambda x: (x * 2, x[:]), lambda x: (x * 1).mul_(x.detach().add_(1))):
        module = capture(unchanged, x)
        assert Effects(module).open_inputs == []


def test_inputs_that_need_a_gradient_and_get_none() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            z = y * 2
        return x * z

    module = capture(function, _x().requires_grad_(), _x().requires_grad_())
    assert _inputs(module, Effects(module).inputs_without_gradient) == ["y"]


OF_OUTPUTS: dict[str, tuple[Fn, bool]] = {
    "of the input": (lambda x, w: x * 2, True),
    "of both": (lambda x, w: x @ w, False),
    "of a weight": (lambda x, w: (x.detach() @ w, w * 2), False),
    "of one each": (lambda x, w: (x * 2, x @ w), True),
    "of the input, in a checkpoint": (
        lambda x, w: torch.utils.checkpoint.checkpoint(
            lambda t: (t * 2, t @ w), x, use_reentrant=False
        ),
        True,
    ),
    "of both, in a checkpoint": (
        lambda x, w: torch.utils.checkpoint.checkpoint(lambda t: t @ w, x, use_reentrant=False),
        False,
    ),
}


@pytest.mark.parametrize("output", OF_OUTPUTS)
def test_outputs_that_have_a_gradient_of_inputs_alone(output: str) -> None:
    function, expected = OF_OUTPUTS[output]
    module = capture(function, _x().requires_grad_(), nn.Parameter(torch.eye(8)))
    inputs = {n for n in module.graph.find_nodes(op="placeholder") if "x" in n.name}
    assert len(inputs) == 1
    assert Effects(module).gives_gradient_alone(inputs) is expected


def _x() -> Tensor:
    return torch.randn(4, 8)
