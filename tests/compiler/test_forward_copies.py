"""Copies of forwards see what the originals see, and leave nothing behind."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fusewright import optimize, restore
from fusewright.compiler.copies import decoding
from fusewright.compiler.copies.decoding import Decoding
from fusewright.compiler.copies.forward_copies import clone_function
from fusewright.kernels.attention import decode_attention as op

from ..models.zoo import FAMILIES, build
from .test_decoding import _Block

SCALE = 1.0


@pytest.fixture(autouse=True)
def _few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "LEAST", 0)


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each call of the op."""
    found: list[int] = []

    def spy(*args: Any) -> Tensor:
        found.append(len(args))
        return op.decode_attention(*args)

    monkeypatch.setattr(decoding, "decode_attention", spy)
    return found


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (2, 4, 1, 16), (2, 2, 30, 16), (2, 2, 30, 16)
    return [torch.randn(s, generator=generator).half() for s in sizes]


class _Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def _decoded(block: nn.Module, *qkv: Tensor) -> Any:
    with Decoding()(block):
        return block(*(qkv or _qkv()))


def test_another_attention_that_was_put_in_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """SageAttention's documentation puts itself in the place of PyTorch's function."""
    monkeypatch.setattr(
        functional, "scaled_dot_product_attention", lambda q, k, v, **options: q * 0
    )
    assert not _decoded(_Block(_Attention())).any()


def test_a_mode_sees_the_call(uses: list[int]) -> None:
    seen: list[str] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with Mode():
        _decoded(_Block(_Attention()))
    assert "scaled_dot_product_attention" in seen
    assert not uses


def _set_scale(value: float) -> None:
    global SCALE
    SCALE = value


class _Scaled(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, str]:
        _set_scale(3.0)
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out * SCALE, __name__


def test_globals_are_those_of_the_moment(uses: list[int]) -> None:
    _set_scale(1.0)
    found, name = _decoded(_Block(_Scaled()))
    plain = functional.scaled_dot_product_attention(*_qkv(), enable_gqa=True)
    torch.testing.assert_close(found, plain * 3, rtol=2e-3, atol=2e-3)
    assert (name, len(uses)) == (__name__, 2)


class _Sets(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        functional.a_flag = 1  # type: ignore[attr-defined]
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_attributes_are_set_in_the_real_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "a_flag", 0, raising=False)
    _decoded(_Block(_Sets()))
    assert functional.a_flag == 1


class _Helper:
    scale = 0.1

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=self.scale)


class _Static(nn.Module):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_forwards_that_are_no_methods_of_their_module_run_as_they_are(uses: list[int]) -> None:
    borrowed = _Block(nn.Identity())
    borrowed.attention.forward = _Helper().forward
    for block in (borrowed, _Block(_Static())):
        assert torch.equal(_decoded(block), block(*_qkv()))
    assert not uses


def test_inside_a_transform_it_runs_as_it_was(uses: list[int]) -> None:
    class Vmaps(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

            return torch.vmap(attend)(q[None], k[None], v[None])

    block = _Block(Vmaps())
    assert torch.equal(_decoded(block), block(*_qkv()))
    assert not uses


def test_the_signature_of_a_decorated_forward_stays() -> None:
    def decorated(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    class Asks(nn.Module):
        @decorated
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[str]:
            """Its text."""
            functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            assert self.forward.__func__.__doc__ == "Its text."
            return list(inspect.signature(self.forward).parameters)

    assert _decoded(_Block(Asks())) == ["q", "k", "v"]


_MADE: list[Any] = []


def _copy_it(module: nn.Module, *_: Any) -> None:
    _MADE[:] = copy.deepcopy(module), pickle.loads(pickle.dumps(module))


def test_copies_and_pickles_that_are_made_during_a_call_are_plain(uses: list[int]) -> None:
    block = _Block(_Attention())
    block.attention.register_forward_hook(_copy_it)
    _decoded(block)
    uses.clear()
    for made in _MADE:
        made._forward_hooks.clear()
        assert made.forward.__self__ is made
        made(*_qkv())
    assert not uses
    assert "forward" not in vars(block.attention)


def _weight_of_a_model_with_a_forward_of_its_own() -> weakref.ref[Tensor]:
    model = build(FAMILIES[0], lora=False)
    attention = model.model.layers[0].self_attn
    own = attention.forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    attention.forward = types.MethodType(forward, attention)
    optimize(model, codegen="eager")
    ids = torch.arange(3, 17).reshape(2, 7)
    with torch.enable_grad():
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
