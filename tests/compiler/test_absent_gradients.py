"""Where eager mode gives no gradient, neither does a captured block: None is not zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import optimize
from tests.explained import explain

from ..kernels.util import Stop
from .test_switched_gradients import _two


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(16), nn.Linear(16, 16)
        self.other = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)) * self.other


@pytest.mark.long("inductor")
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_block_behind_which_gradients_end_gives_none(codegen: Any) -> None:
    model = optimize(_two(_Block), codegen=codegen)
    out = model(torch.randn(2, 5, 16))
    Stop.apply(out).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is not None]
    assert not explain(model).bypasses


def _assert_same_gradients(ours: nn.Module, eager: nn.Module) -> None:
    for (name, p), own in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert (own.grad is None) == (p.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(own.grad, p.grad, rtol=1e-4, atol=1e-4)


class _TwoOutputs(nn.Module):
    """A block whose second output nobody may use; a weight of its own makes it."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.second = nn.RMSNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.both = nn.Parameter(torch.randn(16))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.checkpointed:
            return checkpoint(self.part, x, use_reentrant=False)  # type: ignore[no-any-return]
        return self.part(x)

    def part(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.both
        return x + self.linear(self.norm(y)), self.second(y)


class _TwoStreams(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoOutputs(checkpointed) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        others = []
        for layer in self.layers:
            x, other = layer(x)
            others.append(other)
        return x, others[0] + others[1]


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_a_weight_of_an_output_that_is_not_used_has_none(
    used: tuple[int, ...], checkpointed: bool, codegen: Any
) -> None:
    torch.manual_seed(0)
    eager = _TwoStreams(checkpointed)
    ours = optimize(copy.deepcopy(eager), codegen=codegen)
    x = torch.randn(2, 5, 16)
    for model in (eager, ours):
        for _ in range(2):
            outputs = model(x)
            sum(outputs[i].square().sum() for i in used).backward()
    assert not explain(ours).bypasses
    absent = [n for n, p in eager.named_parameters() if p.grad is None]
    assert any(absent) == (len(used) == 1)
    _assert_same_gradients(ours, eager)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_input_is_given_none_too(checkpointed: bool) -> None:
    """One whose only way is through an output that nobody uses; and an input that is no leaf."""
    torch.manual_seed(0)
    eager = _TwoStreams(checkpointed)
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    seen: list[list[bool]] = []
    for model in (eager, ours):
        x = torch.randn(2, 5, 16, requires_grad=True)
        first, other = model(x * 2)
        grads = torch.autograd.grad(
            other.sum(), [x, *model.parameters()], allow_unused=True, retain_graph=True
        )
        again = torch.autograd.grad(first.sum(), [x, *model.parameters()], allow_unused=True)
        seen.append([g is None for g in (*grads, *again)])
    assert seen[0] == seen[1]
    assert any(seen[0])


class _Projections(nn.Module):
    """Three projections of one norm, which ops join; one of them is an output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        return x + self.q(h) * self.k(h), self.v(h)


class _Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Projections() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x, v = layer(x)
        return x, v


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("lora", [False, True])
def test_an_op_that_makes_several_outputs_does_not_join_their_inputs(lora: bool, used: int) -> None:
    torch.manual_seed(0)
    eager: nn.Module = _Projected()
    if lora:
        targets = LoraConfig(target_modules=["q", "k", "v"], init_lora_weights=False)
        eager = get_peft_model(eager, targets)  # type: ignore[arg-type]
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    x = torch.randn(2, 5, 16)
    for model in (eager, ours):
        model(x)[used].square().sum().backward()
    assert " 0 rewrites" not in str(explain(ours))
    pairs = list(zip(eager.named_parameters(), ours.parameters(), strict=True))
    assert any(p.grad is None for (_, p), _ in pairs if p.requires_grad)
    assert [n for (n, p), own in pairs if (p.grad is None) != (own.grad is None)] == []


class _GivesItsInput(nn.Module):
    """Gives back its input, of which a dropout of nothing makes the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.none = nn.RMSNorm(16), nn.Linear(16, 16), nn.Dropout(0.0)

    def forward(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.linear(self.norm(x)) * first, self.none(x)


class _GivenTheFirst(nn.Module):
    """Every block gets what the embedding made; two blocks may be one."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.embed, block = nn.Linear(16, 16), _GivesItsInput()
        self.layers = nn.ModuleList([block, block if shared else _GivesItsInput()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = x = self.embed(x)
        for layer in self.layers:
            x, other = layer(x, first)
        return x, other


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_an_output_that_is_an_input_changes_no_other_gradient(
    used: tuple[int, ...], shared: bool
) -> None:
    torch.manual_seed(0)
    eager = _GivenTheFirst(shared)
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    x = torch.randn(2, 5, 16)
    for model in (eager, ours):
        outputs = model(x)
        sum(outputs[i].square().sum() for i in used).backward()
    _assert_same_gradients(ours, eager)


def test_hooks_on_tensors_are_not_called_with_none() -> None:
    torch.manual_seed(0)
    eager = _TwoStreams(False)
    ours = optimize(copy.deepcopy(eager), codegen="inductor")
    found: list[list[Tensor]] = [[], []]
    for model, grads in zip((eager, ours), found, strict=True):
        early = [p.register_hook(lambda g: g * 0.5) for p in model.parameters()]
        outputs = model(torch.ones(2, 5, 16))
        [h.remove() for h in early[::2]]
        late = [p.register_hook(lambda g: g * 2) for p in model.parameters()]
        outputs[0].square().sum().backward()
        [h.remove() for h in (*early, *late)]
        grads += [torch.zeros(()) if p.grad is None else p.grad for p in model.parameters()]
    for theirs, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs.expand_as(mine), rtol=1e-4, atol=1e-4)
