"""``optimize(strict=True)`` raises in the first call whose graph keeps a formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusewright import OptimizeError, optimize
from fusewright.passes.linear_cross_entropy import LinearCrossEntropy
from tests.models.zoo import FAMILIES, build

LLAMA = FAMILIES[0]
IDS = torch.arange(14).view(2, 7) + 3


class Sine(nn.Module):
    """A gated unit with an activation that no spelling has."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sin(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def test_a_formula_that_was_missed_is_an_error() -> None:
    model = build(LLAMA, lora=False).train()
    for layer in model.model.layers:
        layer.mlp = Sine()
    optimize(model, strict=True)
    with pytest.raises(OptimizeError, match=r"LlamaDecoderLayer\.mlp: glu missed: .*sin"):
        model(input_ids=IDS, labels=IDS, use_cache=False)


def test_a_formula_that_was_refused_is_an_error() -> None:
    model = build(LLAMA, lora=False).double().train()
    optimize(model, passes=[LinearCrossEntropy()], strict=True)
    message = "linear_cross_entropy refused: the model computes the loss of its float64 logits"
    with pytest.raises(OptimizeError, match=message):
        model(input_ids=IDS, labels=IDS, use_cache=False)


def test_where_everything_is_rewritten_nothing_is_raised() -> None:
    model = optimize(build(LLAMA, lora=True).train(), strict=True)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
