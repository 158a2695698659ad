"""``optimize`` before and after wrappers that one process puts around a model or its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

from fusewright import optimize, restore
from fusewright.compiler.logits.lazy_logits import LazyLogits
from tests.explained import explain

from .test_processes import _model as tiny
from .test_processes import _rows

Wrap = Callable[[Any], Any]
IDS = _rows(0)
RULES = {"linear_cross_entropy": 1, "rms_norm": 5, "mlp_block": 2}
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _model() -> Any:
    """Without the cache that transformers makes by default: checkpoints would fill it twice."""
    model = tiny(False)
    model.config.use_cache = False
    return model


def _blocks(wrapper: Callable[[nn.Module], nn.Module]) -> Wrap:
    def wrap(model: Any) -> Any:
        wrappers.apply_activation_checkpointing(
            model,
            checkpoint_wrapper_fn=wrapper,
            check_fn=lambda m: type(m).__name__ == "LlamaDecoderLayer",
        )
        return model

    return wrap


def _checkpointed(kind: str) -> Wrap:
    implementation = wrappers.CheckpointImpl[kind]
    return _blocks(lambda block: wrappers.checkpoint_wrapper(block, checkpoint_impl=implementation))


def _compiled_blocks(model: Any) -> Any:
    layers = model.model.layers
    for i, block in enumerate(layers):
        layers[i] = torch.compile(block, backend="eager")
    return model


def _aligned(model: Any) -> Any:
    attach_align_device_hook(model, execution_device="cpu", offload=False)
    return model


def _dispatched(model: Any) -> Any:
    return accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


WRAPPERS: dict[str, Wrap] = {
    "checkpoints": _checkpointed("NO_REENTRANT"),
    "reentrant checkpoints": _checkpointed("REENTRANT"),
    "saved values offloaded": _blocks(wrappers.offload_wrapper),
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled blocks": _compiled_blocks,
    "aligned": _aligned,
    "dispatched": _dispatched,
    "offloaded": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
}
REASONS = {
    "compiled": "torch.compile was put around a model",
    "aligned": "could not be captured",
    "dispatched": "could not be captured",
    "offloaded": "could not be captured",
}
"""Why nothing is rewritten below a wrapper, as ``explain`` says it."""
CAPTURED_ONCE = ("aligned", "dispatched")
"""Wrappers whose hooks are captured with some versions of accelerate (1.10), and not with 1.15."""


def _step(call: nn.Module) -> tuple[list[Tensor], Any]:
    """The loss and the gradients of a second step, and its outputs."""
    for _ in range(2):
        call.zero_grad()
        outputs = call(input_ids=IDS, labels=IDS)
        outputs.loss.backward()
    grads = [p.grad.clone() for p in call.parameters() if p.grad is not None]
    return [outputs.loss.detach(), *grads], outputs


@pytest.mark.long(
    "reentrant checkpoints-after",
    "compiled blocks-after",
    "reentrant checkpoints-before",
    "compiled blocks-before",
    "saved values offloaded-before",
    "saved values offloaded-after",
)
@pytest.mark.long("compiled-after", "compiled-before")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_before_and_after_a_wrapper(name: str, order: str) -> None:
    wrap = WRAPPERS[name]
    expected, plain = _step(wrap(_model()))
    model = _model()
    if order == "before":
        optimize(model, codegen="eager")
    call = wrap(model)
    if order == "after":
        optimize(call, codegen="eager")
    found, outputs = _step(call)
    logits, report = outputs.logits, explain(call)
    if name in REASONS:
        refused = any(REASONS[name] in b.reason for b in report.bypasses)
        rewritten = name in CAPTURED_ONCE and report.by_rule().items() >= RULES.items()
        assert refused or rewritten, str(report)
    elif (name, order) == ("compiled blocks", "before"):  # the blocks only: the head has no such
        assert "linear_cross_entropy" in report.by_rule()
        assert any("torch.compile was put around" in b.reason for b in report.bypasses)
    else:
        assert report.by_rule().items() >= RULES.items()
        assert isinstance(logits, LazyLogits)
        assert logits.is_pending
        assert not [b for b in report.bypasses if "captured" in b.reason]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.detach(), plain.logits.detach())
    restore(call)
    again, outputs = _step(call)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    assert type(outputs.logits) is Tensor
    assert not explain(call).sites


def test_a_wrapped_block_is_explained_by_its_own_path() -> None:
    call = optimize(_checkpointed("NO_REENTRANT")(_model()), codegen="eager")
    modules = {s.module for s in explain(call).sites if s.rule == "mlp_block"}
    inner = {f"model.layers.{i}._checkpoint_wrapped_module" for i in range(2)}
    assert {m.removesuffix(".mlp") for m in modules} == inner
    assert all(call.get_submodule(m) is not None for m in modules)
