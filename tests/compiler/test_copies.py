"""Copies of optimized modules: deep ones are optimized; shallow ones and pickles are plain."""

from __future__ import annotations

import copy
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.compiler.install import installed
from tests.explained import explain

from ..models.zoo import FAMILIES, build

IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(0))
PUT = {"forward", "train", "__getstate__", "_replicate_for_data_parallel"}
"""What ``optimize`` puts into the attributes of a module."""
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _model() -> nn.Module:
    return build(FAMILIES[0], lora=False).train()


def _step(model: Any) -> list[Tensor]:
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = (p.grad for p in model.parameters())
    return [out.loss.detach(), out.logits.detach(), *(g.clone() for g in grads if g is not None)]


def _assert_equal(ours: nn.Module, eager: nn.Module) -> None:
    for mine, theirs in zip(_step(ours), _step(eager), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _another_head(model: Any) -> nn.Module:
    other = copy.copy(model)
    other._modules = dict(model._modules)
    torch.manual_seed(4)
    other.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    return other


def _another_loss(model: Any) -> nn.Module:
    other = copy.copy(model)
    other.loss_function = lambda logits, labels, **_: logits.float().pow(2).mean()
    return other


def _another_mlp(model: Any) -> nn.Module:
    layers = model.model.layers
    block = copy.copy(layers[0])
    block._modules = dict(block._modules)
    block.mlp = nn.Linear(model.config.hidden_size, model.config.hidden_size)
    nn.init.constant_(block.mlp.weight, 0.1)
    nn.init.zeros_(block.mlp.bias)
    layers[1] = block
    return model


def _another_backbone(model: Any) -> nn.Module:
    other = copy.copy(model)
    other._modules = {**model._modules, "model": copy.copy(model.model)}
    other.model._modules = {**model.model._modules, "layers": model.model.layers[:1]}
    return other


CHANGES = [_another_head, _another_loss, _another_mlp, _another_backbone]


@pytest.mark.parametrize("change", CHANGES)
def test_a_shallow_copy_runs_what_it_holds(change: Callable[[Any], nn.Module]) -> None:
    eager, ours = _model(), optimize(_model(), codegen="eager", verify="off")
    _assert_equal(ours, eager)
    _assert_equal(change(ours), change(eager))
    _assert_equal(ours, eager)
    assert explain(ours).by_rule()["linear_cross_entropy"] == 1
    restore(ours)
    assert not any(PUT & vars(m).keys() for m in ours.modules())
    for mine, theirs in zip(_step(ours), _step(eager), strict=True):
        assert torch.equal(mine, theirs)


def test_shallow_copies_and_pickles_are_plain_and_deep_copies_are_optimized() -> None:
    ours = optimize(_model(), codegen="eager", verify="off")
    for m in (ours, ours.model, ours.model.layers[0], ours.model.norm):
        assert installed(m) is not None
        for plain in (copy.copy(m), pickle.loads(pickle.dumps(m)), copy.copy(copy.deepcopy(m))):
            assert not PUT & vars(plain).keys()
            assert type(plain) is type(m)
        deep = copy.deepcopy(m)
        assert installed(deep) is not None
        bound = [v for k, v in vars(deep).items() if k in PUT]
        assert all(v.__self__ is deep for v in bound)
        assert vars(deep).keys() == vars(m).keys()
    shallow = copy.copy(ours)
    assert shallow.lm_head is ours.lm_head
    assert optimize(shallow, codegen="eager", verify="off") is shallow
    _assert_equal(shallow, _model())
    _assert_equal(ours, _model())


def test_a_shallow_copy_keeps_the_forward_that_the_instance_had() -> None:
    eager = _model()
    eager.forward = types.MethodType(lambda self, **kw: type(self).forward(self, **kw), eager)
    own = eager.forward
    ours = optimize(eager, codegen="eager", verify="off")
    assert copy.copy(ours).__dict__["forward"] is own  # which eager's shares with the original
    restore(ours)
    assert ours.forward == own


@pytest.mark.long
@pytest.mark.parametrize("both", [False, True])
def test_two_models_share_a_backbone(both: bool) -> None:
    """Whichever was optimized last owns the backbone: the other one's head runs around it."""
    pairs = []
    for optimized in (False, True):
        first, second = _model(), _model()
        second.model = first.model
        torch.nn.init.normal_(second.lm_head.weight, generator=torch.Generator().manual_seed(7))
        if optimized:
            optimize(first, codegen="eager", verify="off")
            _step(first)
            if both:
                optimize(second, codegen="eager", verify="off")
        pairs.append((first, second))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile was put around")
        for _ in range(2):
            for eager, ours in zip(*pairs, strict=True):
                _assert_equal(ours, eager)
    for model in pairs[1][: 1 + both]:
        assert explain(model).by_rule()["linear_cross_entropy"] == 1
        assert not any("torch.compile" in b.reason for b in explain(model).bypasses)
    if both:
        restore(pairs[1][1])
        _assert_equal(pairs[1][0], pairs[0][0])
