"""Models whose blocks are children of the module that computes the loss, without a backbone."""

from __future__ import annotations

import copy
import functools
import types
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import optimize, restore
from tests.explained import explain

from ..models.tiny import assert_equal_steps

IDS = torch.arange(14).view(2, 7)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    def __init__(self, returns: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.returns = returns

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        h = x * 2.0
        y = self.down(F.silu(self.gate(h)) * self.up(h))
        if self.returns == "in place":
            x = x.clone() if x.is_leaf else x
            x += y
        else:
            x = x + y
        x = x if shift is None else x + shift
        return {"tuple": (x, None), "wider": (x, x.double())}.get(self.returns, x)


class Flat(nn.Module):
    """nanoGPT's way: the blocks in a dictionary of modules, the loop in the model's own forward."""

    def __init__(self, returns: str = "tensor", nested: bool = True, checkpoints: bool = False):
        super().__init__()
        torch.manual_seed(0)
        blocks = nn.ModuleList(Block(returns) for _ in range(3))
        self.transformer = nn.ModuleDict(
            {
                "embed": nn.Embedding(32, 16),
                "norm": Norm(),
                **({"blocks": blocks} if nested else {}),
            }
        )
        if not nested:
            self.blocks = blocks
        self.lm_head = nn.Linear(16, 32, bias=False)
        self.nested, self.checkpoints = nested, checkpoints

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.transformer.embed(input_ids)
        for block in self.transformer.blocks if self.nested else self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
            x = x[0] if isinstance(x, tuple) else x
        logits = self.lm_head(self.transformer.norm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits.float().view(-1, 32), labels.view(-1)), logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nested": False},
        {"returns": "tuple"},
        {"returns": "in place"},
        {"checkpoints": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_head_and_blocks_are_captured_apart(options: dict[str, Any], codegen: str) -> None:
    eager = Flat(**options)
    ours = optimize(copy.deepcopy(eager), codegen=codegen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert not [w for w in caught if "was put around" in str(w.message)]
    report = explain(ours)
    assert report.by_rule() == {"glu": 3, "mlp_block": 3, "rms_norm": 1, "linear_cross_entropy": 1}
    where = "transformer.blocks" if eager.nested else "blocks"
    homes = [s.module for s in report.sites if s.rule == "glu"]
    assert homes == [f"{where}.{i}" for i in range(3)]
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    torch.testing.assert_close(other(IDS, labels=IDS)[0], torch.tensor(32.0).log())
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert_equal_steps(restore(ours), eager, IDS, labels=IDS)


def test_a_block_that_is_called_three_times_is_no_backbone() -> None:
    """It has one forward of ours, so that its shallow copy is plain and runs what it holds."""
    eager = Flat()
    eager.transformer.blocks = nn.ModuleList([eager.transformer.blocks[0]] * 3)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(2):
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert explain(ours).by_rule()["linear_cross_entropy"] == 1
    for model in (eager, ours):
        blocks: Any = model.transformer.blocks
        block = copy.copy(blocks[0])
        assert "forward" not in block.__dict__
        block._modules = {**block._modules, "up": copy.deepcopy(block.up)}
        with torch.no_grad():
            block.up.weight.mul_(0.5)
        blocks[0] = block
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    restore(ours)
    assert not any("forward" in module.__dict__ for module in ours.modules())


def _scaled(own: Any) -> Any:
    return lambda self, *args: own(*args) * 0.75


@pytest.mark.parametrize("method", [False, True])
def test_a_class_that_is_changed_after_an_instance_was_wrapped(
    method: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrapper keeps the forward that the class had; the other instances have the new one."""
    eager = Flat()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    of_class = Block.forward
    for model in (eager, ours):
        block: Any = model.transformer.blocks[1]
        if method:
            wrapper = _scaled(block.forward)
            block.forward = types.MethodType(wrapper, block)
        else:
            block.forward = functools.partial(lambda own, *args: own(*args) * 0.75, block.forward)
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    monkeypatch.setattr(Block, "forward", lambda self, *args: of_class(self, *args) * 0.5)
    for _ in range(2):
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    restore(ours)
    assert_equal_steps(ours, eager, IDS, labels=IDS)


def test_explain_alone_captures_the_head() -> None:
    report = explain(optimize(Flat(), codegen="eager"))
    assert report.by_rule()["linear_cross_entropy"] == 1
    assert not report.bypasses


@pytest.mark.parametrize("place", ["block", "inside", "norm"])
@pytest.mark.parametrize("early", [False, True])
def test_hooks_are_called(place: str, early: bool) -> None:
    eager = Flat()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    if not early:
        assert_equal_steps(ours, eager, IDS, labels=IDS)
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    calls = []
    for model in (ours, eager):
        block = model.transformer.blocks[1]
        module = {"block": block, "inside": block.gate, "norm": model.transformer.norm}[place]
        module.register_forward_hook(lambda m, i, o: (calls.append(type(m)), o * 2)[1])
    for _ in range(3):
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert len(calls) == 6
    assert any("hook" in b.reason for b in explain(ours).bypasses)


def test_blocks_that_return_something_new_leave_the_head_as_it_was() -> None:
    eager = Flat("wider")
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(3):
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert explain(ours).by_rule()["glu"] == 3
    assert any("no tensors like their inputs" in b.reason for b in explain(ours).bypasses)
    for model in (ours, eager):
        for block in model.transformer.blocks:
            block.returns = "tensor"
    assert_equal_steps(ours, eager, IDS, labels=IDS)


def test_blocks_that_change_what_they_return() -> None:
    eager = Flat()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for returns in ("tensor", "tensor", "tuple", "tuple"):
        for model in (ours, eager):
            model.transformer.blocks[1].returns = returns
        assert_equal_steps(ours, eager, IDS, labels=IDS)


def test_weights_that_are_trained_later() -> None:
    eager = Flat().requires_grad_(False)
    eager.lm_head.requires_grad_(True)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    for model in (ours, eager):
        model.requires_grad_(True)
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    ours.eval(), eager.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS, labels=IDS)[0], eager(IDS, labels=IDS)[0])


@pytest.mark.parametrize("before", [0, 1, 2], ids="{} calls before".format)
@pytest.mark.parametrize("blocks_too", [False, True])
def test_a_checkpoint_around_a_whole_call(blocks_too: bool, before: int) -> None:
    """It runs the call once more, which must not be captured in between."""
    eager = Flat(checkpoints=blocks_too)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for model in (ours, eager):
        for _ in range(before):
            model(IDS, labels=IDS)
        for _ in range(2):
            checkpoint(lambda m=model: m(IDS, labels=IDS)[0], use_reentrant=False).backward()
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    head_is_left = any("hooks on saved tensors" in b.reason for b in explain(ours).bypasses)
    assert head_is_left == (before == 0)
