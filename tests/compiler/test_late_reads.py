"""Logits that are read late, or whose losses are differentiated late: eager's, or an error.

Between a call and a read the weights may change, the logits may be written to, and a checkpoint may
run the call once more.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import optimize
from fusewright.compiler.logits.fingerprints import fingerprint, is_unchanged
from fusewright.compiler.logits.lazy_logits import LazyLogits

from .test_logits import _LM, IDS, LABELS, V, _plain

TARGETS = torch.arange(14) * 3 % V


@functools.cache
def _optimized(**options: Any) -> tuple[_LM, _LM]:
    torch.manual_seed(0)
    eager = _LM(_plain, False, True)
    return eager, optimize(copy.deepcopy(eager), codegen="eager", **options)


@functools.cache
def _other() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return _LM(_plain, False, True).state_dict()


def _close(ours: Any, eager: Any) -> None:
    torch.testing.assert_close(ours, eager, rtol=2e-4, atol=2e-6)


def _same_gradients(use: Callable[[_LM], Tensor], *models: _LM) -> None:
    found = []
    for m in models:
        m.zero_grad()
        loss = use(m)
        loss.backward()
        grads = {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
        found.append([loss.detach(), grads])
    _close(found[1], found[0])


# ------------------------------------------------------------------------------ weights that change


def _load(m: _LM) -> None:
    m.load_state_dict(_other())


def _load_head(m: _LM) -> None:
    m.lm_head.load_state_dict({n: _other()[f"lm_head.{n}"] for n in ("weight", "bias")})


def _load_by_assignment(m: _LM) -> None:
    m.load_state_dict(dict(_other()), assign=True)  # PyTorch notes "assign" in the one it gets


def _cast(m: _LM) -> None:
    m.bfloat16()


def _new_data(m: _LM) -> None:
    for name, p in m.named_parameters():
        p.data = _other()[name].clone()


def _new_head(m: _LM) -> None:
    m.lm_head.weight = nn.Parameter(_other()["lm_head.weight"].clone())


def _train(m: _LM) -> None:
    m.train().requires_grad_(True)
    with torch.enable_grad():
        m(IDS, LABELS)[0].backward()
    torch.optim.SGD(m.parameters(), 0.5).step()


def _written_and_back(m: _LM) -> None:
    for name, p in m.named_parameters():
        before = p.detach().clone()
        p.data.copy_(_other()[name])
        p.data.copy_(before)


HARMLESS: dict[str, Callable[[_LM], None]] = {
    "assign": _load_by_assignment, "a cast": _cast, "other data": _new_data,
    "another head": _new_head,
    "written and back": _written_and_back,
    "a copy is loaded": lambda m: _load(copy.deepcopy(m)),
    "pickled": lambda m: pickle.loads(pickle.dumps(m.lm_head)).load_state_dict(
        m.lm_head.state_dict()
    ),
}  # fmt: skip

READS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda z: z + 0,
    "log-probabilities": lambda z: z.log_softmax(-1).gather(-1, TARGETS.view(2, 7, 1)),
    "rows": lambda z: z[:, 1:].logsumexp(-1),
}


def _evaluated(m: _LM) -> Tensor:
    with torch.no_grad():
        logits: Tensor = m.eval()(IDS, LABELS)[1]
    return logits


def _in_inference_mode(m: _LM) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = m.eval()(IDS, LABELS)[1]
    return logits


def _frozen(m: _LM) -> Tensor:
    logits: Tensor = m.eval().requires_grad_(False)(IDS, LABELS)[1]
    return logits


CALLS = {"no_grad": _evaluated, "inference_mode": _in_inference_mode, "frozen": _frozen}


def _read_after(change: Callable[[_LM], None], call: str, read: str) -> list[Any]:
    found: list[Any] = []
    mode = torch.inference_mode if call == "inference_mode" else contextlib.nullcontext
    for m in copy.deepcopy(_optimized()):
        z = CALLS[call](m)
        found.append(type(z))
        change(m)
        with mode():
            found.append(READS[read](z))
    return found


@pytest.mark.parametrize("change", HARMLESS)
@pytest.mark.parametrize("call", CALLS)
def test_a_change_that_leaves_the_old_weights(change: str, call: str) -> None:
    for read in READS:
        _, eager, kind, ours = _read_after(HARMLESS[change], call, read)
        assert kind is LazyLogits
        _close(ours, eager)


def _rows_written(m: _LM) -> None:
    m.lm_head.weight.data[30:] -= 1.0


def _column_signs(m: _LM) -> None:
    m.lm_head.weight.data[:, 3].neg_()


def _two_rows_swapped(m: _LM) -> None:
    m.lm_head.weight.data[[4, 9]] = m.lm_head.weight.data[[9, 4]]


def _all_written(m: _LM) -> None:
    for name, p in m.named_parameters():
        p.data.copy_(_other()[name])


WRITTEN = {
    "load_state_dict": _load, "of the head": _load_head, "a step": _train,
    "all": _all_written, "rows": _rows_written, "signs": _column_signs,
    "rows swapped": _two_rows_swapped, "bias": lambda m: m.lm_head.bias.data.add_(1),
}  # fmt: skip


@pytest.mark.parametrize("change", WRITTEN)
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("frozen", [False, True])
def test_weights_that_were_written_to_are_an_error(change: str, read: str, frozen: bool) -> None:
    _, m = copy.deepcopy(_optimized())
    m.lm_head.requires_grad_(not frozen)
    kept = [m(IDS, LABELS)[1], m(IDS), _evaluated(m)]
    WRITTEN[change](m)
    for z in kept:
        with pytest.raises(RuntimeError, match="logits='always'"):
            READS[read](z)


def test_the_gradient_of_logits_is_not_made_of_other_weights() -> None:
    """Eager mode keeps the log-probabilities, of which it makes the gradient of the logits."""
    eager, ours = copy.deepcopy(_optimized())
    for change in (_all_written, _new_data):
        found: list[Any] = []
        for m in (eager, ours):
            loss, z = m.train()(IDS, LABELS)
            change(m)
            try:
                found.append(torch.autograd.grad(loss, z)[0] + 0)
            except RuntimeError as error:
                found.append(str(error))
        if isinstance(found[1], str):
            assert "logits='always'" in found[1]
        else:
            _close(found[1], found[0])
    assert not isinstance(found[1], str)  # the last one leaves the old weights


def test_rows_written_to_without_gradients() -> None:
    class Shared(_LM):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
            h = self.model(ids)
            z = self.lm_head(h)
            return (z, h) if labels is None else (self.loss(z, labels), z, h)

    torch.manual_seed(0)
    eager = Shared(_plain, False, True).eval()
    found = []
    for m in (eager, optimize(copy.deepcopy(eager), codegen="eager")):
        with torch.no_grad():
            _, z, h = m(IDS, LABELS)
            h.mul_(2)
            found.append(z + 0)
    _close(found[1], found[0])


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64, 512), (33, 1025)])
def test_a_fingerprint_sees_every_change(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 50).to(dtype)
    before = fingerprint([x, None, 3])
    assert is_unchanged([x.clone(), None, 3], before)
    flat = x.view(-1)
    changes: list[Callable[[Tensor], Any]] = [
        lambda t: t.neg_(), lambda t: t[-1:].neg_(), lambda t: t[1::2].neg_(),
        lambda t: t[:1].add_(1), lambda t: t.copy_(t.roll(1)), lambda t: t.copy_(t.flip(0)),
        lambda t: t.view(torch.uint8)[-1:].bitwise_xor_(128), lambda t: t[3::4].neg_(),
    ]  # fmt: skip
    for change in changes:
        other = flat.clone()
        change(other)
        assert is_unchanged([other.view(shape)], before[:1]) == torch.equal(
            other.view(torch.uint8), flat.view(torch.uint8)
        )


def test_a_fingerprint_of_parts() -> None:
    x = torch.randn(9, 7).bfloat16()
    for part in (x[1:], x[:, 2:], x.t(), x.view(-1)[1:4], x[:0]):
        assert is_unchanged([part], fingerprint([part.clone()]))
    state = torch.get_rng_state()
    fingerprint([x])
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------- logits that are written to

FIRST: dict[str, Callable[[Tensor], Tensor]] = {
    "a loss": lambda z: F.cross_entropy(z.view(-1, V), TARGETS),
    "each loss": lambda z: F.cross_entropy(z.view(-1, V), TARGETS, reduction="none").mean(),
    "their sum": lambda z: F.cross_entropy(z.view(-1, V), TARGETS, reduction="sum"),
    "rows": lambda z: F.cross_entropy(z[:, :-1].reshape(-1, V), TARGETS[:12]),
    "log-probabilities": lambda z: z.log_softmax(-1).gather(-1, TARGETS.view(2, 7, 1)).mean(),
    "the first log-sum-exp": lambda z: (z * 1.5).logsumexp(-1).mean(),
    "an entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "a single logit": lambda z: z[..., 29].sin().sum(),
    "log-softmax": lambda z: z.log_softmax(-1)[..., 3].sin().sum(),
    "nothing": lambda z: z.new_zeros(()),
}

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "scaled": lambda z: z.div_(0.7),
    "a part": lambda z: z[:, :-1].div_(0.7),
    "twice": lambda z: (z.div_(0.7), z[:, 1:].mul_(2.0)),
    "an item": lambda z: z.__setitem__((Ellipsis, 3), 1.0),
    "masked": lambda z: z.masked_fill_(TARGETS.view(2, 7, 1) > 20, -5.0),
    "detached": lambda z: z.detach().div_(0.7),
    "data": lambda z: z.data.div_(0.7),
}

SECOND: dict[str, Callable[[Tensor], Tensor]] = {
    "a loss": FIRST["a loss"],
    "any": lambda z: z.clamp(-3, 3).sin().max(-1).values.sum(),
    "none": lambda z: z.new_zeros(()),
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("write", WRITES)
def test_a_loss_then_a_write_then_a_loss(first: str, write: str) -> None:
    eager, ours = _optimized()
    for second in SECOND.values():
        for labels in (None, LABELS):

            def use(m: _LM, second: Any = second, labels: Any = labels) -> Tensor:
                out = m.train()(IDS, labels)
                loss, z = (0.0, out) if labels is None else out
                total = FIRST[first](z) + loss
                WRITES[write](z)
                return total + second(z) + 0 * m.lm_head.bias.sum()

            try:
                use(eager).backward()
            except RuntimeError:
                continue  # it has kept what was written to
            _same_gradients(use, eager, ours)


def test_a_single_logit_given_out_sees_a_write() -> None:
    def use(m: _LM) -> Tensor:
        z = m.train()(IDS)
        one = z[..., 29]
        z.div_(2)
        return one.sin().sum() + z.cos().mean()

    _same_gradients(use, *_optimized())


def test_a_part_of_a_part_sees_a_write() -> None:
    def use(m: _LM) -> Tensor:
        z = m.train()(IDS)
        part = z[:, :-1]
        one = part[..., 29]
        part.div_(2)
        z.mul_(3)
        return one.sin().sum() + z.cos().mean() + part.logsumexp(-1).sum()

    _same_gradients(use, *_optimized())


# ----------------------------------------------------------------------------------- checkpoints


def _with_z_loss(m: _LM) -> Tensor:
    loss, z = m(IDS, LABELS)
    total: Tensor = loss + 1e-2 * z.logsumexp(-1).square().mean()
    return total


def _hooked(m: _LM) -> Tensor:
    loss, z = m(IDS, LABELS)
    z.register_hook(lambda grad: grad * 2)
    return loss  # type: ignore[no-any-return]


def _scaled(m: _LM) -> Tensor:
    loss, z = m(IDS, LABELS)
    return loss + z.sin().mean()  # type: ignore[no-any-return]


def _own_loss(m: _LM) -> Tensor:
    return F.cross_entropy(m(IDS).view(-1, V), TARGETS)


IN_CHECKPOINTS: dict[str, Callable[[_LM], Tensor]] = {
    "labels": lambda m: m(IDS, LABELS)[0], "z-loss": _with_z_loss, "hook": _hooked,
    "values": _scaled, "the caller's": _own_loss,
}  # fmt: skip


@pytest.mark.parametrize("use", IN_CHECKPOINTS)
@pytest.mark.parametrize("options", [{}, {"logits": "always"}, {"memory": "min"}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_call_in_a_checkpoint(use: str, options: dict[str, Any], frozen: bool) -> None:
    models = _optimized(**options)
    for m in models:
        m.train().lm_head.requires_grad_(not frozen)
    try:
        _same_gradients(
            lambda m: checkpoint(lambda: IN_CHECKPOINTS[use](m), use_reentrant=False), *models
        )
    finally:
        for m in models:
            m.lm_head.requires_grad_(True)


def test_a_gradient_of_a_gradient_in_a_checkpoint() -> None:
    def use(m: _LM) -> Tensor:
        loss = checkpoint(lambda: m.train()(IDS, LABELS)[0], use_reentrant=False)
        (grad,) = torch.autograd.grad(loss, m.model.embed.weight, create_graph=True)
        return grad.square().sum() * 100

    _same_gradients(use, *_optimized())


# ------------------------------------------------------------------------------------ out=

OUT: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "mul": (lambda z, out: torch.mul(z, 2, out=out), (2, 7, V)),
    "mul by name": (lambda z, out: torch.mul(input=z, other=2, out=out), (2, 7, V)),
    "rmul": (lambda z, out: torch.mul(torch.ones(V), z, out=out), (2, 7, V)),
    "div": (lambda z, out: torch.div(z, 2, out=out), (2, 7, V)),
    "true_divide": (lambda z, out: torch.true_divide(z, 2, out=out), (2, 7, V)),
    "neg": (lambda z, out: torch.neg(z, out=out), (2, 7, V)),
    "pow": (lambda z, out: torch.pow(z, 2, out=out), (2, 7, V)),
    "square": (lambda z, out: torch.square(z, out=out), (2, 7, V)),
    "exp": (lambda z, out: torch.exp(z, out=out), (2, 7, V)),
    "add": (lambda z, out: torch.add(z, 1.0, out=out), (2, 7, V)),
    "lerp": (lambda z, out: torch.lerp(z, z, 0.5, out=out), (2, 7, V)),
    "logaddexp": (lambda z, out: torch.logaddexp(z, z, out=out), (2, 7, V)),
    "stack": (lambda z, out: torch.stack([z, z], out=out), (2, 2, 7, V)),
    "softmax": (lambda z, out: torch.softmax(z, -1, out=out), (2, 7, V)),
    "log_softmax": (lambda z, out: torch.log_softmax(z, -1, out=out), (2, 7, V)),
    "logsumexp": (lambda z, out: torch.logsumexp(z, -1, out=out), (2, 7)),
    "mean": (lambda z, out: torch.mean(z, -1, out=out), (2, 7)),
    "sum of log-probabilities": (
        lambda z, out: torch.sum(z.log_softmax(-1), -1, out=out), (2, 7),
    ),
    "gather": (lambda z, out: torch.gather(z, -1, TARGETS.view(2, 7, 1), out=out), (2, 7, 1)),
    "amax": (lambda z, out: torch.amax(z, -1, out=out), (2, 7)),
    "none": (lambda z, out: out.copy_(torch.mul(z, 2, out=None)), (2, 7, V)),
}  # fmt: skip


@pytest.mark.parametrize("use", OUT)
def test_results_written_into_a_tensor(use: str) -> None:
    function, shape = OUT[use]
    found = []
    for m in _optimized():
        out = torch.full(shape, torch.nan)
        z = _evaluated(m)
        with torch.no_grad():
            returned = function(z, out)
        assert returned is out
        found.append(out)
        m.train()
    _close(found[1], found[0])
    assert not found[1].isnan().any()


def test_indices_written_into_a_tensor() -> None:
    for name, rest in (("argmax", (-1,)), ("topk", (3, -1)), ("max", (-1,))):
        found = []
        for m in _optimized():
            z = _evaluated(m)
            made = getattr(torch, name)(z + 0, *rest)
            out = made if isinstance(made, Tensor) else tuple(made)
            empty = (
                out.new_zeros(out.shape)
                if isinstance(out, Tensor)
                else [torch.zeros_like(t) for t in out]
            )
            with torch.no_grad():
                getattr(torch, name)(
                    z, *rest, out=empty if isinstance(out, Tensor) else tuple(empty)
                )
            found.append(empty)
            m.train()
        _close(found[1], found[0])
