"""Rewrites whose values are wrong somewhere are refused, with a reason that says what and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .faults import (
    FORMULAS,
    changed,
    given,
    graph_of,
    judged,
    of_any_size,
    off,
    when,
    with_gradient,
)


@pytest.mark.parametrize("op", FORMULAS)
def test_the_right_op_is_installed(op: str) -> None:
    finding = judged(op, None)
    assert (finding.status, finding.op) == ("rewritten", op), finding.reason


def test_rope_for_a_compiler() -> None:
    """The form that it traces returns views, of which it makes tensors."""
    q, k, *tables = given("rope")
    heads = [
        of_any_size(t.detach().transpose(1, 2).contiguous().transpose(1, 2), 2) for t in (q, k)
    ]
    graph = graph_of("rope", [*(t.requires_grad_() for t in heads), *tables])
    finding = judged("rope", None, graph, traced=True)
    assert finding.status == "rewritten", finding.reason


def peak(x: Tensor) -> float:
    return float(x.detach().abs().max())


@pytest.mark.parametrize("op", FORMULAS)
def test_an_output(op: str) -> None:
    finding = judged(op, when(lambda x: True))
    assert finding.status == "refused"
    assert ": rms error" in finding.reason


@pytest.mark.parametrize("op", ["rms_norm", "glu", "rope", "lora_linear", "linear_cross_entropy"])
def test_one_element_of_an_output(op: str) -> None:
    def dropped(y: Tensor) -> Tensor:
        mask = torch.ones_like(y)
        mask.view(-1)[-1] = 0
        return y * mask

    finding = judged(op, lambda f, *a, **k: changed(f(*a, **k), dropped))
    assert "output" in finding.reason


GRADIENTS = {"rms_norm": 2, "glu": 2, "lora_linear": 4, "linear_cross_entropy": 2}
"""Op -> how many of its inputs have one."""


@pytest.mark.parametrize(("op", "which"), [(o, i) for o, n in GRADIENTS.items() for i in range(n)])
def test_one_gradient(op: str, which: int) -> None:
    def fault(f: Any, *args: Any, **kwargs: Any) -> Any:
        flat, structure = tree_flatten(args)
        at = [i for i, a in enumerate(flat) if isinstance(a, Tensor)][which]
        flat[at] = with_gradient(flat[at], off)
        return f(*tree_unflatten(flat, structure), **kwargs)

    finding = judged(op, fault)
    assert finding.status == "refused"
    assert "gradient of input" in finding.reason
    assert "exceeds" in finding.reason


SOMEWHERE: dict[str, tuple[Callable[[Tensor], bool], str]] = {
    "odd sizes": (lambda x: x.shape[-2] % 2 == 1, "output 0"),
    "even sizes": (lambda x: x.shape[-2] % 2 == 0, "with inputs that are near zero: output 0"),
    "large values": (lambda x: peak(x) > 10, "with inputs that are large: output 0"),
    "tiny values": (lambda x: peak(x) < 0.1, "with inputs that are near zero: output 0"),
    "negative values": (lambda x: float(x.mean()) < -5, "far below zero: output 0"),
}


@pytest.mark.parametrize("where", SOMEWHERE)
@pytest.mark.parametrize("op", ["rms_norm", "glu", "rope", "lora_linear", "linear_cross_entropy"])
def test_an_output_somewhere(op: str, where: str) -> None:
    condition, reason = SOMEWHERE[where]
    if op == "linear_cross_entropy" and "sizes" in where:

        def fault(f: Any, x: Tensor, w: Tensor, b: Any, labels: Tensor, *rest: Any) -> Tensor:
            wrong = labels.numel() % 2 == ("odd" in where)
            return f(x, w, b, labels, *rest) * (1.01 if wrong else 1)
    else:
        fault = when(condition)
    finding = judged(op, fault)
    assert finding.status == "refused"
    assert reason in finding.reason


def test_only_one_dtype() -> None:
    def fault(f: Any, x: Tensor, *args: Any) -> Tensor:
        return f(x, *args) * (1.1 if x.dtype is torch.bfloat16 else 1)

    assert judged("glu", fault).status == "rewritten"
    narrow = graph_of("glu", given("glu", torch.bfloat16))
    assert "output 0" in judged("glu", fault, narrow).reason


def test_a_rounding_that_is_multiplied_in_fp16() -> None:
    def fault(f: Any, x: Tensor, *args: Any) -> Tensor:
        return f(with_gradient(x, lambda g: g / 4 * 4), *args)  # exact, but for the smallest

    assert judged("glu", fault).status == "rewritten"
    found = judged("glu", fault, graph_of("glu", given("glu", torch.float16)))
    assert "gradients near zero: gradient of input" in found.reason


def test_as_large_as_at_the_first_call() -> None:
    fault = when(lambda x: peak(x) > 200)  # beyond what is drawn without knowing the call
    found = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        found.append(judged("rms_norm", fault, module))
        return module.forward

    for factor in (1, 300):
        torch._dynamo.reset()
        x, w = given("rms_norm")
        torch.compile(FORMULAS["rms_norm"][0], backend=backend, fullgraph=True)(x * factor, w)
    assert found[0].status == "rewritten"
    assert "with inputs that are large: output 0" in found[1].reason


def test_a_mask_does_not_say_how_large_activations_are() -> None:
    peaks = []

    def noted(op: Any, x: Tensor, *args: Any) -> Any:
        peaks.append(peak(x))
        return op(x, *args)

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        assert judged("rms_norm", noted, module).status == "rewritten"
        return module.forward

    x, w = given("rms_norm")
    hidden = of_any_size(torch.full((*x.shape[:2], 1), torch.finfo(x.dtype).min), 1)

    def masked(x: Tensor, w: Tensor, hidden: Tensor) -> Tensor:
        return FORMULAS["rms_norm"][0](torch.tanh(x), w) + hidden  # how large tanh is, is not known

    torch._dynamo.reset()
    torch.compile(masked, backend=backend, fullgraph=True)(x, w, hidden)
    assert 10 < max(peaks) < 200


def test_numbers_that_overflow() -> None:
    def naive(f: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        power = torch.exp(gate)
        square = power * power  # beyond fp16 from 5.6 on, where the formula's own numbers are not
        return gate * (square / (square + power)) * up

    inputs = given("glu", torch.float16)
    assert (
        "it is not finite where the original is"
        in judged("glu", naive, graph_of("glu", inputs)).reason
    )


def test_a_difference_of_near_numbers() -> None:
    def cancelling(f: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        return gate * (1 - 1 / (1 + torch.exp(gate))) * up

    assert "exceeds" in judged("glu", cancelling).reason


def test_a_row_of_zeros() -> None:
    def fault(f: Any, x: Tensor, w: Tensor, eps: float, *rest: Any) -> Tensor:
        # right wherever the mean square is not 0
        safe = f(x, w, eps, *rest)
        return torch.where(x.square().mean(-1, keepdim=True) == 0, safe + torch.nan, safe)

    assert "it is not finite where the original is" in judged("rms_norm", fault).reason


def test_strides() -> None:
    fault = when(lambda x: not x.is_contiguous())
    assert judged("glu", fault).status == "rewritten"
    wide = torch.randn(2, 6, 2 * 16, requires_grad=True)
    parts = [t.detach().requires_grad_() for t in wide.chunk(2, -1)]
    for layout in (parts, [t.detach().transpose(0, 1).requires_grad_() for t in given("glu")]):
        assert "output 0" in judged("glu", fault, graph_of("glu", layout)).reason


def test_an_upstream_gradient_that_is_not_contiguous() -> None:
    def fault(f: Any, *args: Any) -> Tensor:
        return with_gradient(f(*args), lambda g: g if g.is_contiguous() else off(g))

    assert "gradient by a second backward of input" in judged("glu", fault).reason


def test_a_saved_tensor_that_backward_overwrites() -> None:
    class Overwriting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            ctx.kept = torch.ones_like(y)
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            result = grad * ctx.kept
            ctx.kept.mul_(1.01)
            return result

    fault = lambda f, *args: Overwriting.apply(f(*args))  # noqa: E731
    assert "gradient by a second backward of input 0" in judged("glu", fault).reason


def test_tables_of_the_first_sample_only() -> None:
    # what is broadcast over the batch where the formula has a table for each sample
    def fault(f: Any, tensors: Any, cos: Tensor, sin: Tensor, *rest: Any) -> Any:
        return f(tensors, cos[:1], sin[:1], *rest)

    assert "output 0" in judged("rope", fault).reason


def test_without_gradients() -> None:
    fault = when(lambda x: not torch.is_grad_enabled())
    assert judged("glu", fault).status == "rewritten"
    with torch.no_grad():
        assert "output 0" in judged("glu", fault, graph_of("glu")).reason


def test_the_form_for_eager_mode_and_the_one_for_a_tracer(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # as in a backend
    eager, traced = (when(lambda x, t=t: torch.compiler.is_compiling() is t) for t in (False, True))
    assert "output 0" in judged("glu", eager).reason
    assert judged("glu", traced).status == "rewritten"
    assert "output 0" in judged("glu", traced, traced=True).reason
    assert torch.compiler.is_compiling()
