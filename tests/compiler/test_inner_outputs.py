"""Calls that ask for hidden states, attentions or router logits: what they collect is eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from tests.explained import explain

from ..models.tiny import assert_equal_gradients, assert_equal_losses, pair
from .test_default_cache import IDS, T, _llama, _llava

PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**T, num_local_experts=4, num_experts_per_tok=2))


def _compare(ours: nn.Module, eager: nn.Module, **inputs: Any) -> None:
    """One step whose loss is of everything that was collected."""
    collected = []
    for model in (ours, eager):
        model.zero_grad()
        outputs = model(**inputs)
        inner = [
            t
            for name in ("hidden_states", "attentions", "router_logits")
            for t in getattr(outputs, name, None) or ()
            if t is not None  # a state that was not selected
        ]
        loss = outputs.loss if outputs.loss is not None else outputs.logits.float().exp().mean()
        (loss + sum(t.float().exp().mean() for t in inner)).backward()
        collected.append([t.detach() for t in (loss, *inner)])
    assert len(collected[0]) == len(collected[1]) > 1
    for a, b in zip(*collected, strict=True):
        torch.testing.assert_close(a + 0, b, rtol=2e-5, atol=2e-6)
    assert_equal_gradients(ours, eager)


@pytest.mark.long("True")
@pytest.mark.parametrize("labels", [False, True])
def test_blocks_are_rewritten_when_hidden_states_are_asked_for(labels: bool) -> None:
    ours, eager = pair(_llama)
    inputs = {"input_ids": IDS, "labels": IDS if labels else None}
    _compare(ours, eager, **inputs, output_hidden_states=True)
    report = explain(ours)
    assert report.by_rule().items() >= {"rms_norm": 5, "rope": 2, "glu": 2}.items()
    assert not [b for b in report.bypasses if "hook" in b.reason or "asked" in b.reason]
    if not labels:
        return
    # then for none of them, for some, and for more
    assert_equal_losses(ours, eager, lambda m: m(**inputs).loss)
    _compare(ours, eager, **inputs, output_hidden_states=[1])
    for model in (ours, eager):
        model.set_attn_implementation("eager")
    _compare(ours, eager, **inputs, output_hidden_states=True, output_attentions=True)


@pytest.mark.long
def test_a_tower_whose_hidden_states_are_asked_for_is_rewritten() -> None:
    ours, eager = pair(_llava)
    ids = IDS.clone()
    ids[:, 2:6] = 210
    inputs = {"input_ids": ids, "labels": ids.masked_fill(ids == 210, -100)}
    for _ in range(2):
        assert_equal_losses(ours, eager, lambda m: m(pixel_values=PIXELS, **inputs).loss)
    report = explain(ours)
    towers = [s for s in report.sites if "vision" in s.module and s.status == "rewritten"]
    assert sum(s.rule == "layer_norm" for s in towers) >= 5
    assert not [b for b in report.bypasses if "vision" in b.module and "attention:" not in b.reason]


@pytest.mark.long("router_logits")
@pytest.mark.parametrize("kind", ["router_logits"])
def test_outputs_of_modules_inside_blocks_are_collected(kind: str) -> None:
    ours, eager = pair(_mixtral)
    for asks in (True, False, True):
        _compare(
            ours, eager, input_ids=IDS, labels=IDS, output_hidden_states=True,
            **{f"output_{kind}": asks},
        )  # fmt: skip
    assert any("hook" in b.reason for b in explain(ours).bypasses)
