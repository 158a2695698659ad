"""What is written to after a loss was made of lazy logits makes no gradient silently wrong.

Eager mode raises where its backward pass needs what was written to. So do lazy logits, unless they
have what is needed: then the gradient is the one of what the loss was computed of.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .test_lazy_logits import MASK, TARGETS
from .test_lazy_logits import _pair as _pair_of
from .test_logits import _LM, IDS, V

_pair = functools.partial(_pair_of, bias=True)


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
    for m in _pair(frozen=frozen, cap=cap):
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
    eager, ours = _pair(frozen=frozen)
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
    found, errors = [], []
    for m in _pair():
        m.zero_grad()
        item, write = CHOICES[choice]()
        rows = m(IDS)[item]
        write()
        made = rows.sin()
        errors.append(_error(made.square().sum()))  # the backward pass needs some of these
        found.append([made.detach(), *_gradients(m)])
    assert (errors[0] is None) == (errors[1] is None), errors
    _close(found[1], found[0])


def _hook(z: Tensor) -> Tensor:
    seen: list[Tensor] = []
    z.register_hook(seen.append)
    z.double().square().sum().backward(retain_graph=True)
    return seen[0].mean()


def _retained(z: Tensor) -> Tensor:
    z.retain_grad()
    z.double().square().sum().backward(retain_graph=True)
    assert z.grad is not None
    return z.grad.mean()


def _asked(z: Tensor) -> Tensor:
    return torch.autograd.grad(z.double().square().sum(), z, retain_graph=True)[0].mean()


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "a slice": lambda z: z[:, :-1].mul_(1.5),
    "two slices": lambda z: (z[:, :-1].mul_(1.5), z[:, 1:].mul_(0.5)),
    "a slice, then all": lambda z: (z[:, :-1].mul_(1.5), z.mul_(0.5)),
    "a row": lambda z: z[0].zero_(),
    "a view": lambda z: z.view(-1, V).mul_(1.5),
    "a view of a view": lambda z: z.view(-1, V)[2:5].mul_(2),
    "an item": lambda z: z.__setitem__((slice(None), 0), z[:, 0] * 0.5),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "a cast": lambda z: z.double().square().sum(),
    "a cast by to": lambda z: z.to(torch.float64).square().sum(),
    "a cast to that of another": lambda z: z.type_as(torch.ones((), dtype=torch.float64)).sum(),
    "a copy": lambda z: z.clone().square().sum(),
    "log-probabilities": lambda z: z.double().log_softmax(-1)[..., 3].sum(),
    "a slice": lambda z: z[:, 2:].double().square().sum(),
    "a hook": _hook,
    "a gradient that is kept": _retained,
    "a gradient that is asked for": _asked,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", WRITES)
def test_what_is_read_after_a_write_into_a_part(write: str, read: str) -> None:
    """Its gradient passes the write, as the values do."""
    for before in (lambda z: z.mean(), lambda z: z[:, 1:4], lambda z: z.double()):
        made = []
        # Capped: torch 2.13 ends the process at a hook of a view that was written to by a part of
        # it, and without a cap eager mode's logits are a view.
        for m in _pair(cap=True):
            m.zero_grad()
            z = m(IDS)
            first = before(z)
            WRITES[write](z)
            value = READS[read](z)
            (value + first.sum()).backward()
            made.append([value.detach(), *_gradients(m)])
        _close(*reversed(made))


def test_hooks_of_parts_that_were_written_to() -> None:
    made = []
    for m in _pair():
        m.zero_grad()
        z, seen = m(IDS), list[Tensor]()
        part = z[:, 1:4]
        z.mul_(2)
        if m is _pair()[0]:  # PyTorch 2.13 ends the process where it makes this with a hook
            assert part.grad_fn is not None
        part.register_hook(seen.append)
        (part.sin().sum() + z.sum()).backward()
        made.append([seen[0] + 0, *_gradients(m)])
    _close(*reversed(made))


PARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a gradient that is kept": lambda z, q: _retained(q),
    "a gradient that is asked for": lambda z, q: _asked(q),
    "kept, and both are read": lambda z, q: _retained(q) + z.double().exp().sum(),
}


@pytest.mark.parametrize("use", PARTS)
def test_a_part_that_was_written_to(use: str) -> None:
    made = []
    for m in _pair(cap=True):
        m.zero_grad()
        z = m(IDS)
        part = z[:, 1:]
        z[:, :-1].mul_(2)
        value = PARTS[use](z, part)
        (value + part.sum()).backward()
        made.append([value.detach(), *_gradients(m)])
    _close(*reversed(made))


def test_a_gradient_that_was_kept_before_a_write() -> None:
    made = []
    for m in _pair(cap=True):
        z = m(IDS)
        z.retain_grad()
        z[:, 1:].mul_(2)
        z.exp().sum().backward()
        made.append(z.grad)
        z, _ = m(IDS), m.zero_grad()
        z.retain_grad()
        z.exp().sum().backward()
        z.detach()[:, -1].zero_()
        made.append(z.grad)
    _close(made[2:], made[:2])


def test_a_gradient_to_be_kept_that_came_after_a_write() -> None:
    made = []
    for m in _pair(cap=True):
        z = m(IDS)
        z.retain_grad()
        part = z[:, 1:]
        z[:, :-1].mul_(2)
        part.exp().sum().backward()
        made.append(z.grad)
    _close(*reversed(made))


class _Exp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


# what takes the history of a tensor in C++, where nothing can be put in its place
IN_CPP: dict[str, Callable[[Tensor], Tensor]] = {
    "a function": lambda z: _Exp.apply(z).sum(),  # type: ignore[no-untyped-call]
    "vmap": lambda z: torch.vmap(lambda row: (row * 2).exp().sum(), in_dims=1)(z).sum(),
    "torch.func.grad": lambda z: torch.func.grad(lambda x: x.exp().sum())(z).sum(),
    "a checkpoint": lambda z: checkpoint(
        lambda x: x.double().log_softmax(-1)[..., 3].sum(), z, use_reentrant=True
    ),
}
SEEN: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda z: None,
    "all": lambda z: z.mul_(0.5),
    "an item": WRITES["an item"],
    "a slice": WRITES["a slice"],
    "a slice, read before": lambda z: (z.exp(), WRITES["a slice"](z)),
    "a write that autograd does not see": lambda z: z.detach()[:, 1:].mul_(2),
}


class _Square(torch.autograd.Function):
    """Saves what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class _Doubled(torch.autograd.Function):
    """Writes into a part of what it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x[:, :-1].mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.cat((2 * grad[:, :-1], grad[:, -1:]), 1)


@pytest.mark.parametrize("write", SEEN)
@pytest.mark.parametrize("read", IN_CPP)
def test_what_takes_the_history_in_cpp(read: str, write: str) -> None:
    made = []
    for m in _pair(cap=True):
        m.zero_grad()
        z = m(IDS)
        SEEN[write](z)
        value = IN_CPP[read](z)
        value.backward()
        made.append([value.detach(), *_gradients(m)])
    _close(*reversed(made))


_half = WRITES["a slice"]


def _silently(use: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def call(z: Tensor) -> Any:
        with torch.no_grad():
            return use(z)

    return call


SAVED: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda z: z.square().sum(),
    "a part": lambda z: z[:, 1:].square().sum(),
    "a part, and all was read": lambda z: z[:, 1:].square().sum() + z.exp().sum(),
    "by a function": lambda z: _Square.apply(z).sum(),  # type: ignore[no-untyped-call]
    "a part by a function": lambda z: _Square.apply(z[:, 1:]).sum(),  # type: ignore[no-untyped-call]
}
LATER: dict[str, Callable[[Tensor], Any]] = {
    "a slice": _half,
    "without a gradient": _silently(_half),
    "detached": lambda z: z.detach()[:, 1:].mul_(2),
    "all": lambda z: z.mul_(2),
    "all without a gradient": _silently(lambda z: z.mul_(2)),
}


def _write_and_differentiate(write: Callable[[Tensor], Any], z: Tensor, value: Tensor) -> None:
    write(z)
    value.backward()


@pytest.mark.parametrize("write", LATER)
@pytest.mark.parametrize("use", SAVED)
def test_what_autograd_saved_is_not_read_after_a_write(use: str, write: str) -> None:
    """Eager mode refuses each; so does ours, at the write or in the backward pass."""
    for m in _pair(cap=True):
        z = m(IDS)
        value = SAVED[use](z)
        with pytest.raises(RuntimeError, match=r"in-place operation|inplace operation|in place"):
            _write_and_differentiate(LATER[write], z, value)


def _read_by_a_hook(z: Tensor) -> Tensor:
    seen: list[Tensor] = []
    z.register_hook(lambda grad: seen.append((z * grad).sum()))
    z.detach()[..., 3] = 1.0
    value = z.logsumexp(-1).sum()
    value.backward(retain_graph=True)
    return value + seen[0].detach()


RIGHT: dict[str, Callable[[Tensor], Any]] = {
    "a hook that reads them": _read_by_a_hook,
    "a part that is gone, then a write without a gradient": lambda z: (
        z[:, :-1].exp().sum(), _silently(lambda z: z[:, -1].zero_())(z), z.exp().sum()
    )[2],
    "a function of values that were detached": lambda z: (
        z.detach()[:, 1:].mul_(2), _Square.apply(z).sum()
    )[1],
    "a function of a part of them": lambda z: (
        z.detach()[:, 1:].mul_(2), _Exp.apply(z[:, 1:]).sum()
    )[1],
    "a function of a part of what was written whole": lambda z: (
        q := z[:, 1:], z.mul_(2), _Exp.apply(q.clone()).sum()
    )[2],
    "a checkpoint after reads and writes": lambda z: (
        z.exp(), _half(z), z.exp(),
        checkpoint(lambda x: x.square().sum(), z, use_reentrant=False),
    )[3],
    "a write in a checkpoint": lambda z: checkpoint(
        lambda x: (y := x.clone(), _half(y), y.square().sum())[2], z, use_reentrant=False
    ),
    "vmap of values that were detached": lambda z: (
        z.detach()[:, 1:].mul_(2), torch.vmap(torch.square)(z).sum()
    )[1],
    "read in inference mode": lambda z: (_half(z), _inferred(z), z.exp().sum())[2],
    "vmap without a gradient": lambda z: (
        _half(z), z.exp().sum() + _silently(torch.vmap(lambda row: row.exp().sum()))(z).sum()
    )[1],
    "a part that is gone": lambda z: (z[:, 1:].exp().sum(), _half(z), z.exp().sum())[2],
    "a part that was written to, and is gone": lambda z: (
        F.relu(z[:, :3], inplace=True), z.exp().sum()
    )[1],
    "a function that writes into a part": lambda z: _Doubled.apply(z.view_as(z)).exp().sum(),  # type: ignore[no-untyped-call]
}  # fmt: skip


def _inferred(z: Tensor) -> None:
    with torch.inference_mode():
        z.exp()


@pytest.mark.parametrize("use", RIGHT)
def test_what_a_write_does_not_spoil(use: str) -> None:
    made = []
    for m in _pair(cap=True):
        m.zero_grad()
        value = RIGHT[use](m(IDS))
        value.backward()
        made.append([value.detach(), *_gradients(m)])
    _close(*reversed(made))


SAVERS: dict[str, Callable[[Tensor], Tensor]] = {
    "before another": lambda z: _square_and_exp(z, torch.enable_grad()),
    "before another without gradients": lambda z: _square_and_exp(z, torch.no_grad()),
    "a reentrant checkpoint": lambda z: _written(
        z, checkpoint(lambda x: x.exp().sum(), z, use_reentrant=True)
    ),
    "a checkpoint": lambda z: _written(
        z, checkpoint(lambda x: x.square().sum(), z, use_reentrant=False)
    ),
    "a checkpoint of a part": lambda z: _written(
        z, checkpoint(lambda x: x.square().sum(), z[:, 1:], use_reentrant=False)
    ),
    "vmap": lambda z: _written(z, torch.vmap(torch.square)(z).sum()),
    "torch.func": lambda z: _written(z, torch.func.vjp(torch.square, z)[0].sum()),
}


def _written(z: Tensor, value: Tensor) -> Tensor:
    z.detach()[..., 3] = -5
    return value


def _square_and_exp(z: Tensor, mode: Any) -> Tensor:
    value = _written(z, _Square.apply(z).sum())  # type: ignore[no-untyped-call]
    with mode:
        other = _Exp.apply(z).sum()  # type: ignore[no-untyped-call]
    return value + other


@pytest.mark.parametrize("use", SAVERS)
def test_what_a_function_saved_is_not_read_after_a_write(use: str) -> None:
    for m in _pair(cap=True):
        value = SAVERS[use](m(IDS))
        with pytest.raises(RuntimeError, match=r"in-?place operation"):
            value.backward()


KEPT: dict[str, Callable[[Tensor], Any]] = {
    "before": lambda z: (z.exp().sum().backward(retain_graph=True), _half(z)),
    "set to None": lambda z: (
        z.exp().sum().backward(retain_graph=True), _half(z), setattr(z, "grad", None),
        z.exp().sum().backward(),
    ),
    "after": lambda z: (_half(z), z.exp().sum().backward()),
    "before and after": lambda z: (
        z.exp().sum().backward(retain_graph=True), _half(z), z.exp().sum().backward()
    ),
    "after a write without a gradient": lambda z: (
        v := z.log_softmax(-1)[..., 2].sum(), _silently(lambda z: z.detach()[:, 1:].mul_(1))(z),
        v.backward(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("use", KEPT)
def test_a_gradient_that_is_kept_around_a_write(use: str) -> None:
    made = []
    for m in _pair(cap=True):
        z = m(IDS)
        z.retain_grad()
        KEPT[use](z)
        made.append(z.grad)
    _close(*reversed(made))


def test_a_first_read_in_inference_mode_keeps_the_history() -> None:
    made = []
    for m in _pair(cap=True):
        m.zero_grad()
        z = m(IDS)
        with torch.inference_mode():
            z.exp().sum()
        z.exp().sum().backward()
        made.append(_gradients(m))
    _close(*reversed(made))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda z: z[:, 1:4].exp().sum(),
        lambda z: z.chunk(3, 1)[0].exp().sum() + z[:, 1:][:, :2].sum() + z.sum(),
        lambda z: z.log_softmax(-1).sum(),
        lambda z: (z.retain_grad(), z.exp().sum())[1],
    ],
    ids=["a part", "parts and all", "log-probabilities", "a gradient that is kept"],
)
def test_what_was_read_does_not_keep_the_logits(
    use: Callable[[Tensor], Tensor], trained: bool
) -> None:
    z = _pair()[1](IDS)
    values, loss = weakref.ref(z.memory), use(z)
    if trained:
        loss.backward()
    del z, loss
    assert values() is None


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": lambda z: F.cross_entropy(z.reshape(-1, V), TARGETS.reshape(-1)),
    "single logits": lambda z: z.gather(-1, TARGETS[..., None]).sum(),
    "log-sum-exp": lambda z: z.logsumexp(-1).sum(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_kept_frees_its_graph_in_backward(name: str) -> None:
    eager, ours = _pair()
    for m in (eager, ours):
        m.zero_grad()
        loss = LOSSES[name](m(IDS))
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    _close(_gradients(eager), _gradients(ours))
    z = ours(IDS)
    loss, memory = LOSSES[name](z), weakref.ref(z.memory)
    loss.backward()
    del z
    assert memory() is None
    assert loss.grad_fn is not None


def test_a_graph_with_a_gradient_that_is_kept_does_not_keep_the_logits() -> None:
    z = _pair()[1](IDS)
    z.retain_grad()
    loss, memory = z.exp().sum(), weakref.ref(z.memory)
    loss.backward()
    del z
    assert memory() is None
