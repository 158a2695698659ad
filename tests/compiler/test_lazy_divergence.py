"""Divergences of two models' logits end in tiles, and equal what eager mode makes of them.

The student's logits are lazy; the teacher's are, too, or a real tensor.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright import optimize
from fusewright.compiler.install import active
from fusewright.compiler.logits.lazy_logits import LazyLogits
from fusewright.compiler.logits.reads import Reads
from fusewright.rewrite.tolerance import exceeded

from .test_logits import _LM, IDS, LABELS, H, V, _plain

Loss = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    _models.cache_clear()
    torch._dynamo.reset()


class _Wide(_LM):
    """A teacher of another hidden size."""

    def __init__(self, bias: bool) -> None:
        super().__init__(_plain, False, bias)
        self.up, self.lm_head = nn.Linear(H, 24), nn.Linear(24, V, bias=bias)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.lm_head(self.up(self.model(ids)))


@functools.cache
def _models(frozen: bool = False, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    """Student and teacher, eager and optimized."""
    torch.manual_seed(0)
    student, teacher = _LM(_plain, False, bias).to(dtype), _Wide(not bias).to(dtype).eval()
    student.lm_head.requires_grad_(not frozen)
    with torch.no_grad():
        for head in (student.lm_head, teacher.lm_head):
            head.weight.mul_(4)
    eager = student, teacher
    return eager, tuple(optimize(copy.deepcopy(m), codegen="eager") for m in eager)


def _reads(model: nn.Module) -> Reads:
    record = active(model)
    assert record is not None
    return record.session.log.reads


def _jsd(
    student: Tensor, teacher: Tensor, labels: Any = None, beta: Any = 0.5, temperature: float = 1.0,
    reduction: str = "batchmean", count: Any = None,
) -> Tensor:  # fmt: skip
    """As TRL's ``GKDTrainer.generalized_jsd_loss`` does."""
    s = F.log_softmax(student / temperature, dim=-1)
    t = F.log_softmax(teacher / temperature, dim=-1)
    if beta == 0:
        jsd = F.kl_div(s, t, reduction="none", log_target=True)
    elif beta == 1:
        jsd = F.kl_div(t, s, reduction="none", log_target=True)
    else:
        beta = torch.tensor(beta, dtype=s.dtype, device=s.device)
        mixture = torch.logsumexp(
            torch.stack([s + torch.log1p(-beta), t + torch.log(beta)]), dim=0
        )
        of_teacher = F.kl_div(mixture, t, reduction="none", log_target=True)
        of_student = F.kl_div(mixture, s, reduction="none", log_target=True)
        jsd = beta * of_teacher + (1 - beta) * of_student
    if labels is not None:
        mask = labels != -100
        jsd = jsd[mask]
    if count is not None:
        return jsd.sum() / count
    if reduction == "batchmean":
        return jsd.sum() / (mask.sum().clamp_min(1) if labels is not None else max(jsd.size(0), 1))
    return jsd.sum() if reduction == "sum" else jsd.mean()


def _shifted(**given: Any) -> Loss:
    return lambda s, t: _jsd(s[:, :-1, :], t[:, :-1, :], LABELS[:, 1:], **given)


def _logp(z: Tensor, temperature: float = 1.0) -> Tensor:
    return (z.float() / temperature).log_softmax(-1)


def _mixture(s: Tensor, t: Tensor) -> Tensor:
    a, b = s.log_softmax(-1), t.log_softmax(-1)
    m = torch.logaddexp(a + torch.tensor(0.3).log(), b + torch.tensor(0.7).log())
    found = 0.3 * F.kl_div(m, a, reduction="none", log_target=True).sum(-1)
    return found.sum() + 0.7 * 0 * b.mean()


def _symmetric(s: Tensor, t: Tensor) -> Tensor:
    a, b = s.log_softmax(-1), t.log_softmax(-1)
    there = F.kl_div(a, b, reduction="none", log_target=True)
    return (there / 2 + F.kl_div(b, a, reduction="none", log_target=True) * 0.25).sum(-1).mean()


