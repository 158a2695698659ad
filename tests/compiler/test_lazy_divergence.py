"""Divergences of two models' logits end in tiles, and equal what eager mode makes of them.

The student's logits are lazy; the teacher's are, too, or a real tensor.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright import optimize
from fusewright.compiler.logits.lazy_logits import LazyLogits
from fusewright.compiler.logits.reads import Reads
from fusewright.compiler.logits.recorded import programs
from fusewright.kernels.loss import head_tiles
from fusewright.kernels.tolerance import errors

from .test_lazy_logits import MASK, _reads
from .test_logits import _LM, IDS, LABELS, H, V, _plain

Loss = Callable[[Tensor, Tensor], Tensor]


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
        mixture = torch.logsumexp(torch.stack([s + torch.log1p(-beta), t + torch.log(beta)]), dim=0)
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
    return ((z if z.dtype is torch.float64 else z.float()) / temperature).log_softmax(-1)


def _by_lerp(s: Tensor, t: Tensor, alpha: float) -> Tensor:
    """As TRL's self-distillation does."""
    a, b, share = s.log_softmax(-1), t.log_softmax(-1), torch.tensor(alpha, dtype=s.dtype)
    mixture = torch.logsumexp(torch.stack([a + torch.log(1 - share), b + torch.log(share)]), dim=0)
    there, back = (F.kl_div(mixture, z, reduction="none", log_target=True) for z in (b, a))
    return torch.lerp(back, there, alpha).sum(-1)


def _symmetric(s: Tensor, t: Tensor) -> Tensor:
    a, b = s.log_softmax(-1), t.log_softmax(-1)
    there = F.kl_div(a, b, reduction="none", log_target=True)
    return (there / 2 + F.kl_div(b, a, reduction="none", log_target=True) * 0.25).sum(-1).mean()


def _kl(s: Tensor, t: Tensor) -> Tensor:
    return F.kl_div(s.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True)


def _half_a_mixture(s: Tensor, t: Tensor) -> Tensor:
    a, b = s.log_softmax(-1), t.log_softmax(-1)
    m = torch.logaddexp(a + math.log(0.3), b + math.log(0.7))
    return F.kl_div(m, a, reduction="none", log_target=True).sum(-1)


def _halves_of_a_mixture(first: float, second: float) -> Loss:
    """Half of each divergence from a mixture with these shares."""

    def loss(s: Tensor, t: Tensor) -> Tensor:
        a, b = s.log_softmax(-1), t.log_softmax(-1)
        m = torch.logaddexp(a + math.log(first), b + math.log(second))
        there, back = (F.kl_div(m, z, reduction="none", log_target=True) for z in (a, b))
        return (0.5 * there + 0.5 * back).sum(-1)

    return loss


def _constant_mixture(s: Tensor, t: Tensor) -> Tensor:
    a, b = s.log_softmax(-1), t.log_softmax(-1)
    with torch.no_grad():
        m = torch.logaddexp(a + math.log(0.5), b + math.log(0.5))
    there, back = (F.kl_div(m, z, reduction="none", log_target=True) for z in (a, b))
    return (0.5 * there + 0.5 * back).sum(-1)


def _constant_student(s: Tensor, t: Tensor) -> Tensor:
    a, b = s.log_softmax(-1), t.log_softmax(-1)
    m = torch.logaddexp(a + math.log(0.5), b + math.log(0.5))
    there, back = (F.kl_div(m, z, reduction="none", log_target=True) for z in (a.detach(), b))
    return (0.5 * there + 0.5 * back).sum(-1)


def _hinton(s: Tensor, t: Tensor) -> Tensor:
    return 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean")


SUMS: dict[str, Loss] = {
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
    "by lerp": lambda s, t: _by_lerp(s, t, 0.3),
    "probabilities": _hinton,
    "half a mixture": _half_a_mixture,
    "other shares": _halves_of_a_mixture(0.3, 0.7),
    "shares that are not all": _halves_of_a_mixture(0.5, 0.4),
    "a constant mixture": _constant_mixture,
    "a constant student": _constant_student,
    "beside a cross entropy": lambda s, t: _shifted()(s, t)
    + 0.3 * F.cross_entropy(s[:, :-1].reshape(-1, V), LABELS[:, 1:].reshape(-1)),
}  # fmt: skip


def _masked(s: Tensor, t: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, 14, dtype=s.dtype).view(2, 7, 1)
    return (_kl(s, t) * MASK.unsqueeze(-1) * weights).sum()


