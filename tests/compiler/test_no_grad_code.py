"""What runs blocks that are called without gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fusewright import optimize

from ..models.zoo import FAMILIES, build

IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def eager() -> nn.Module:
    torch._dynamo.reset()
    return build(FAMILIES[0], lora=False).to(torch.bfloat16).requires_grad_(False)


def _logits(model: nn.Module, trained: bool) -> Tensor:
    """Of the same weights, as a model that is trained computes them, or its reference."""
    for p in model.model.layers.parameters():
        p.requires_grad_(trained)
    with torch.set_grad_enabled(trained):
        return model(input_ids=IDS, use_cache=False).logits.detach().clone()


@pytest.mark.long("True")
@pytest.mark.parametrize("alike", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_reference_rounds_as_the_model_does(alike: bool, eager: nn.Module) -> None:
    ours = optimize(
        copy.deepcopy(eager), codegen="inductor", logits="always", compile_no_grad=alike
    )
    policy, reference = _logits(ours, True), _logits(ours, False)
    # bfloat16 between Inductor's fused operations is not rounded, and eager's is
    assert torch.equal(policy, reference) == alike
