"""A graph that raises leaves autocast and gradients as it found them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import optimize

BOTH = pytest.mark.parametrize(
    "codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)


class Block(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.inner, self.outer, self.table = nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 8)
        self.mode = mode

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        if self.mode == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                y = self.outer(torch.relu(self.inner(x))) + self.table(ids)
        else:
            with torch.no_grad():
                y = torch.relu(self.inner(x)) + self.table(ids)
            y = self.outer(y)
        return x + y


class Stack(nn.Module):
    def __init__(self, mode: str, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(mode) for _ in range(2))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed:
                x = checkpoint(layer, x, ids, use_reentrant=False)
            else:
                x = layer(x, ids)
        return x


def _modes() -> tuple[bool, bool, int]:
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        depth,
    )


def _inputs(index: int = 0) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 8), torch.full((2, 3), index)


@BOTH
def test_a_checkpoint_that_has_what_it_needs_leaves_autocast(codegen: str) -> None:
    """Its recomputation ends by an exception inside the autocast region."""
    before, model = _modes(), optimize(Stack("autocast", checkpointed=True), codegen=codegen)
    model(*_inputs()).sum().backward()
    assert _modes() == before
    weight = model.layers[0].inner.weight
    seen = []
    for value in (1.0, 2.0):  # an autocast that was never left would still have the first cast
        weight.data.fill_(value)
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(nn.functional.linear(torch.ones(1, 8), weight)[0, 0].item())
    assert seen == [8.0, 16.0]


@BOTH
@pytest.mark.parametrize("mode", ["autocast", "no_grad"])
def test_an_error_between_the_two_ends_of_a_region(mode: str, codegen: str) -> None:
    before, model = _modes(), optimize(Stack(mode), codegen=codegen)
    model(*_inputs())
    # the check in a kernel of Inductor's own has no type of its own
    error = IndexError if codegen == "eager" else (IndexError, RuntimeError)
    try:
        for _ in range(2):
            with pytest.raises(error, match=r"index out of (range|bounds)"):
                model(*_inputs(9))
            assert _modes() == before
    finally:
        torch.set_grad_enabled(True)