TILED: dict[str, Loss] = {
    **{f"GKD, beta {beta}": _shifted(beta=beta) for beta in (0, 0.1, 0.5, 1)},
    "GKD with a temperature": _shifted(temperature=2.0),
    "GKD by tokens": _shifted(count=torch.tensor(9)),
    "GKD, sum": _shifted(reduction="sum", beta=0.3),
    "GKD, mean": _shifted(reduction="mean"),
    "GKD without labels": lambda s, t: _jsd(s, t, beta=0.7),
    "GKD, mixed up": lambda s, t: _jsd(t, s, LABELS, beta=0.2),
    "each row": lambda s, t: F.kl_div(
        _logp(s, 2.0), _logp(t, 2.0), reduction="none", log_target=True
    ).sum(-1),
    "rows of it": lambda s, t: F.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True
    )[:, 2:].reshape(-1, V)[torch.tensor([0, 3, 3])].sum(dim=-1, keepdim=True),
    "mean of each": lambda s, t: F.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True
    ).mean(-1),
    **{f"kl_div, {name}": lambda s, t, name=name: F.kl_div(
        _logp(s[:, 1:]), _logp(t[:, 1:]), reduction=name, log_target=True
    ) for name in ("sum", "mean", "batchmean")},
    "in both directions": _symmetric,
    "beside a cross entropy": lambda s, t: _shifted()(s, t)
    + 0.3 * F.cross_entropy(s[:, :-1].reshape(-1, V), LABELS[:, 1:].reshape(-1)),
}  # fmt: skip

HINTON: Loss = lambda s, t: 4 * F.kl_div(
    (s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean"
)  # fmt: skip
LAZY_TEACHER = {**TILED, "probabilities": HINTON}

LOSSES = {"lazy": {**TILED, "probabilities": HINTON}, "real": TILED}


def _run(student: nn.Module, teacher: nn.Module, loss: Loss, kind: str) -> list[Tensor]:
    student.zero_grad()
    z = student(IDS)
    with torch.no_grad():
        t = teacher(IDS)
    assert isinstance(t, LazyLogits) == (kind == "lazy")
    out = loss(z, t)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    return [out.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]


def _compare(loss: Loss, kind: str, draws: int = 4, **given: Any) -> Reads:
    """Require that ours is as near to fp64 as eager mode; returns what was read.

    Over several weights: roundings of one number may cancel by luck.
    """
    eager, ours = _models(**given)
    exact = tuple(copy.deepcopy(m).double() for m in eager)
    reads = _reads(ours[0])
    reads.tensors.clear()
    reads.tiles.clear()
    pairs = (ours[0], ours[1] if kind == "lazy" else eager[1]), eager, exact
    found: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(draws):
        _draw(seed, *eager, *ours, *exact)
        for (student, teacher), runs, of in zip(pairs, found, (kind, "", ""), strict=True):
            runs.append(_run(student, teacher, loss, of))
    for a, b, c in zip(*(map(list, zip(*runs, strict=True)) for runs in found), strict=True):
        assert exceeded(*map(torch.stack, (a, b, c))) is None
    return reads


def _draw(seed: int, *models: nn.Module) -> None:
    """Other weights, the same ones in students and in teachers."""
    for m in models:
        torch.manual_seed(seed + 100 * isinstance(m, _Wide))
        with torch.no_grad():
            for p in m.parameters():
                p.copy_(torch.randn(p.shape) * (1.5 if p is m.lm_head.weight else 0.3))


@pytest.mark.parametrize(("kind", "loss"), [(k, loss) for k in LOSSES for loss in LOSSES[k]])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_logits_are_made(kind: str, loss: str, frozen: bool) -> None:
    reads = _compare(LOSSES[kind][loss], kind, frozen=frozen)
    assert reads.tensors.total() == 0, reads.reasons()
    assert reads.tiles["divergence"]
    assert _reads(_models(frozen=frozen)[1][1]).tensors.total() == 0


@pytest.mark.parametrize(("kind", "loss"), [(k, loss) for k in LOSSES for loss in LOSSES[k]])
@pytest.mark.parametrize("frozen", [False, True])
def test_in_low_precision(kind: str, loss: str, frozen: bool) -> None:
    reads = _compare(LOSSES[kind][loss], kind, frozen=frozen, dtype=torch.bfloat16)
    assert reads.tensors.total() == 0, reads.reasons()


if __name__ == "__main__":
    import sys
    for dtype in (torch.float32, torch.bfloat16):
      for kind in LOSSES:
        for frozen in (False, True):
          for name, loss in LOSSES[kind].items():
            try:
                reads = _compare(loss, kind, frozen=frozen, dtype=dtype)
                if reads.reasons(): print(kind, name, frozen, dict(reads.tiles), reads.reasons())
            except Exception as e:
                import traceback
                print("FAILED", kind, name, frozen, dtype, repr(e)[:1000]); #traceback.print_exc()
