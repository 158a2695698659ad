"""The user's modules run inside the user's own calls only, as often as in eager mode."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusewright
from fusewright import optimize
from fusewright.compiler.pipeline import NOT_CALLED
from tests.models import architectures
from tests.models.zoo import FAMILIES, build

OTHERS = (
    ("mixtral", "causal"), ("olmoe", "causal"), ("falcon_mamba", "causal"), ("jamba", "causal"),
    ("opt", "causal"), ("bloom", "causal"), ("gpt_neox", "causal"), ("qwen3_next", "causal"),
    ("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("qwen2_5_vl", "multimodal"),
)  # fmt: skip
IDS = torch.arange(22).view(2, 11) % 90 + 3
PACKED = {
    "input_ids": IDS[:1],
    "labels": IDS[:1],
    "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6]]),
}


@functools.cache
def _counting(kind: Any) -> type:
    """A subclass whose forward counts its calls in a buffer, which a captured graph does, too."""

    class Counting(kind):
        @functools.wraps(kind.forward)  # whose signature and code say what a mixer takes
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.number_of_calls.add_(1)
            return super().forward(*args, **kwargs)

    Counting.__name__, Counting.__qualname__ = kind.__name__, kind.__qualname__
    Counting.__module__ = kind.__module__
    return Counting


def counted(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module).forward is not nn.Module.forward:
            module.register_buffer("number_of_calls", torch.zeros(()), persistent=False)
            module.__class__ = _counting(type(module))
    return model


def calls(model: nn.Module) -> dict[str, float]:
    found = {n: float(b) for n, b in model.named_buffers() if n.endswith("number_of_calls")}
    assert found
    return found


def _step(model: nn.Module, **inputs: Tensor) -> None:
    model(**inputs, use_cache=False).loss.backward()


@pytest.mark.long("mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "falcon", "gpt2")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_modules_run_once_for_each_call_of_the_user(family: Any) -> None:
    eager = counted(build(family, lora=False).train())
    ours = copy.deepcopy(eager)
    none = calls(ours)
    optimize(ours, codegen="eager", packs=True, verify="always")
    assert calls(ours) == none
    assert any(b.reason == NOT_CALLED for b in fusewright.explain(ours).bypasses)
    assert calls(ours) == none
    for inputs in ({"input_ids": IDS, "labels": IDS}, PACKED):
        for _ in range(2):
            _step(eager, **inputs)
            _step(ours, **inputs)
            assert calls(ours) == calls(eager)
    with torch.no_grad():
        for model in (eager.eval(), ours.eval()):
            model(input_ids=IDS, labels=IDS, use_cache=False)
    assert calls(ours) == calls(eager)
    before = calls(ours)
    assert fusewright.explain(ours).graphs
    assert calls(ours) == before


@pytest.mark.long(
    "olmoe-causal", "jamba-causal", "opt-causal", "bloom-causal", "gpt_neox-causal",
    "bart-encoder-decoder",
)  # fmt: skip
@pytest.mark.parametrize(("name", "kind"), OTHERS)
def test_modules_of_other_kinds_run_once_for_each_call(name: str, kind: str) -> None:
    eager = counted(architectures.build(name, kind))
    ours = optimize(copy.deepcopy(eager), codegen="eager", verify="always")
    inputs = architectures.step_inputs(copy.deepcopy(eager), kind)  # may call a vision tower
    for _ in range(2):
        for model in (eager, ours):
            architectures.loss_of(model, inputs).backward()
        assert calls(ours) == calls(eager)
    before = calls(ours)
    assert fusewright.explain(ours).graphs
    assert calls(ours) == before
