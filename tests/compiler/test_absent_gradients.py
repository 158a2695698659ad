"""Where eager mode gives no gradient, neither does a captured block: None is not zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import explain, optimize

from ..kernels.util import Stop
from .test_switched_gradients import _Stack


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(16), nn.Linear(16, 16)
        self.other = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)) * self.other


class _Checkpointed(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, self.other, use_reentrant=True)  # type: ignore[no-any-return]

    def part(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)) * other.detach()


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_block_behind_which_gradients_end_gives_none(codegen: Any) -> None:
    model = optimize(_Stack(_Block), codegen=codegen)
    out = model(torch.randn(2, 5, 16))
    Stop.apply(out).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is not None]
    assert not explain(model).bypasses


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_reentrant_checkpoint_of_a_parameter_without_a_gradient_is_captured(
    codegen: Any,
) -> None:
    """No other checkpoint comes before a parameter, to take None for zeros."""
    torch.manual_seed(0)
    eager = _Stack(_Checkpointed)
    ours = optimize(copy.deepcopy(eager), codegen=codegen)
    x = torch.randn(2, 5, 16, requires_grad=True)
    for model in (eager, ours):
        model(x * 1).square().sum().backward()
    assert not explain(ours).bypasses
    for (name, p), own in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert (own.grad is None) == (p.grad is None) == ("other" in name), name
        if p.grad is not None:
            torch.testing.assert_close(own.grad, p.grad)
