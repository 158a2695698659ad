"""Lazy logits where numbers have no inverse, indices are none, and views are written to."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright import optimize

from .test_logits import _LM, IDS, LABELS, V, _plain

TARGETS = torch.arange(14).view(2, 7) * 3 % V


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    _pair.cache_clear()
    torch._dynamo.reset()


@functools.cache
def _pair() -> tuple[_LM, _LM]:
    torch.manual_seed(0)
    eager = _LM(_plain, False, True)
    return eager, optimize(copy.deepcopy(eager), codegen="eager")


def _runs(use: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """What is computed by eager mode and by lazy logits, and the gradients."""
    found = []
    for m in _pair():
        m.zero_grad()
        made = use(m(IDS))
        made.sum().backward()
        found.append([made.detach(), *(p.grad for p in m.parameters() if p.grad is not None)])
    return found


def _log_probs(z: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, TARGETS[..., None])


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda z: F.cross_entropy(z.flatten(0, 1), LABELS.flatten()),
    "log-probabilities": _log_probs,
    "log-sum-exp": lambda z: z.logsumexp(-1),
    "mean": lambda z: z.mean(-1),
    "highest": lambda z: z.max(-1).values,
    "entropies": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e-44, 1e-320, 1e39])
@pytest.mark.parametrize("divides", [False, True])
def test_numbers_without_an_inverse(loss: str, number: float, divides: bool) -> None:
    def use(z: Tensor) -> Tensor:
        if divides:
            return LOSSES[loss](z / number if number else z / torch.tensor(number))
        return LOSSES[loss](z * number)

    eager, ours = _runs(use)
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_numbers_that_are_too_small_together(loss: str) -> None:
    eager, ours = _runs(lambda z: LOSSES[loss](z * 1e-30 * 1e-30 * 1e-300))
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 0.0, 1e39])
def test_weights_without_an_inverse(number: float) -> None:
    eager, ours = _runs(lambda z: (z.log_softmax(-1) * number).gather(-1, TARGETS[..., None]))
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shift", [math.inf, -math.inf, math.nan, 1000.0, -1000.0])
def test_mixtures_of_no_shares(shift: float) -> None:
    teacher = torch.randn(2, 7, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def use(z: Tensor) -> Tensor:
        logp = z.log_softmax(-1)
        mixture = torch.logaddexp(logp + shift, teacher)
        return F.kl_div(mixture, teacher, reduction="batchmean", log_target=True)

    eager, ours = _runs(use)
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("index", [V, -1, -(1 << 31)])
@pytest.mark.parametrize("columns", [1, 2])
def test_an_index_that_is_no_class(index: int, columns: int) -> None:
    wrong = torch.full((2, 7, columns), index)
    for use in (lambda z: z.gather(-1, wrong), lambda z: z.log_softmax(-1).gather(-1, wrong)):
        for m in _pair():
            with pytest.raises(RuntimeError, match="out of bounds"):
                use(m(IDS))


def _items(z: Tensor) -> Tensor:
    for i, row in enumerate(z):
        row.mul_(i + 2)
    return z.logsumexp(-1).sum() + z.tanh().sum()


def _chunks(z: Tensor) -> Tensor:
    first, second = z.chunk(2, 1)
    first.mul_(3)
    second.div_(2)
    return z.logsumexp(-1).sum() + first.logsumexp(-1).sum() + second.tanh().sum()


def _unbound(z: Tensor) -> Tensor:
    rows = z.unbind(1)
    rows[2].add_(1)
    rows[4].mul_(2)
    return z.logsumexp(-1).sum() + rows[2].tanh().sum() + rows[4].logsumexp(-1).sum()


def _sums(z: Tensor) -> Tensor:
    total = z.logsumexp(-1)
    total.mul_(2)
    return total.sum()


@pytest.mark.parametrize("use", [_items, _chunks, _unbound, _sums])
def test_writes_that_eager_mode_refuses_are_seen(use: Callable[[Tensor], Tensor]) -> None:
    """Eager mode cannot say what is the gradient of one of several views; here it is known."""
    eager, ours = _pair()
    eager.zero_grad(), ours.zero_grad()
    made = _in_eager_mode(use, eager(IDS))
    made.backward()
    mine = use(ours(IDS))
    mine.backward()
    torch.testing.assert_close(mine, made, rtol=2e-4, atol=1e-6)
    for p, q in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-4, atol=1e-6)


def _in_eager_mode(use: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The same without writes."""
    if use is _items:
        z = torch.stack([row * (i + 2) for i, row in enumerate(z)])
        return z.logsumexp(-1).sum() + z.tanh().sum()
    if use is _chunks:
        first, second = z.chunk(2, 1)
        first, second = first * 3, second / 2
        whole = torch.cat([first, second], 1)
        return whole.logsumexp(-1).sum() + first.logsumexp(-1).sum() + second.tanh().sum()
    if use is _unbound:
        rows = list(z.unbind(1))
        rows[2], rows[4] = rows[2] + 1, rows[4] * 2
        whole = torch.stack(rows, 1)
        return whole.logsumexp(-1).sum() + rows[2].tanh().sum() + rows[4].logsumexp(-1).sum()
    return (z.logsumexp(-1) * 2).sum()
