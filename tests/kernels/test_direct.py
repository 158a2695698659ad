"""Calls of ops that leave out PyTorch's dispatcher, and all that it must not be left out for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from fusewright.kernels import launch
from fusewright.kernels.direct import direct

from .util import Watch

Ran = list[tuple[Any, ...]]


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> tuple[Callable[..., Any], Ran]:
    """An op without a kernel, called directly, and what it was computed with so."""
    from fusewright.kernels.linear import products

    op = torch.ops.fusewright.lora_sum_of_products.default
    ran: Ran = []

    def run(*args: Any) -> Any:
        ran.append(args)
        return products.accumulated(*args)

    monkeypatch.setitem(launch.RUNS, op, run)
    call = direct(op)
    return lambda x: call(None, [x], [EYE], torch.float32), ran


class _Functions(TorchFunctionMode):
    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


X, EYE = torch.arange(4.0).view(2, 2), torch.nn.Parameter(torch.eye(2))


def test_an_ordinary_call_is_direct(added: Any) -> None:
    call, ran = added
    with torch.no_grad():
        assert torch.equal(call(X), X)
    assert len(ran) == 1


def test_modes_see_the_op(added: Any) -> None:
    call, ran = added
    seen: list[Any] = []
    for mode in (Watch(lambda op, args, outs: seen.append(op)), _Functions(seen)):
        with torch.no_grad(), mode:
            call(X)
        assert "lora_sum_of_products" in str(seen)
        seen.clear()
    assert ran == []


def test_autograd_sees_the_op(added: Any) -> None:
    call, ran = added
    call(X.clone().requires_grad_())
    assert ran == []


def test_the_profiler_sees_the_op(added: Any) -> None:
    call, ran = added
    with torch.no_grad(), torch.profiler.profile() as profile:
        call(X)
    assert "fusewright::lora_sum_of_products" in {e.key for e in profile.key_averages()}
    assert ran == []


def test_what_traces_gets_the_op(added: Any) -> None:
    call, ran = added
    with torch.no_grad():
        graph = make_fx(call)(X)
        assert "lora_sum_of_products" in str(graph.graph)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = mode.from_tensor(X)
        assert isinstance(call(fake), FakeTensor)
    assert ran == []


@pytest.mark.parametrize("kind", ["negated", "subclass"])
def test_tensors_that_the_dispatcher_knows_about(kind: str, added: Any) -> None:
    call, ran = added
    x = torch.complex(X, X).conj().imag if kind == "negated" else X.as_subclass(_Own)
    assert x.is_neg() == (kind == "negated")
    with torch.no_grad():
        assert torch.equal(call(x), -X if kind == "negated" else X)
    assert ran == []


class _Own(Tensor):
    pass


def test_transforms_see_the_op(added: Any) -> None:
    call, ran = added
    with torch.no_grad(), contextlib.suppress(RuntimeError):  # it has no rule for batches
        torch.func.vmap(call)(torch.ones(3, 2, 2))
    assert ran == []


def test_an_integer_becomes_a_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton makes constants of integers, and the kernel is another one then."""
    op = mock.Mock(_schema=torch.ops.fusewright.lora_wide_product.default._schema)
    run = mock.Mock()
    monkeypatch.setitem(launch.RUNS, op, run)
    with torch.no_grad():
        direct(op)(X, X, 2, False)
        assert (op.call_count, run.call_count) == (1, 0)
        direct(op)(X, X, 2.0, False)
    assert (op.call_count, run.call_count) == (1, 1)
