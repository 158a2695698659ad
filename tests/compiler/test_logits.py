"""Logits beside a fused loss are what eager mode's are: for autograd, for hooks, for readers.

In eager mode the loss is computed from the logits. So their gradient is the loss's, hooks on them
see it and may change it, and another loss made of them adds to it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from fusewright import optimize
from fusewright.compiler.logits.head_call import HeadCall
from fusewright.compiler.logits.lazy_logits import LazyLogits
from fusewright.compiler.logits.sharded import gathered
from fusewright.kernels.tolerance import exceeded
from tests.explained import explain

from ..models.tiny import Body, CausalLM

V, H = 37, 16
IDS = torch.arange(14).view(2, 7)
LABELS = torch.tensor([[1, 2, -100, 4, 5, 6, 36], [-100, 0, 3, 3, 3, 9, 10]])


def _plain(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.float().view(-1, V), labels.view(-1))


def _padded(z: Tensor, labels: Tensor) -> Tensor:
    """As transformers shifts."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(z.float().view(-1, V), labels.view(-1), reduction="sum") / 11


def _cut(z: Tensor, labels: Tensor) -> Tensor:
    """As older code shifts."""
    rows, wanted = z[..., :-1, :].contiguous(), labels[..., 1:].contiguous()
    return F.cross_entropy(rows.view(-1, V), wanted.view(-1), label_smoothing=0.1)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class _Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(H, V, bias=False)
        self.a, self.b = nn.Linear(H, 4, bias=False), nn.Linear(4, V)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.a(x)) * 0.5


class _LM(CausalLM):
    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], cap: bool, bias: bool | None
    ) -> None:
        blocks = (_Block() for _ in range(2))
        head = _Adapted() if bias is None else nn.Linear(H, V, bias=bias)
        super().__init__(Body(blocks, V, H), head, loss)
        self.cap = cap

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        z = self.lm_head(self.model(ids))
        if self.cap:
            z = torch.tanh(z * 0.5 / 2.0) * 2.0
        return z if labels is None else (self.loss(z, labels), z)


KINDS = {
    "plain": (_plain, False, False),
    "padded": (_padded, False, True),
    "cut": (_cut, False, False),
    "capped": (_plain, True, False),
    "cut, capped": (_cut, True, True),
    "adapted": (_padded, False, None),
    "adapted, cut, capped": (_cut, True, None),
}


@functools.cache
def _pair(kind: str = "plain", frozen: bool = False, **choices: Any) -> tuple[_LM, _LM]:
    torch.manual_seed(0)
    eager = _LM(*KINDS[kind])
    eager.lm_head.requires_grad_(not frozen)
    choices.setdefault("codegen", "eager")
    return eager, optimize(copy.deepcopy(eager), **choices)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t * 1.5

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 1.5


