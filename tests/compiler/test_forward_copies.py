"""Copies of forwards see what the originals see, and leave nothing behind."""

from __future__ import annotations

import functools
import gc
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.compiler.copies.forward_copies import FunctionCopies, clone_function, using_copies

from ..models.zoo import FAMILIES, build

SCALE = 1.0


def _double(x: Tensor) -> Tensor:
    return x * 2


def _triple(x: Tensor) -> Tensor:
    return x * 3


def _with_triple(live: bool = False) -> FunctionCopies:
    """Copies that call ``_triple`` where the function calls ``_double``."""
    return FunctionCopies(lambda value, names: _triple if value is _double else None, live=live)


def _set_scale(value: float) -> None:
    global SCALE
    SCALE = value


class _Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _double(x) * SCALE


class _ScalesLate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        _set_scale(5.0)
        return _double(x) * SCALE


class _SetsGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        global SCALE
        SCALE = 1.0
        return _double(x)


class _Static(nn.Module):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _double(x)


class _Helper:
    def forward(self, x: Tensor) -> Tensor:
        return _double(x)


def _decorated(function: Callable[..., Any]) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class _Decorated(nn.Module):
    @_decorated
    def forward(self, x: Tensor) -> tuple[Tensor, list[str], str | None]:
        """Its text."""
        forward = self.forward.__func__
        return _double(x), list(inspect.signature(self.forward).parameters), forward.__doc__


def _run(module: nn.Module, copies: FunctionCopies) -> Any:
    """The result of one call in which the module runs a copy of its forward, if there is one."""
    block = nn.Sequential(module)
    with using_copies(copies.below(block)):
        result = block(torch.ones(()))
    assert "forward" not in vars(module) or vars(module)["forward"].__self__ is not module
    return result


def test_a_copy_calls_the_replacement_for_one_call_only() -> None:
    _set_scale(1.0)
    module = _Scaled()
    assert _run(module, _with_triple()) == 3
    assert module(torch.ones(())) == 2


def test_other_globals_are_those_of_the_moment() -> None:
    _set_scale(1.0)
    assert _run(_ScalesLate(), _with_triple(live=True)) == 15
    frozen = _with_triple()
    for scale in (2.0, 4.0):  # a copy with their values is made again when one has changed
        _set_scale(scale)
        assert _run(_Scaled(), frozen) == 3 * scale


def test_forwards_that_have_no_copies_run_as_they_are() -> None:
    """Functions that set globals, which a copy would lose, and those of other objects."""
    borrowed = nn.Identity()
    borrowed.forward = _Helper().forward
    for module in (_SetsGlobal(), _Static(), borrowed):
        assert _run(module, _with_triple()) == 2


def test_a_decorated_forward_keeps_its_signature() -> None:
    result, names, text = _run(_Decorated(), _with_triple(live=True))
    assert (result, names, text) == (3, ["x"], "Its text.")


def _weight_of_a_model_with_a_forward_of_its_own() -> weakref.ref[Tensor]:
    model = build(FAMILIES[0], lora=False)
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    attention.forward = types.MethodType(forward, attention)
    optimize(model, codegen="eager")
    ids = torch.arange(3, 17).reshape(2, 7)
    model(input_ids=ids, labels=ids).loss.backward()
    restore(model)
    return weakref.ref(attention.q_proj.weight)


def test_a_forward_made_for_one_module_does_not_keep_the_model() -> None:
    """A function in an instance holds the module in its closure."""
    torch._dynamo.reset()
    weight = _weight_of_a_model_with_a_forward_of_its_own()
    torch._dynamo.reset()
    for _ in range(3):
        gc.collect()
    assert weight() is None


# --- clones of functions --------------------------------------------------------------------------


def _function() -> types.FunctionType:
    """A function with everything that a function can have."""
    inner, factor = (lambda x: x + 1), 10

    @functools.wraps(inner)
    def outer(x: int = 2, *, k: int = 3) -> int:
        """Its text."""
        return inner(x) * factor * k + OFFSET

    outer.__name__, outer.__qualname__, outer.__doc__ = "name", "Class.name", "text"
    outer.mark = object()  # type: ignore[attr-defined]
    assert isinstance(outer, types.FunctionType)
    return outer


OFFSET = 0.0


def test_a_clone_is_its_originals_equal() -> None:
    function = _function()
    clone = clone_function(function)
    assert clone is not function
    assert clone() == function() == 90
    for name in (
        "__code__", "__globals__", "__closure__", "__defaults__", "__kwdefaults__",
        "__annotations__", "__name__", "__qualname__", "__module__", "__doc__", "__dict__",
    ):  # fmt: skip
        assert getattr(clone, name) == getattr(function, name), name
    assert clone.__dict__["__wrapped__"] is function.__dict__["__wrapped__"]
    assert inspect.signature(clone, follow_wrapped=False) == inspect.signature(
        function, follow_wrapped=False
    )
    clone.mark = None  # type: ignore[attr-defined]
    assert function.__dict__["mark"] is not None
    plain = clone_function(_set_scale)  # type: ignore[arg-type]
    assert not plain.__dict__
    assert plain.__closure__ is None


def test_a_clone_has_other_globals_and_cells() -> None:
    function = _function()
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    assert list(cells) == ["factor", "inner"]
    clone = clone_function(function, {**globals(), "OFFSET": 5}, [None, lambda x: x + 2], "_1")
    assert (clone(), function()) == (4 * 10 * 3 + 5, 90)
    cells["factor"].cell_contents = 1  # shared
    assert (clone(), function()) == (4 * 1 * 3 + 5, 9)
    assert clone.__code__.co_name == function.__code__.co_name + "_1"
    assert clone.__code__ is not function.__code__
    assert clone.__name__ == "name"
    with pytest.raises(ValueError, match="zip"):
        clone_function(function, None, [None])
