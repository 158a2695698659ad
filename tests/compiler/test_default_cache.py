"""The cache that models fill by default: left out in training with labels, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from fusewright import explain, optimize

from ..models.tiny import Stack
from ..models.zoo import FAMILIES, build
from .test_flat_models import Block

IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _pair() -> tuple[nn.Module, nn.Module]:
    return optimize(build(FAMILIES[0], lora=False)), build(FAMILIES[0], lora=False)


def _kinds(outputs: Any) -> list[str]:
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return ["Tensor" if isinstance(v, Tensor) else type(v).__name__ for v in values]


@pytest.mark.long("False-labels1-False")
@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("labels", [None, IDS])
@pytest.mark.parametrize("training", [True, False])
def test_the_outputs_are_those_of_eager_but_in_training_with_labels(
    return_dict: bool, labels: Tensor | None, training: bool
) -> None:
    ours, eager = (m.train(training) for m in _pair())
    inputs = {"input_ids": IDS, "labels": labels, "return_dict": return_dict}
    mine, theirs = _kinds(ours(**inputs)), _kinds(eager(**inputs))
    assert theirs[-1] == "DynamicCache"
    if training and labels is not None:
        theirs.pop()
    assert mine == theirs
    # both forms have the same places
    other = ours(**{**inputs, "return_dict": not return_dict})
    assert _kinds(other) == mine


def test_the_switch_in_the_configuration_may_be_thrown_at_any_time() -> None:
    ours, eager = _pair()
    for on in (False, True, False):
        ours.config.use_cache = eager.config.use_cache = on
        mine = _kinds(ours(input_ids=IDS, labels=IDS))
        assert mine == ["Tensor", "Tensor"]
        assert _kinds(ours(input_ids=IDS)) == _kinds(eager(input_ids=IDS))
    assert _kinds(ours(input_ids=IDS, labels=IDS, use_cache=True))[-1] == "DynamicCache"


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["one module twice", "one attention twice", "one index twice"])
def test_layers_that_share_a_place_in_the_cache_keep_it(how: str, late: bool) -> None:
    models = _pair()
    if late:  # after a step in which none did
        models[0](input_ids=IDS, labels=IDS)
    for model in models:
        layers = model.model.layers
        if how == "one module twice":
            layers[1] = layers[0]
        elif how == "one attention twice":
            layers[1].self_attn = layers[0].self_attn
        else:
            layers[1].self_attn.layer_idx = 0
    ours = optimize(models[0])
    eager = models[1]
    plain = eager(input_ids=IDS, labels=IDS, use_cache=False).loss
    for _ in range(2):
        mine, theirs = (m(input_ids=IDS, labels=IDS).loss for m in (ours, eager))
        torch.testing.assert_close(mine, theirs)
    assert not torch.isclose(plain, theirs)  # the second layer reads what the first one wrote
    assert any("cache" in b.reason for b in explain(ours).bypasses)


class Custom(nn.Module):
    """A model with a cache of its own, whose outputs depend on whether there is one."""

    def __init__(self, with_config: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(211, 16), nn.Linear(16, 211, bias=False)
        self.body = Stack(Block("tensor") for _ in range(2))
        if with_config:
            self.config = tf.LlamaConfig(use_cache=True)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def run(self, input_ids: Tensor, labels: Tensor | None, use_cache: bool) -> Any:
        x = self.body(self.embed(input_ids))
        logits = self.lm_head(x)
        found = (logits, x) if use_cache else (logits,)
        if labels is None:
            return found
        loss = nn.functional.cross_entropy(logits.view(-1, 211), labels.view(-1))
        return (loss, *found)


class Defaulting(Custom):
    def forward(self, input_ids: Tensor, labels: Any = None, use_cache: bool = True) -> Any:
        return self.run(input_ids, labels, use_cache)


class Asking(Custom):
    def forward(self, input_ids: Tensor, labels: Any = None, use_cache: Any = None) -> Any:
        return self.run(
            input_ids, labels, self.config.use_cache if use_cache is None else use_cache
        )


class Recording(Custom):
    def forward(
        self, input_ids: Tensor, labels: Any = None, use_cache: Any = None
    ) -> CausalLMOutputWithPast:
        cache = self.config.use_cache if use_cache is None else use_cache
        loss, logits, *rest = self.run(input_ids, labels, cache)
        return CausalLMOutputWithPast(loss, logits, past_key_values=rest[0] if rest else None)


@pytest.mark.parametrize("kind", [Defaulting, Asking])
@pytest.mark.parametrize("labels", [None, IDS])
def test_a_model_that_returns_tuples_keeps_all_of_them(kind: type[Custom], labels) -> None:
    eager = kind(with_config=True)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(2):
        mine, theirs = (m(IDS, labels) for m in (ours, eager))
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a + 0, b)


def test_a_model_that_says_what_it_returns_makes_no_cache() -> None:
    ours = optimize(Recording(with_config=True), codegen="eager")
    assert ours(IDS, IDS).past_key_values is None
    ours.config.use_cache = False
    assert ours(IDS, IDS).past_key_values is None
    ours.config.use_cache = True
    assert ours.eval()(IDS, IDS).past_key_values is not None
