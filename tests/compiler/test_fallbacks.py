"""Kernels that fail, in a whole model: refused by verification, or replaced later in a run."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusewright import Report, optimize
from fusewright.errors import first_line
from fusewright.kernels import fallback
from tests.explained import explain

from ..kernels.failing_launches import ERRORS, RAISED, as_on_a_gpu
from ..kernels.util import needs_triton

pytestmark = needs_triton

CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip


def _model() -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).train()


def _step(model: nn.Module, length: int = 9) -> dict[str, Tensor]:
    """The loss and every gradient."""
    ids = torch.arange(2 * length).reshape(2, length) * 7 % CONFIG["vocab_size"]
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters()}


def _assert_as_eager(ours: Any, eager: Any, length: int = 9) -> None:
    found, exact = _step(ours, length), _step(copy.deepcopy(eager).double(), length)
    for name, value in found.items():
        torch.testing.assert_close(
            value, exact[name].float(), msg=lambda text, n=name: f"{n}: {text}"
        )


ALL = {**ERRORS, **RAISED}
FEW = ("resources", "type", "driver", "assert", "memory")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in FEW else pytest.mark.slow) for k in ALL]
)
def test_a_kernel_that_fails_at_verification_is_refused(kind: str) -> None:
    """Whatever it raises: what cannot be run is not installed, and all else goes on."""
    eager = _model()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    with as_on_a_gpu(ALL[kind]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _assert_as_eager(ours, eager)
        _assert_as_eager(ours, eager, length=13)
        report = explain(ours)
        assert fallback.FAILED == {}
    assert not [text for text in map(_message, caught) if "plain PyTorch" in text]
    norms = [s for s in report.sites if s.rule == "rms_norm"]
    assert norms, str(report)
    line = first_line(ALL[kind]()).removeprefix("PTXAS error: ")
    line = "fp8 is not supported" if kind == "type" else line
    for site in norms:
        assert site.status == "refused"
        assert line in site.reason
        assert "\n" not in site.reason
        if kind in ERRORS:
            assert "the kernel of rms_norm_forward could not be compiled" in site.reason


def _message(warning: Any) -> str:
    return str(warning.message)


def test_a_kernel_that_fails_later_is_replaced_once() -> None:
    """At the first call, here: what is not verified has not been launched before."""
    eager = _model()
    ours = optimize(copy.deepcopy(eager), codegen="eager", verify="off")
    with as_on_a_gpu(ERRORS["resources"]) as run, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _assert_as_eager(ours, eager)
        launches = run.call_count
        _assert_as_eager(ours, eager, length=13)
        assert run.call_count == launches
        report = explain(ours)
        failed = dict(fallback.FAILED)
    assert {"rms_norm_forward", "rms_norm_backward", "head"} <= set(failed)
    said = [text for text in map(_message, caught) if "could not be compiled or launched" in text]
    assert len(said) == len(failed)
    assert {f.op: f.reason for f in report.fallbacks} == failed
    line = "runs without its kernel: rms_norm_backward: OutOfResources: out of resource: shared"
    assert line in str(report)
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.fallbacks == report.fallbacks


def test_a_kernel_that_failed_before_is_refused_with_its_reason() -> None:
    eager = _model()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    with as_on_a_gpu(ERRORS["resources"]) as run:
        fallback.FAILED["rms_norm_forward"] = "OutOfResources: earlier"
        _assert_as_eager(ours, eager)
        report = explain(ours)
        assert not any("rms_norm" in str(c) for c in run.call_args_list)
    reasons = {s.reason for s in report.sites if s.rule == "rms_norm"}
    assert reasons == {
        "could not be run for verification: the kernel of rms_norm_forward could not be compiled "
        "or launched: OutOfResources: earlier"
    }


def test_a_kernel_is_replaced_inside_a_compiled_graph() -> None:
    """The graph has planned for the launcher's layouts; it is not compiled again."""
    from fusewright.kernels.norms.rms_norm import reference, rms_norm

    torch._dynamo.reset()
    x = torch.randn(3, 5, 16).transpose(0, 1).requires_grad_()
    weight = torch.rand(16, requires_grad=True)

    def grads(norm: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(norm(x, weight, 1e-6).square().sum(), (x, weight))

    with as_on_a_gpu(ERRORS["ptxas"]), pytest.warns(UserWarning, match="PTXASError"):
        made = grads(torch.compile(rms_norm, backend="aot_eager", fullgraph=True))
    for ours, theirs in zip(made, grads(reference), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_a_kernel_leaves_behind_ends_the_step() -> None:
    ours = optimize(_model(), codegen="eager", verify="off")
    with as_on_a_gpu(RAISED["assert"]), pytest.raises(torch.AcceleratorError, match="assert"):
        _step(ours)


def test_nothing_is_launched_without_a_reason() -> None:
    """The stub is what these tests stand on: it is called, and ours alone call it."""
    eager = _model()
    with as_on_a_gpu(ERRORS["driver"]) as run:
        _step(eager)
        assert isinstance(run, mock.Mock)
        assert run.call_count == 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _step(optimize(copy.deepcopy(eager), codegen="eager", verify="off"))
        assert run.call_count > 0