def _hooked(change: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
    def use(loss: Tensor, z: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        z.register_hook(lambda g: (seen.append(g), change(g))[1])
        loss.backward()
        return seen

    return use


def _retained(loss: Tensor, z: Tensor) -> list[Tensor]:
    z.retain_grad()
    (loss + z.tanh().sum()).backward()
    assert z.grad is not None
    return [z.grad]


def _asked(loss: Tensor, z: Tensor) -> list[Tensor]:
    (g,) = torch.autograd.grad(loss, z, retain_graph=True)
    loss.backward()
    return [g]


def _asked_twice(loss: Tensor, z: Tensor) -> list[Tensor]:
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    (loss + 10 * g.square().sum()).backward()
    return [g]


def _penalty(loss: Tensor, z: Tensor) -> list[Tensor]:
    """Of another loss, whose gradient reaches the weights through the logits."""
    (g,) = torch.autograd.grad(z.exp().mean(), z, create_graph=True)
    (loss + g.square().sum()).backward()
    return [g]


def _alone(of: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def use(loss: Tensor, z: Tensor) -> list[Tensor]:
        of(z).square().sum().backward()
        return []

    return use


def _beside(of: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def use(loss: Tensor, z: Tensor) -> list[Tensor]:
        (loss + of(z).square().sum()).backward()
        return []

    return use


def _divided(z: Tensor) -> Tensor:
    z.div_(0.7)
    return _Scale.apply(z)


def _masked(z: Tensor) -> Tensor:
    z[..., 3] = 0.5
    return _Scale.apply(z)


def _added(z: Tensor) -> Tensor:
    z += 1.0
    return checkpoint(torch.tanh, z, use_reentrant=True)


def _read_before(z: Tensor) -> Tensor:
    z.argmax(-1)
    with torch.no_grad():
        z.softmax(-1)
    return _Scale.apply(z) * z


USES = {
    "the loss alone": lambda loss, z: (loss.backward(), [])[1],
    "the loss twice": lambda loss, z: (loss.backward(retain_graph=True), loss.backward(), [])[2],
    "a hook that looks": _hooked(lambda g: None),
    "a hook that gives it back": _hooked(lambda g: g),
    "a hook that scales": _hooked(lambda g: g * 3),
    "a hook that masks": _hooked(lambda g: g * 0),
    "a hook that writes": _hooked(lambda g: (g.mul_(2), None)[1]),
    "retain_grad": _retained,
    "grad": _asked,
    "grad of the gradient": _asked_twice,
    "a penalty": _penalty,
    "an autograd.Function": _alone(_Scale.apply),
    "a reentrant checkpoint": _alone(lambda z: checkpoint(torch.tanh, z, use_reentrant=True)),
    "a checkpoint": _alone(lambda z: checkpoint(lambda t: t.tanh() ** 2, z, use_reentrant=False)),
    "vmap": _alone(torch.func.vmap(torch.tanh)),
    "casts": _alone(lambda z: _Scale.apply(z.double().float())),
    "a cast by keyword": _alone(lambda z: z.to(dtype=torch.float64)),
    "written to": _alone(_divided),
    "a part written to": _alone(_masked),
    "added to": _alone(_added),
    "read before": _alone(_read_before),
    "a loss beside": _beside(torch.tanh),
    "a Function beside": _beside(_Scale.apply),
    "a checkpoint beside": _beside(lambda z: checkpoint(torch.tanh, z, use_reentrant=True)),
}


def _compare(eager: _LM, ours: _LM, use: Callable[..., Any]) -> None:
    found = []
    for m in (eager, ours):
        m.zero_grad()
        loss, z = m(IDS, labels=LABELS)
        found.append([loss.detach().clone(), *(g.detach().clone() for g in use(loss, z))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert explain(ours).by_rule()["linear_cross_entropy"] == 1


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["plain", "cut, capped"])
def test_a_use_of_the_logits(kind: str, use: str) -> None:
    _compare(*_pair(kind), USES[use])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("use", ["a hook that scales", "grad", "a loss beside"])
def test_each_kind_of_loss(kind: str, frozen: bool, use: str) -> None:
    _compare(*_pair(kind, frozen), USES[use])


@pytest.mark.parametrize("use", ["a hook that scales", "grad", "retain_grad", "written to"])
def test_logits_that_are_always_there(use: str) -> None:
    eager, ours = _pair("padded", logits="always")
    assert type(ours(IDS, labels=LABELS)[1]) is Tensor
    _compare(eager, ours, USES[use])


@pytest.mark.parametrize("use", ["a hook that scales", "grad of the gradient", "a loss beside"])
def test_with_little_memory(use: str) -> None:
    _compare(*_pair("padded", memory="min"), USES[use])


@pytest.mark.parametrize("use", ["a hook that looks", "grad", "an autograd.Function"])
def test_under_autocast(use: str) -> None:
    eager, ours = _pair("padded")
    exact = copy.deepcopy(eager).double()
    found = []
    for m in (eager, ours, exact):
        m.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=m is not exact):
            loss, z = m(IDS, labels=LABELS)
        found.append([z.detach(), *USES[use](loss, z), m.lm_head.weight.grad])
    for theirs, mine, oracle in zip(*found, strict=True):
        if theirs is not None:
            assert exceeded(mine, theirs, oracle) is None
        assert (mine is None) == (theirs is None)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of the logits' size was computed."""
    calls: list[str] = []
    for name in ("compute", "gradient"):
        was = getattr(HeadCall, name)

        def counted(*args: Any, name: str = name, was: Any = was, **kwargs: Any) -> Any:
            calls.append(name)
            return was(*args, **kwargs)

        monkeypatch.setattr(HeadCall, name, counted)
    return calls


def _looked_at(loss: Tensor, z: Tensor) -> list[Tensor]:
    """As wrappers do: DDP and FSDP look for bases, and hook what needs a gradient."""
    flat, spec = _pytree.tree_flatten({"loss": loss, "logits": (z,)})
    z = _pytree.tree_unflatten(flat, spec)["logits"][0]
    assert z._base is None
    assert z.grad_fn is not None
    assert not z.is_leaf
    assert isinstance(z, Tensor)
    z = z.float()
    z.register_hook(lambda g: None)
    flat[1].register_hook(lambda g: g)
    loss.backward()
    return []


@pytest.mark.parametrize("use", [USES["the loss alone"], USES["the loss twice"], _looked_at])
def test_who_only_looks_computes_nothing(use: Callable[..., Any], computed: list[str]) -> None:
    _, ours = _pair("padded")
    ours.zero_grad()
    loss, z = ours(IDS, labels=LABELS)
    use(loss, z)
    assert computed == []
    assert isinstance(z, LazyLogits)
    assert ours.lm_head.weight.grad is not None


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("copied", [Tensor.clone, Tensor.double])
def test_a_copy_keeps_its_values_when_the_logits_are_written_to(
    copied: Callable[[Tensor], Tensor], read: bool
) -> None:
    seen = []
    for m in _pair("padded"):
        m.zero_grad()
        _, z = m(IDS, labels=LABELS)
        copies = [copied(z), copied(copied(z).clone())]
        if read:
            copies[0].sum().item()
        with torch.no_grad():
            z.add_(1)
        copies[0].pow(2).mean().backward()
        seen.append([z.detach(), *(c.detach() for c in copies), m.lm_head.weight.grad])
    for mine, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(mine + 0, theirs + 0)


def test_only_memory_that_was_freed_counts_as_released() -> None:
    weight, lazy = nn.Parameter(torch.ones(3, 3)), _pair("padded")[1](IDS, labels=LABELS)[1]
    whole = [weight, torch.empty(0), torch.empty(3, device="meta"), lazy, None, 2]
    with gathered(None, whole, ""):
        pass
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="were released"), gathered(None, [weight], ""):
        pass


@pytest.mark.parametrize("copied", [Tensor.clone, Tensor.detach])
def test_a_copy_of_a_wrapper_computes_nothing(
    copied: Callable[[Tensor], Tensor], computed: list[str]
) -> None:
    """Wrappers such as DDP copy outputs in an autograd function; other copies may be kept."""

    class Sink(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            return copied(z)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    eager, ours = _pair("padded")
    for m in (eager, ours):
        m.zero_grad()
        made = Sink.apply(m(IDS, labels=LABELS)[1])
        F.cross_entropy(made.view(-1, V), LABELS.view(-1)).backward()
    assert computed == []
    assert isinstance(made, LazyLogits)
    for p, q in zip(eager.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=2e-4, atol=1e-6)
    torch.testing.assert_close(made + 0, eager(IDS))


def test_a_hook_gets_a_gradient_that_can_be_kept(computed: list[str]) -> None:
    eager, ours = _pair("padded")
    kept: list[Tensor] = []
    for m in (eager, ours):
        loss, z = m(IDS, labels=LABELS)
        z.register_hook(kept.append)
        loss.backward()
        del loss, z
    assert computed == []
    torch.testing.assert_close(kept[1] + 0, kept[0])


class Behind(torch.optim.Optimizer):
    """An optimizer that writes to ``p.data``, as many do: no version of ``p`` changes."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, Behind])
def test_logits_are_read_before_the_weights_change_or_not_at_all(optimizer: Any) -> None:
    for m in copy.deepcopy(_pair()):
        loss, z = m(IDS, labels=LABELS)
        early = m(IDS, labels=LABELS)[1]
        values = early.detach().clone()
        loss.backward()
        optimizer(m.parameters(), 0.1).step()
        torch.testing.assert_close(early.detach(), values)
    with pytest.raises(RuntimeError, match=r"before the weights .* were changed.*logits='always'"):
        z.sum()


def test_a_bias_alone_that_is_trained_is_seen_to_change() -> None:
    ours = copy.deepcopy(_pair("padded"))[1]
    for name, p in ours.named_parameters():
        p.requires_grad_(name == "lm_head.bias")
    loss, z = ours(IDS, labels=LABELS)
    loss.backward()
    Behind([ours.lm_head.bias], 0.1).step()
    with pytest.raises(RuntimeError, match="before the weights"):
        z.sum()


def test_without_gradients() -> None:
    eager, ours = _pair("padded")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            (a, z), (b, y) = (m(IDS, labels=LABELS) for m in (eager, ours))
            torch.testing.assert_close((b, y + 0), (a, z))
            assert not y.requires_grad


def test_a_frozen_model() -> None:
    eager, ours = copy.deepcopy(_pair("padded"))
    for m in (eager, ours):
        m.requires_grad_(False)
    (a, z), (b, y) = (m(IDS, labels=LABELS) for m in (eager, ours))
    assert (b.requires_grad, y.requires_grad) == (a.requires_grad, z.requires_grad)
    torch.testing.assert_close((b, y + 0), (a, z))


def _with_z_loss(z: Tensor, labels: Tensor) -> Tensor:
    return _plain(z, labels) + 0.1 * z.logsumexp(-1).square().mean()


@pytest.mark.parametrize(
    "use", ["a hook that scales", "grad", "retain_grad", "an autograd.Function"]
)
def test_logits_that_the_model_uses_itself(use: str) -> None:
    """They exist, so the loss is computed from them, and the report says why."""
    torch.manual_seed(0)
    eager = _LM(_with_z_loss, False, False)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    found = []
    for m in (eager, ours):
        loss, z = m(IDS, labels=LABELS)
        found.append([g.detach().clone() for g in USES[use](loss, z)] + [m.lm_head.weight.grad])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert "linear_cross_entropy" not in explain(ours).by_rule()
