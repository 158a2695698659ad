"""Lazy logits where numbers have no inverse, indices are none, and views are written to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .test_lazy_logits import TARGETS, _pair
from .test_logits import IDS, LABELS, V


def _runs(use: Callable[[Tensor], Tensor]) -> list[list[Tensor]]:
    """What is computed by eager mode and by lazy logits, and the gradients."""
    found = []
    for m in _pair(bias=True):
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
        for m in _pair(bias=True):
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


@pytest.mark.parametrize("use", [_items, _chunks, _unbound])
def test_writes_that_eager_mode_refuses(use: Callable[[Tensor], Tensor]) -> None:
    for m in _pair(bias=True):
        with pytest.raises(RuntimeError, match="returns multiple views"):
            use(m(IDS))


def test_results_that_are_written_to() -> None:
    """Eager mode refuses it, as it has kept them; here backward does not need them."""
    found = []
    for m in _pair(bias=True):
        m.zero_grad()
        total = m(IDS).logsumexp(-1)
        total = total * 2 if m is _pair(bias=True)[0] else total.mul_(2)
        total.sum().backward()
        found.append([total.detach(), *(p.grad for p in m.parameters())])
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


def _loss(z: Tensor) -> Tensor:
    rows = z[:, :-1] / 0.7
    nll = F.cross_entropy(rows.flatten(0, 1), LABELS[:, 1:].flatten())
    return nll + _log_probs(z).mean() + z.logsumexp(-1).square().mean() + z.sin().mean()


def _shifted(z: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())


@pytest.mark.parametrize("loss", [*LOSSES, "shifted", "all"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_loss(loss: str, backend: str) -> None:
    use = {**LOSSES, "shifted": _shifted, "all": _loss}[loss]
    eager, ours = _runs(torch.compile(use, backend=backend))
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=1e-6)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "grad": torch.func.grad(_loss),
    "jacrev": torch.func.jacrev(lambda z: _log_probs(z)[0, :2, 0]),
    "vjp": lambda z: torch.func.vjp(_loss, z)[0],
    "jvp": lambda z: torch.stack(torch.func.jvp(_loss, (z,), (torch.ones(2, 7, V),))),
    "hessian": lambda z: torch.func.hessian(lambda r: r.logsumexp(-1).sum())(z[0, 0]),
    "vmap": torch.func.vmap(lambda r: r.log_softmax(-1).square().sum()),
    "vmap of grad": torch.func.vmap(torch.func.grad(lambda r: r.logsumexp(-1).square().sum())),
    "held": lambda z: torch.func.grad(lambda w: (w * z).logsumexp(-1).sum())(torch.ones(V)),
    "held, then used": lambda z: (
        torch.func.grad(lambda w: (w * z).sum())(torch.ones(V)).sum() + z.logsumexp(-1).sum()
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("detached", [False, True])
def test_transforms_of_functions(transform: str, detached: bool) -> None:
    def use(z: Tensor) -> Tensor:
        made = TRANSFORMS[transform](z.detach() if detached else z).square().sum()
        return made + z.mean()

    eager, ours = _runs(use)
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=1e-5)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda z: z,
    "a slice": lambda z: z[:, 1:],
    "steps": lambda z: z[:, ::2],
    "a row": lambda z: z[:, 3],
    "a slice of a scale": lambda z: (z / 2)[:, 1:],
    "a scale of a slice": lambda z: z[:, 1:] / 2,
    "a piece": lambda z: z.split(3, 1)[1],
    "a chunk": lambda z: z.chunk(2, 1)[1],
    "unbound": lambda z: z.unbind(1)[2],
    "iterated": lambda z: next(iter(z)),
    "a slice, detached": lambda z: z[:, 1:].detach(),
    "a slice of what is detached": lambda z: z.detach()[:, 1:],
    "a view": lambda z: z[:, 1:].unsqueeze(1)[0],
    "flat": lambda z: z[:, 1:].reshape(-1, V),
    "contiguous": lambda z: z[:, 1:].contiguous(),
    "chosen": lambda z: z[TARGETS > 9],
    "log-probabilities": lambda z: z[:, 1:].log_softmax(-1),
    "a cast": lambda z: z[:, 1:].double(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    eager, ours = (VIEWS[view](m(IDS)) for m in _pair(bias=True))
    assert ours.stride() == eager.stride()
    assert ours.is_contiguous() == eager.is_contiguous()
    assert (ours + 0).stride() == (eager + 0).stride()


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a log-softmax of a scale that is gone": lambda z: (
        logp := (z / 2).log_softmax(-1), z.mul_(3), logp.sin().sum() + z.sum()
    )[2],
    "a cast of chosen rows that are gone": lambda z: (
        part := z[TARGETS > 9].double(), z.zero_(), part.sin().sum() + z.sum()
    )[2],
    "another order of dimensions": lambda z: (z.transpose_(0, 2), z[3].sin().sum())[1],
    "another shape": lambda z: (z.unsqueeze_(0), z[0].sin().sum())[1],
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
def test_writes_after_pending_results(order: str) -> None:
    eager, ours = _runs(ORDERS[order])
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=1e-5)


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "double": Tensor.double,
    "to": lambda z: z.to(torch.float64),
    "reshape": lambda z: z[:, 1:].reshape(-1, V),
    "flatten": lambda z: z.transpose(0, 1).flatten(),
    "as other numbers": lambda z: z.view(torch.int32),
    "an array": lambda z: torch.from_numpy(z.detach().numpy()),
    "a list": lambda z: torch.tensor(z.detach().tolist()),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_made_without_gradients(cast: str, mode: Callable[[], Any]) -> None:
    """In inference mode operators arrive whole that elsewhere are made of simpler ones."""
    with mode():
        eager, ours = (CASTS[cast](m(IDS, LABELS)[1]) + 0 for m in _pair(bias=True))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_memory_that_does_not_exist_is_not_read() -> None:
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch._C._to_dlpack(_pair(bias=True)[1](IDS).detach())  # type: ignore[attr-defined]
