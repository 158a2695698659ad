"""What is asked of lazy logits without their values equals what eager mode makes of the values.

Rows, scales and casts are recorded; losses, log-probabilities, entropies and top classes end in
tiles; everything else makes a real tensor.
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
from fusewright.auditing import packs
from fusewright.auditing.slices import SampleSpan
from fusewright.compiler.install import active
from fusewright.compiler.logits.lazy_logits import LazyLogits
from fusewright.compiler.logits.reads import Reads
from fusewright.kernels.tolerance import errors, exceeded
from tests.explained import explain

from .test_logits import _LM, IDS, LABELS, USES, V, _plain

TARGETS = torch.arange(14).view(2, 7) * 3 % V
MASK = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 1]]).bool()


@functools.cache
def _pair(
    cap: bool = False, bias: bool = False, frozen: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[_LM, _LM]:
    torch.manual_seed(0)
    eager = _LM(_plain, cap, bias).to(dtype)
    eager.lm_head.requires_grad_(not frozen)
    return eager, optimize(copy.deepcopy(eager), codegen="eager")


def _reads(model: _LM) -> Reads:
    record = active(model)
    assert record is not None
    return record.session.log.reads


def _pick(logp: Tensor, targets: Tensor = TARGETS) -> Tensor:
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _selected_rows(z: Tensor) -> Tensor:
    """As TRL does in fp32: the loop is for memory."""
    chosen = torch.gather(z, dim=-1, index=TARGETS.unsqueeze(-1))
    total = torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    return chosen.squeeze(-1) - total


def _selected_low(z: Tensor) -> Tensor:
    """As TRL does in bf16."""
    rows = [
        F.log_softmax(row, dim=-1).gather(dim=-1, index=t.unsqueeze(-1))
        for row, t in zip(z, TARGETS, strict=True)
    ]
    return torch.stack(rows).squeeze(-1)


def _entropies(z: Tensor) -> Tensor:
    """As TRL does."""
    found = []
    for part in z.reshape(-1, z.shape[-1]).split(5, dim=0):
        logp = F.log_softmax(part, dim=-1)
        found.append(-(torch.exp(logp) * logp).sum(-1))
    return torch.cat(found).reshape(z.shape[:-1])


def _shifted_loss(z: Tensor) -> Tensor:
    rows = z[..., :-1, :].contiguous().view(-1, V)
    return F.cross_entropy(rows, LABELS[..., 1:].reshape(-1))


def _smoothed(z: Tensor) -> Tensor:
    """As the label smoother of transformers does."""
    logp = -F.log_softmax(z[..., :-1, :].contiguous(), dim=-1)
    labels = LABELS[..., 1:].contiguous().unsqueeze(-1)
    ignored = labels.eq(-100)
    nll = logp.gather(dim=-1, index=labels.clamp(min=0))
    smooth = logp.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll, smooth = nll.masked_fill(ignored, 0.0), smooth.masked_fill(ignored, 0.0)
    count = ignored.numel() - ignored.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * smooth.sum() / (count * V)


def _halves(z: Tensor) -> Tensor:
    chosen, rejected = z.chunk(2)
    halves = zip((chosen, rejected), TARGETS.chunk(2), strict=True)
    a, b = (_pick(h.log_softmax(-1), t) for h, t in halves)
    return torch.cat([a.sum(-1) - b.sum(-1), F.cross_entropy(chosen[0], TARGETS[0]).view(1)])


TILED: dict[str, Callable[[Tensor], Tensor]] = {
    "log_softmax, gather": lambda z: _pick(z.log_softmax(-1)),
    "log_softmax, gather of float": lambda z: _pick(F.log_softmax(z.float(), dim=-1)),
    "log_softmax, three columns": lambda z: z.log_softmax(-1).gather(
        -1, torch.stack([TARGETS, TARGETS * 2 % V, TARGETS], -1)
    ),
    "gather, logsumexp": _selected_rows,
    "by row": _selected_low,
    "temperature": lambda z: _pick(torch.log_softmax(z[:, :-1] / 0.7, -1), TARGETS[:, 1:]),
    "scales": lambda z: _pick((2 * z / 3 * 0.5).log_softmax(-1)),
    "cross entropy": lambda z: F.cross_entropy(z.view(-1, V), LABELS.view(-1)),
    "cross entropy of float": lambda z: F.cross_entropy(z.float().view(-1, V), LABELS.view(-1)),
    "cross entropy, sum": lambda z: F.cross_entropy(
        z.flatten(0, 1), LABELS.flatten(), reduction="sum"
    ),
    "cross entropy, each": lambda z: F.cross_entropy(
        z.reshape(-1, V), LABELS.view(-1), reduction="none"
    ),
    "cross entropy, smoothed": lambda z: F.cross_entropy(
        z.view(-1, V) / 2, LABELS.view(-1), label_smoothing=0.1
    ),
    "cross entropy, other index": lambda z: F.cross_entropy(
        z.view(-1, V), LABELS.view(-1).clamp(min=0), ignore_index=3
    ),
    "module": lambda z: torch.nn.CrossEntropyLoss()(z.view(-1, V), LABELS.view(-1)),
    "nll_loss": lambda z: F.nll_loss(z.log_softmax(-1).view(-1, V), LABELS.view(-1)),
    "shifted": _shifted_loss,
    "smoothed": _smoothed,
    "halves": _halves,
    "masked rows": lambda z: _pick(z[MASK].log_softmax(-1), TARGETS[MASK]),
    "masked rows of a slice": lambda z: _pick(
        z[:, 1:][MASK[:, 1:]].log_softmax(-1), TARGETS[:, 1:][MASK[:, 1:]]
    ),
    "chosen rows": lambda z: _pick(z[1, torch.tensor([0, 3, 3])].log_softmax(-1), TARGETS[0, :3]),
    "one row": lambda z: _pick(z[0][2].log_softmax(-1), TARGETS[0, 2]),
    "last": lambda z: z[:, -1, :].logsumexp(-1),
    "unsqueezed": lambda z: z.unsqueeze(1)[:, :, 2:4].squeeze(1).logsumexp(-1),
    "none": lambda z: z[None, :, 3].logsumexp(dim=-1, keepdim=True),
    "iterated": lambda z: torch.stack([row.logsumexp(-1) for part in z for row in part]),
    "unbound": lambda z: torch.stack([row.logsumexp(-1) for row in z.unbind(1)]),
    "z-loss": lambda z: torch.logsumexp(z, dim=-1).square().mean(),
    "mean": lambda z: z.mean(),
    "topk": lambda z: z.topk(3, dim=-1).values,
    "topk of rows": lambda z: torch.topk(z[:, 1:] / 2, 4)[0],
    "detached, and not": lambda z: (_pick(z.log_softmax(-1)), z.detach().mean())[0],
}

REAL: dict[str, Callable[[Tensor], Tensor]] = {
    "entropy": _entropies,
    "entropy with a temperature": lambda z: _entropies(z / 1.5),
    "loss and entropy": lambda z: _pick(z.log_softmax(-1)) - 0.3 * _entropies(z),
    "entropy of softmax": lambda z: torch.logsumexp(z, -1) - torch.sum(F.softmax(z, -1) * z, -1),
    "max": lambda z: z.max(-1).values,
    "mean of each": lambda z: z.mean(-1),
    "tanh": lambda z: z[:, :-1].tanh(),
    "a column": lambda z: z[..., 3],
    "columns": lambda z: z[..., 2:5].log_softmax(-1),
    "other dimension": lambda z: z.log_softmax(1),
    "probabilities": lambda z: (z / 2).softmax(-1),
    "log-probabilities": lambda z: z.log_softmax(-1).view(-1, V),
    "distillation": lambda z: F.kl_div(
        F.log_softmax(z[:, :-1], -1), torch.full((1, 1, V), 1.0 / V), reduction="batchmean"
    ),
    "class weights": lambda z: F.cross_entropy(
        z.view(-1, V), LABELS.view(-1), weight=torch.arange(V).to(z.dtype)
    ),
    "class first": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS),
    "negative": lambda z: (-z).logsumexp(-1),
    "amax": lambda z: z.amax(-1),
    "joined": lambda z: torch.cat([z[:, 1:], z[:, :1]], 1).logsumexp(-1),
    "flat": lambda z: z.view(-1)[5:9],
    "a product": lambda z: (z.softmax(-1) * z.roll(1, 0).log_softmax(-1)).sum(-1),
    "some of it in tiles": lambda z: _pick(z.log_softmax(-1)) + z.exp().sum(-1),
    "tiles of what was read": lambda z: z.exp().sum(-1) * z.logsumexp(-1),
    "a part read": lambda z: z[0].exp().sum(-1) * z[1].logsumexp(-1),
}


def _run(m: _LM, use: Callable[[Tensor], Tensor], **given: Any) -> list[Tensor]:
    m.zero_grad()
    out = use(m(IDS, **given) if not given else m(IDS, **given)[1])
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)
    (out * weights).sum().backward()
    return [out.detach(), *(p.grad for p in m.parameters() if p.grad is not None)]


def _compare(eager: _LM, ours: _LM, use: Callable[[Tensor], Tensor], **given: Any) -> None:
    a, b = _run(eager, use, **given), _run(ours, use, **given)
    assert len(a) == len(b)
    torch.testing.assert_close(b, a, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("use", TILED)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_ends_in_tiles(use: str, frozen: bool) -> None:
    eager, ours = _pair(frozen=frozen)
    before = _reads(ours).tensors.total()
    _compare(eager, ours, TILED[use])
    assert _reads(ours).tensors.total() == before, _reads(ours).reasons()
    assert isinstance(ours(IDS), LazyLogits)


@pytest.mark.parametrize("use", TILED)
def test_with_soft_cap_and_bias(use: str) -> None:
    _compare(*_pair(cap=True, bias=True), TILED[use])


@pytest.mark.parametrize("use", TILED)
def test_beside_a_loss(use: str) -> None:
    _compare(*_pair(bias=True), TILED[use], labels=LABELS)


@pytest.mark.parametrize("use", REAL)
def test_what_makes_a_real_tensor(use: str) -> None:
    eager, ours = _pair()
    _reads(ours).tensors.clear()
    _compare(eager, ours, REAL[use])
    (reason, *_) = _reads(ours).reasons()
    assert "test_lazy_logits.py:" in reason


@pytest.mark.parametrize("use", TILED)
@pytest.mark.parametrize("frozen", [False, True])
def test_in_low_precision(use: str, frozen: bool) -> None:
    eager, ours = _pair(frozen=frozen, dtype=torch.bfloat16)
    exact = copy.deepcopy(eager).double()
    for theirs, mine, oracle in zip(
        *(_run(m, TILED[use]) for m in (eager, ours, exact)), strict=True
    ):
        assert mine.dtype is theirs.dtype
        assert exceeded(mine, theirs, oracle) is None


@pytest.mark.parametrize("frozen", [False, True])
def test_where_all_classes_are_nearly_as_likely(frozen: bool) -> None:
    # what pulls the mean down and what pulls the log-sum-exp up leave hardly anything
    found: list[list[list[Tensor]]] = [[], [], []]
    models = _pair(frozen=frozen)
    models = *models, copy.deepcopy(models[0]).double()
    for seed in range(16):
        torch.manual_seed(seed)
        drawn = [torch.randn_like(p) * 0.05 for p in models[0].parameters()]
        for m, runs in zip(models, found, strict=True):
            with torch.no_grad():
                for p, values in zip(m.parameters(), drawn, strict=True):
                    p.copy_(values)
            runs.append(_run(m, TILED["smoothed"]))
    _pair.cache_clear()  # its weights are others now
    for theirs, mine, oracle in zip(*(map(list, zip(*f, strict=True)) for f in found), strict=True):
        assert exceeded(*map(torch.stack, (mine, theirs, oracle))) is None


def test_what_an_autograd_function_detaches_stays_pending() -> None:
    """As the hooks do by which engines fetch weights before a backward pass."""

    class Hook(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.detach()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    eager, ours = _pair()
    before = _reads(ours).tensors.total()
    for m in (eager, ours):
        m.zero_grad()
        z = Hook.apply(m(IDS))
        _pick(z.log_softmax(-1)).sum().backward()
    assert isinstance(z, LazyLogits)
    assert z.is_pending
    assert _reads(ours).tensors.total() == before, _reads(ours).reasons()
    for p, q in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-4, atol=1e-6)


def _used(m: _LM, loss: Callable[[Tensor], Tensor], use: Callable[..., Any]) -> list[Tensor]:
    m.zero_grad()
    z = m(IDS)
    made = loss(z)
    seen = use(made, z)
    return [made.detach(), *(g.detach().clone() for g in seen),
            *(p.grad for p in m.parameters() if p.grad is not None)]  # fmt: skip


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": _shifted_loss,
    "two": lambda z: _pick(z.log_softmax(-1)).mean() + _entropies(z[:, 1:] / 2).mean(),
    "selected": lambda z: _selected_rows(z).mean(),
}


@pytest.mark.parametrize("use", sorted(set(USES) - {"written to", "a part written to", "added to"}))
@pytest.mark.parametrize("loss", LOSSES)
def test_a_use_of_the_logits_beside_a_loss_of_the_caller(loss: str, use: str) -> None:
    eager, ours = _pair()
    a, b = (_used(m, LOSSES[loss], USES[use]) for m in (eager, ours))
    torch.testing.assert_close(b, a, rtol=2e-4, atol=1e-6)


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice": lambda z: z[:, :-1],
    "a view": lambda z: z.view(-1, V),
    "a scale": lambda z: z / 0.7,
    "a cast": lambda z: z.double(),
    "chosen rows": lambda z: z[MASK],
    "log-probabilities": lambda z: z.log_softmax(-1),
    "probabilities": lambda z: z.softmax(-1),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", ["look", "scale", "retain", "ask", "differentiate"])
def test_hooks_on_what_was_recorded(part: str, change: str) -> None:
    found = []
    for m in _pair():
        m.zero_grad()
        z = m(IDS)
        p = PARTS[part](z)
        seen: list[Tensor] = []
        if change in ("look", "scale"):
            factor = 3 if change == "scale" else None

            def hook(g: Tensor, seen: list[Tensor] = seen, factor: Any = factor) -> Any:
                seen.append(g)
                return None if factor is None else g * factor

            p.register_hook(hook)
        elif change == "retain":
            p.retain_grad()
        if part == "probabilities":
            loss = (p * p).sum(-1).mean() + (p * z.log_softmax(-1)).sum(-1).mean()
        elif part == "log-probabilities":
            loss = -(p.exp() * p).sum(-1).mean() + p.gather(-1, TARGETS.unsqueeze(-1)).mean()
        else:
            loss = p.logsumexp(-1).square().mean() + p.reshape(-1, V).mean()
        if change in ("ask", "differentiate"):
            again = change == "differentiate"
            (g,) = torch.autograd.grad(loss, p, retain_graph=True, create_graph=again)
            seen.append(g)
            if again:
                loss = loss + 10 * g.square().sum()
        loss.backward()
        if change == "retain":
            seen.append(p.grad)
        found.append([loss.detach(), *(s.detach() for s in seen),
                      *(q.grad for q in m.parameters() if q.grad is not None)])  # fmt: skip
    torch.testing.assert_close([t + 0 for t in found[1]], found[0], rtol=2e-4, atol=1e-6)


def _divide_base(z: Tensor) -> Tensor:
    rows = z[:, :-1]
    z.div_(0.7)
    return rows.logsumexp(-1).sum() + z.logsumexp(-1).sum()


def _divide_view(z: Tensor) -> Tensor:
    rows = z[:, :-1]
    rows /= 0.7
    return rows.logsumexp(-1).sum() + z.logsumexp(-1).sum()


def _divide_view_of_view(z: Tensor) -> Tensor:
    rows, other = z[:, :-1], z[0]
    part = rows[1]
    part.mul_(1.5)
    return rows.logsumexp(-1).sum() + other.logsumexp(-1).sum() + part.mean()


def _copy_before(z: Tensor) -> Tensor:
    copies = [z[MASK], z * 2, z[:, 1:].reshape(-1, V), z[:, 1:][0] * 3]
    z.add_(1)
    return sum((c.logsumexp(-1).sum() for c in copies), z.tanh().sum())


def _read_then_written(z: Tensor) -> Tensor:
    rows = z[:, :-1]
    first = rows.tanh().sum().detach()
    z[0] = 0.5
    return rows.logsumexp(-1).sum() + first


def _detached_view(z: Tensor) -> Tensor:
    rows, still = z[:, :-1], z.detach()
    z.mul_(2.0)
    return rows.logsumexp(-1).sum() + still.logsumexp(-1).sum()


@pytest.mark.parametrize(
    "use",
    [_divide_base, _divide_view, _divide_view_of_view, _copy_before, _read_then_written,
     _detached_view],
)  # fmt: skip
@pytest.mark.parametrize("grad", [False, True])
def test_writes_are_seen_by_views_and_not_by_copies(use: Any, grad: bool) -> None:
    found = []
    for m in _pair():
        m.zero_grad()
        z = m(IDS)
        with torch.set_grad_enabled(grad):
            loss = use(z)
        if grad:
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in m.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("use", TILED)
def test_without_gradients(use: str) -> None:
    eager, ours = _pair(bias=True)
    with torch.no_grad():
        a = TILED[use](eager(IDS))
    b = ours(IDS)
    with torch.no_grad():
        torch.testing.assert_close(TILED[use](b), a)


@pytest.mark.long
def test_under_autocast() -> None:
    """Over several models: in one of them, roundings of these few numbers may cancel by luck."""
    off = {use: [0.0, 0.0] for use in TILED}
    for seed in range(5):
        torch.manual_seed(seed)
        eager = _LM(_plain, False, False)
        ours, exact = optimize(copy.deepcopy(eager), codegen="eager"), copy.deepcopy(eager).double()
        for use, function in TILED.items():
            found = []
            for m in (eager, ours, exact):
                with torch.autocast("cpu", torch.bfloat16, enabled=m is not exact):
                    found.append(_run(m, function))
            for theirs, mine, oracle in zip(*found, strict=True):
                assert mine.dtype is theirs.dtype
                off[use][0] += errors(mine, oracle).rms ** 2
                off[use][1] += errors(theirs, oracle).rms ** 2
        torch._dynamo.reset()
    for use, (mine, theirs) in off.items():
        assert mine**0.5 <= 1.5 * theirs**0.5, use


@pytest.mark.parametrize("k", [1, 3])
def test_top_classes(k: int) -> None:
    for cap in (False, True):
        eager, ours = _pair(cap=cap)
        z, y = eager(IDS), ours(IDS)
        assert torch.equal(y.argmax(-1), z.argmax(-1))
        assert torch.equal(y[:, 1:].argmax(-1), z[:, 1:].argmax(-1))
        assert torch.equal(y.topk(k).indices, z.topk(k).indices)
        assert torch.equal(y.log_softmax(-1).argmax(-1, keepdim=True), z.argmax(-1, keepdim=True))


def test_wrong_arguments_raise_what_they_always_raise() -> None:
    eager, ours = _pair()
    for wrong in (
        lambda z: z.view(3, -1, V),
        lambda z: z[:, 1:].view(-1, V),
        lambda z: z[5],
        lambda z: F.cross_entropy(z.view(-1, V), torch.full((14,), V)),
        lambda z: z.log_softmax(-1).gather(-1, torch.full((2, 7, 1), V)),
        lambda z: z.gather(-1, torch.full((2, 7, 1), -1)),
        lambda z: z.split(-1),
        lambda z: z.squeeze(7),
    ):
        kinds = []
        for m in (eager, ours):
            with pytest.raises((RuntimeError, IndexError)) as error:
                wrong(m(IDS))
            kinds.append(error.type)
        assert kinds[0] is kinds[1] or issubclass(kinds[1], (RuntimeError, IndexError))


def test_a_part_that_is_read_after_a_step_is_an_error_or_what_it_was() -> None:
    _, ours = copy.deepcopy(_pair())
    z = ours(IDS)
    rows, kept = ours(IDS)[:, :-1], z.detach()[:, 1:]
    z.logsumexp(-1).sum().backward()
    rows.logsumexp(-1).sum().backward()
    before = ours(IDS)[:, 1:].detach().clone()
    torch.optim.SGD(ours.parameters(), 0.1).step()
    torch.testing.assert_close(kept + 0, before)
    with pytest.raises(RuntimeError, match="before the weights"):
        rows.logsumexp(-1)


def test_more_reads_than_python_recurses() -> None:
    _compare(
        *_pair(frozen=True), lambda z: sum(z[0, i % 7].logsumexp(-1) / 1100 for i in range(1100))
    )


def test_only_training_steps_are_lazy() -> None:
    _, ours = _pair()
    with torch.no_grad():
        assert type(ours(IDS)) is Tensor
    ours.eval()
    assert type(ours(IDS)) is Tensor
    ours.train()


def test_the_report_says_what_was_read() -> None:
    ours = optimize(copy.deepcopy(_pair()[0]), codegen="eager")
    z = ours(IDS)
    _pick(z.log_softmax(-1)).sum()
    z.sin()
    report = explain(ours)
    assert "log-probabilities 1x" in report.logits
    assert any("by sin at" in b.reason for b in report.bypasses)


def test_a_read_by_an_audit_is_not_said_to_be_its_callers() -> None:
    ours = optimize(copy.deepcopy(_pair()[0]), codegen="eager")
    z = ours(IDS)
    with torch.no_grad():
        packs._distance(z, torch.zeros(*IDS.shape, V), [SampleSpan(0, 0, 2)])
    (reason,) = _reads(ours).reasons()
    assert "at auditing/packs.py:" in reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_is_not_above_itself(dtype: torch.dtype) -> None:
    """A single logit that was returned is the one of the logits that are made after it."""
    _, ours = _pair(dtype=dtype)
    for part in (lambda z: z, lambda z: z[:, 1:], lambda z: z.float()):
        z = part(ours(IDS))
        targets = part(z).argmax(-1, keepdim=True)
        picked = z.gather(-1, targets)
        assert torch.equal(picked, (z + 0).gather(-1, targets))
