"""What is written to after a loss was made of lazy logits makes no gradient silently wrong.

Eager mode raises where its backward pass needs what was written to. So do lazy logits, unless they
have what is needed: then the gradient is the one of what the loss was computed of.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright import optimize

from .test_logits import _LM, IDS, V, _plain

TARGETS = torch.arange(14).view(2, 7) * 3 % V
MASK = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 1]]).bool()


@functools.cache
def _pair(frozen: bool = False, cap: bool = False) -> tuple[_LM, _LM]:
    torch.manual_seed(0)
    eager = _LM(_plain, cap, True)
    eager.lm_head.requires_grad_(not frozen)
    return eager, optimize(copy.deepcopy(eager), codegen="eager")


def _gradients(m: _LM) -> list[Tensor]:
    return [p.grad for p in m.parameters() if p.grad is not None]


def _close(b: Any, a: Any) -> None:
    torch.testing.assert_close(b, a, rtol=2e-4, atol=1e-6)


def _error(loss: Tensor) -> str | None:
    """What the backward pass raises."""
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return None


OF_TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log-probabilities": lambda z, t: z.log_softmax(-1).gather(-1, t[..., None]),
    "logits": lambda z, t: z.gather(-1, t[..., None]),
    "each loss": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten(), reduction="none"),
    "nll of each": lambda z, t: F.nll_loss(
        z.log_softmax(-1).flatten(0, 1), t.flatten(), reduction="none"
    ),
    "nll": lambda z, t: F.nll_loss(z.log_softmax(-1).flatten(0, 1), t.flatten()),
    "a loss": lambda z, t: F.cross_entropy(z.flatten(0, 1), t.flatten()),
    "a cold loss": lambda z, t: F.cross_entropy(z.flatten(0, 1) / 0.7, t.flatten()),
    "some rows": lambda z, t: z[:, 1:].log_softmax(-1).gather(-1, t[:, 1:, None]),
}


@pytest.mark.parametrize("use", OF_TARGETS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("cap", [False, True])
def test_targets(use: str, frozen: bool, cap: bool) -> None:
    for m in _pair(frozen, cap):
        t = TARGETS.clone()
        loss = OF_TARGETS[use](m(IDS), t).mean()
        t.zero_()
        error = _error(loss)
        assert error is not None
        assert "modified by an inplace operation" in error


def test_targets_that_are_written_to_and_not_differentiated() -> None:
    eager, ours = _pair()
    for m in (eager, ours):
        m.zero_grad()
        z, t = m(IDS), TARGETS.clone()
        with torch.no_grad():
            z.log_softmax(-1).gather(-1, t[..., None])
        t.zero_()
        z.logsumexp(-1).mean().backward()
    _close(_gradients(ours), _gradients(eager))


OF_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "each loss": OF_TARGETS["each loss"],
    "single logits": OF_TARGETS["logits"],
    "a loss": OF_TARGETS["a loss"],
    "log-probabilities": OF_TARGETS["log-probabilities"],
}


@pytest.mark.parametrize("use", OF_ROWS)
def test_weights(use: str) -> None:
    for m in copy.deepcopy(_pair()):
        loss = OF_ROWS[use](m(IDS), TARGETS).mean()
        with torch.no_grad():
            m.lm_head.weight.mul_(2)
        with pytest.raises(RuntimeError):
            loss.backward()


OF_TEACHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward": lambda s, t: F.kl_div(s, t, reduction="batchmean", log_target=True),
    "reverse": lambda s, t: F.kl_div(t, s, reduction="batchmean", log_target=True),
    "mixture": lambda s, t: F.kl_div(
        torch.logaddexp(s - 0.6931471805599453, t - 0.6931471805599453), t,
        reduction="batchmean", log_target=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", OF_TEACHERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_teacher(use: str, frozen: bool) -> None:
    eager, ours = _pair(frozen)
    teacher = torch.randn(2, 7, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    eager.zero_grad()
    OF_TEACHERS[use](eager(IDS).log_softmax(-1), teacher).backward()
    ours.zero_grad()
    written = teacher.clone()
    loss = OF_TEACHERS[use](ours(IDS).log_softmax(-1), written)
    written.fill_(-1.0)
    error = _error(loss)
    if error is None:
        _close(_gradients(ours), _gradients(eager))
    else:
        assert "inplace operation" in error or "written to since" in error


CHOICES: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]] = {
    "a mask": lambda: (m := MASK.clone(), lambda: m.fill_(True)),
    "a list": lambda: (rows := [1, 0], lambda: rows.__setitem__(0, 0)),
    "a list in a tuple": lambda: (
        (slice(None), rows := [4, 1]), lambda: rows.__setitem__(0, 0)
    ),
    "indices": lambda: (
        (t := torch.tensor([1, 0]), slice(1, None)), lambda: t.zero_()
    ),
    "a bound": lambda: (
        (slice(None), slice(t := torch.tensor(2), None)), lambda: t.zero_()
    ),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES)
def test_what_chose_rows(choice: str) -> None:
    found = []
    eager, ours = _pair()
    for m in (eager, ours):
        m.zero_grad()
        item, write = CHOICES[choice]()
        rows = m(IDS)[item]
        if m is ours:  # eager mode's backward pass needs some of these, and raises
            write()
        made = rows.sin()
        made.square().sum().backward()
        found.append([made.detach(), *_gradients(m)])
    _close(found[1], found[0])