def _by_formula(s: Tensor, t: Tensor) -> Tensor:
    a, b = s.log_softmax(-1), t.log_softmax(-1)
    return (b.exp() * (b - a) + 0.3 * (a.exp() - b.exp()).square()).sum(-1)


PROGRAMS: dict[str, Loss] = {
    "squared": lambda s, t: _kl(s, t).square().sum(-1),
    "a list of dimensions": lambda s, t: _kl(s, t).square().sum([-1]),
    "a number more": lambda s, t: (s.log_softmax(-1) + 1.0).exp().square().sum(-1),
    "masked": _masked,
    "by formula": _by_formula,
    "half a constant": lambda s, t: ((1 - _kl(s, t)) * _kl(s, t).detach() - 2).sum(-1),
}
"""What is no sum of divergences."""

TILED = SUMS | PROGRAMS
LOSSES = {"lazy": TILED, "real": TILED}


def _run(
    student: nn.Module, teacher: nn.Module, loss: Loss, kind: str, autocast: bool = False
) -> list[Tensor]:
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = student(IDS)
        with torch.no_grad():
            t = teacher(IDS)
        assert isinstance(t, LazyLogits) == (kind == "lazy")
        out = loss(z, t)
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    return [out.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]


def _compare(loss: Loss, kind: str, draws: int = 8, autocast: bool = False, **given: Any) -> Reads:
    """Require that ours is as near to fp64 as eager mode; returns what was read.

    Over several weights: roundings of few numbers may cancel by luck, and the largest one is luck.
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
            is_exact = student is exact[0]
            runs.append(_run(student, teacher, loss, of, autocast and not is_exact))
    for a, b, c in zip(*(map(list, zip(*runs, strict=True)) for runs in found), strict=True):
        mine, theirs, oracle = map(torch.stack, (a, b, c))
        assert mine.dtype is theirs.dtype
        near = 1.5 * errors(theirs, oracle).rms + torch.finfo(mine.dtype).eps
        assert errors(mine, oracle).rms <= near
    return reads


def _draw(seed: int, *models: nn.Module) -> None:
    """Other weights, the same ones in students and in teachers."""
    for m in models:
        torch.manual_seed(seed + 100 * isinstance(m, _Wide))
        with torch.no_grad():
            for p in m.parameters():
                p.copy_(torch.randn(p.shape) * (1.5 if p is m.lm_head.weight else 0.3))


EACH = [(kind, loss) for kind, losses in LOSSES.items() for loss in losses]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(("kind", "loss"), EACH)
@pytest.mark.parametrize("frozen", [False, True])
def test_no_logits_are_made(kind: str, loss: str, frozen: bool) -> None:
    reads = _compare(LOSSES[kind][loss], kind, frozen=frozen)
    assert reads.tensors.total() == 0, reads.reasons()
    assert reads.tiles["divergence"]
    assert _reads(_models(frozen=frozen)[1][1]).tensors.total() == 0


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(("kind", "loss"), EACH)
@pytest.mark.parametrize("frozen", [False, True])
def test_in_low_precision(kind: str, loss: str, frozen: bool) -> None:
    reads = _compare(LOSSES[kind][loss], kind, frozen=frozen, dtype=torch.bfloat16)
    assert reads.tensors.total() == 0, reads.reasons()


@pytest.mark.parametrize("kind", LOSSES)
def test_under_autocast(kind: str) -> None:
    _compare(_shifted(beta=0.3), kind, autocast=True)


# --------------------------------------------------------------------------------- a real tensor


def _written(s: Tensor, t: Tensor) -> Tensor:
    a = s.log_softmax(-1)
    found = F.kl_div(a, t.log_softmax(-1), reduction="none", log_target=True)
    found *= MASK.unsqueeze(-1)
    found[~MASK] = 0.5
    return found.sum(-1)


REAL: dict[str, Loss] = {
    "over rows": lambda s, t: _kl(s, t).sum(1),
    "a class": lambda s, t: _kl(s, t)[..., 3],
    "one row for all": lambda s, t: F.kl_div(
        s.log_softmax(-1), t[:1, :1].log_softmax(-1), reduction="none", log_target=True
    ).sum(-1),
    "a row of the stack": lambda s, t: torch.stack([s.log_softmax(-1), t.log_softmax(-1)])[0],
    "a mixture": lambda s, t: torch.stack([s.log_softmax(-1), t.log_softmax(-1)]).logsumexp(0),
    "means of two": lambda s, t: torch.stack([s.log_softmax(-1), t.log_softmax(-1)]).mean(-1),
    "the whole": lambda s, t: _kl(s, t)[MASK],
    "an old argument": lambda s, t: F.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), size_average=False, log_target=True
    ),
    "two dtypes": lambda s, t: torch.stack(
        [s.log_softmax(-1), t.log_softmax(-1, dtype=torch.float64)]
    ).logsumexp(0),
    "written to": _written,
}  # fmt: skip


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("loss", REAL)
def test_what_makes_a_real_tensor(loss: str, kind: str) -> None:
    reads = _compare(REAL[loss], kind, draws=1)
    assert any("test_lazy_divergence.py:" in r for r in reads.reasons())


def test_temperatures_that_differ() -> None:
    def loss(s: Tensor, t: Tensor) -> Tensor:
        return _kl(s, t / 2).sum(-1)

    for kind in LOSSES:
        assert _compare(loss, kind, draws=1).tensors.total() == 0


@pytest.mark.parametrize("loss", ["GKD, beta 0.1", "squared"])
def test_a_soft_cap(loss: str) -> None:
    torch.manual_seed(0)
    eager, teacher = _LM(_plain, True, False), _models()[0][1]
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    a, b = (_run(m, teacher, TILED[loss], "") for m in (eager, ours))
    torch.testing.assert_close(b, a, rtol=2e-4, atol=1e-6)
    assert not _reads(ours).tensors


# ---------------------------------------------------------------------------------------- in tiles


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("loss", TILED)
def test_which_gradients_are_by_hand(loss: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd takes a third more time for a sum of divergences."""
    runs: list[bool] = []
    run = programs._Strip.run
    monkeypatch.setattr(programs._Strip, "run", lambda *a: runs.append(a[-1]) or run(*a))
    (_, teacher), (ours, other) = _models(frozen=True)
    _run(ours, other if kind == "lazy" else teacher, TILED[loss], kind)
    is_sum = loss in SUMS and (loss, kind) != ("probabilities", "real")
    assert (True in runs) is is_sum


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(("kind", "loss"), [(kind, loss) for kind in LOSSES for loss in TILED])
@pytest.mark.parametrize("frozen", [False, True])
def test_many_tiles_in_fp64(
    kind: str, loss: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in fp64, where a wrong term of a gradient is no rounding."""
    monkeypatch.setattr(head_tiles, "TILE_BYTES", 1 << 11)
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 1)
    monkeypatch.setattr(head_tiles, "STRIP_ELEMENTS", 1)
    (eager, teacher), (ours, other) = _models(frozen=frozen, dtype=torch.float64)
    expected = _run(eager, teacher, TILED[loss], "")
    _reads(ours).tensors.clear()
    result = _run(ours, other if kind == "lazy" else teacher, TILED[loss], kind)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    assert not _reads(ours).tensors


@pytest.mark.parametrize("loss", ["by lerp", "squared"])
@pytest.mark.parametrize("frozen", [False, True])
def test_logits_exist_only_in_tiles(
    loss: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_tiles, "TILE_BYTES", 1 << 12)
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 1)
    rows: list[int] = []
    monkeypatch.setattr(
        programs, "project", lambda x, *rest: (rows.append(len(x)), head_tiles.project(x, *rest))[1]
    )
    ours, other = _models(frozen=frozen)[1]
    ids = IDS.repeat(8, 1)
    z = ours(ids)
    with torch.no_grad():
        t = other(ids)
    TILED[loss](z[:, :-1], t[:, :-1]).sum().backward()
    assert max(rows) <= 13
    # a frozen head is not multiplied once more in backward
    assert sum(rows) == 8 * 2 * 6 * 2 * (1 if frozen else 2)
    assert z.is_pending
    assert t.is_pending


@pytest.mark.parametrize("size", [1000.0, -1000.0])
def test_a_table_without_exponentials(size: float) -> None:
    """Its numbers are no log-probabilities; a mixture with them is what eager mode makes of it."""

    def loss(s: Tensor, t: Tensor) -> Tensor:
        a = s.log_softmax(-1)
        mixture = torch.logaddexp(a + math.log(0.3), table.to(a.dtype))
        return F.kl_div(mixture, a, reduction="none", log_target=True).sum(-1)

    table = torch.randn(2, 7, V, generator=torch.Generator().manual_seed(0)) + size
    (eager, teacher), (ours, _) = _models()
    _reads(ours).tensors.clear()
    expected, result = (_run(m, teacher, loss, "") for m in (eager, ours))
    torch.testing.assert_close(result, expected, rtol=2e-4, atol=1000 * 1e-6)  # of numbers so large
    assert not _reads(ours).tensors


def test_both_are_trained() -> None:
    found = []
    for student, teacher in _models():
        student.zero_grad()
        teacher.train()
        _shifted(beta=0.3)(student(IDS), teacher(IDS)).backward()
        teacher.eval()
        found.append([p.grad for m in (student, teacher) for p in m.parameters()])
        teacher.zero_grad(set_to_none=True)
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("beta", [0, 0.4])
def test_no_row_counts(kind: str, beta: float) -> None:
    labels = torch.full_like(LABELS, -100)
    reads = _compare(lambda s, t: _jsd(s, t, labels, beta=beta), kind, draws=1)
    assert reads.tensors.total() == 0


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("change", ["look", "scale", "retain", "differentiate"])
@pytest.mark.parametrize("part", ["logits", "log-probabilities", "divergence"])
def test_hooks(kind: str, change: str, part: str) -> None:
    found = []
    (eager, teacher), (ours, other) = _models()
    for student, of in ((eager, teacher), (ours, other if kind == "lazy" else teacher)):
        student.zero_grad()
        z = student(IDS)
        with torch.no_grad():
            t = of(IDS).log_softmax(-1)
        s = z.log_softmax(-1)
        d = F.kl_div(s, t, reduction="none", log_target=True)
        p = {"logits": z, "log-probabilities": s, "divergence": d}[part]
        seen: list[Tensor] = []
        if change in ("look", "scale"):
            p.register_hook(
                lambda g, seen=seen: seen.append(g) or (3 * g if change == "scale" else None)
            )
        elif change == "retain":
            p.retain_grad()
        loss = d[MASK].sum()
        if change == "differentiate":
            (g,) = torch.autograd.grad(loss, p, create_graph=True)
            seen.append(g)
            loss = loss + (10 * g.square().sum() if g.requires_grad else 0.0)
        loss.backward()
        if change == "retain":
            seen.append(p.grad)
        grads = [q.grad for q in student.parameters() if q.grad is not None]
        found.append([loss.detach(), *(x.detach() + 0 for x in seen), *grads])
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


def test_a_teacher_that_is_written_to_is_an_error_and_no_wrong_value() -> None:
    (_, teacher), (ours, _) = _models()
    with torch.no_grad():
        t = teacher(IDS).log_softmax(-1)
    d = F.kl_div(ours(IDS).log_softmax(-1), t, reduction="none", log_target=True)
    t.zero_()
    with pytest.raises(RuntimeError, match="written to since"):
        d.sum()


@pytest.mark.parametrize("shape", [(), (2, 7, 1), (2, 7, V)])
@pytest.mark.parametrize("operation", ["mul", "lerp"])
@torch.no_grad()
def test_what_is_written_to_later_without_gradients(operation: str, shape: tuple[int, ...]) -> None:
    found = []
    for student, _ in _models():
        factor = torch.full(shape, 0.3)
        z = student(IDS).log_softmax(-1)
        product = z * factor if operation == "mul" else torch.lerp(z, factor.expand(2, 7, V), 0.3)
        factor.zero_()
        found.append(product.sum(-1))
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


def test_log_probabilities_of_no_softmax() -> None:
    given = torch.randn(2, 7, V, generator=torch.Generator().manual_seed(0)) - 2
    reads = _compare(
        lambda s, t: F.kl_div(
            s.log_softmax(-1), given.to(t.dtype), reduction="sum", log_target=True
        ),
        "real",
    )
    assert reads.tensors.total() == 0


def test_when_a_teacher_is_lazy() -> None:
    student, teacher = _models()[1]
    with torch.no_grad():
        assert type(teacher(IDS)) is Tensor
        z = student(IDS)
        assert type(teacher(IDS)) is Tensor  # the student's has no history: it waits for no loss
    z = student(IDS)
    with torch.no_grad():
        assert isinstance(teacher(IDS), LazyLogits)
        with torch.inference_mode():
            assert not isinstance(teacher(IDS), LazyLogits)
        student.eval()
        assert type(student(IDS)) is Tensor  # it is the same model
        student.train()
    assert type(teacher(IDS)) is Tensor  # it is trained
    z.sum().backward()
    with torch.no_grad():
        assert type(teacher(IDS)) is Tensor
    z = student(IDS)
    del z
    with torch.no_grad():
        assert type(teacher(IDS)) is Tensor
