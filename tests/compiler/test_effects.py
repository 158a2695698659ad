"""Writes, random draws and aliases of whole blocks: as in eager, whatever is rewritten."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusewright import optimize
from fusewright.kernels.tolerance import exceeded
from tests.explained import explain

from ..models.tiny import Stack

Body = Callable[[Any, Tensor], Any]

BOTH = pytest.mark.parametrize(
    "codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)


class Block(nn.Module):
    """Three linears, a norm's weight, a batch norm's statistics; a test says what it computes."""

    def __init__(self, body: Body, bias: bool) -> None:
        super().__init__()
        self.g, self.u, self.d = (nn.Linear(16, 16, bias=bias) for _ in range(3))
        self.w = nn.Parameter(torch.rand(16) + 0.5)
        self.body = body
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def _pair(
    body: Body, dtype: torch.dtype = torch.float32, bias: bool = False, **options: Any
) -> tuple[Stack, Any]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Stack(Block(body, bias) for _ in range(2)).to(dtype)
    return eager, optimize(copy.deepcopy(eager), **{"codegen": "eager", **options})


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def _norm(block: Any, x: Tensor) -> Tensor:
    h = x * 1 if x.dtype is torch.float64 else x.float()  # the exact one may be written to, too
    n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return block.w * n.to(x.dtype)


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, every gradient, every buffer, the input afterwards and the random state."""
    model.zero_grad()
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    h = x * 1
    y = model(h)
    y.float().square().sum().backward()
    grads = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]
    assert x.grad is not None
    return [y.detach(), *grads, x.grad, *model.buffers(), h.detach(), torch.get_rng_state()]


def _assert_equal(eager: Stack, ours: Any, dtype: torch.dtype = torch.float32) -> None:
    exact = copy.deepcopy(eager).double()
    for _ in range(2):  # the first call captures
        made = [_step(m, _x(dtype)) for m in (ours, eager)]
        reference = _step(exact, _x(dtype).double())
        for a, b, o in zip(*made, reference, strict=True):
            problem = exceeded(a, b, o) if a.is_floating_point() else None
            assert problem is None, problem
            assert a.is_floating_point() or torch.equal(a, b)


def _silu(block: Any, x: Tensor) -> Tensor:
    return x + block.d(F.silu(block.g(x), inplace=True) * block.u(x))


def _relu(block: Any, x: Tensor) -> Tensor:
    g = block.g(x)
    return x + block.d(F.relu(g, True) * block.u(x)) + g


def _residual(block: Any, x: Tensor) -> Tensor:
    x += block.d(_norm(block, x))
    return x


def _two_residuals(block: Any, x: Tensor) -> Tensor:
    h = x + block.d(_norm(block, x))
    h += block.u(F.silu(block.g(_norm(block, h))))
    return h


def _gate_later(block: Any, x: Tensor) -> Tensor:
    g = block.g(x)
    view = g.view(-1, 16)
    h = torch.sigmoid(g) * block.u(x)
    view.mul_(2)
    return x + block.d(h) + g


def _packed_later(block: Any, x: Tensor) -> Tensor:
    both = torch.cat((block.g(x), block.u(x)), -1)
    gate, up = both.chunk(2, -1)
    h = F.relu(gate) * (up * 1)
    both.mul_(2)
    return x + block.d(h) + both[..., :16]


def _query(block: Any, x: Tensor) -> Tensor:
    n = _norm(block, x)
    q, k = block.g(n), block.u(n)
    seen = q.view(-1, 16)
    q *= 0.5
    return x + block.d(q * k) + seen.view(x.shape)


def _dropped(block: Any, x: Tensor) -> Tensor:
    F.dropout(block.u(x), 0.5)
    return x + F.dropout(block.d(_norm(block, x)), 0.5)


def _statistics(block: Any, x: Tensor) -> Tensor:
    n = F.batch_norm(block.u(x).flatten(0, 1), block.mean, block.var, None, None, True)
    return x + block.d(n.view(x.shape))


BODIES = {
    "silu": (_silu, ["mlp_block"]),
    "relu": (_relu, []),
    "residual": (_residual, ["rms_norm_linear"]),
    "two residuals": (_two_residuals, ["add_rms_norm", "rms_norm", "rms_norm_linear"]),
    "gate later": (_gate_later, ["glu"]),
    "packed later": (_packed_later, []),
    "query": (_query, ["rms_norm_linear"]),
    "dropout": (_dropped, ["rms_norm_linear"]),
    "statistics": (_statistics, []),
}


# in fp32 the copy that the norm takes is x itself, which is written to
REFUSED = ("residual", "two residuals")
STEPS = [
    pytest.param(name, dtype, id=f"{name}-{dtype}")
    for name in BODIES
    for dtype in (torch.float32, torch.bfloat16)
    if dtype is torch.bfloat16 or name not in REFUSED
]


@BOTH
@pytest.mark.parametrize(("name", "dtype"), STEPS)
def test_a_step_is_eagers(name: str, dtype: torch.dtype, codegen: str) -> None:
    body, rules = BODIES[name]
    # a bias before a batch norm has a gradient of nothing but rounding
    eager, ours = _pair(body, dtype, bias=name != "statistics", codegen=codegen)
    _assert_equal(eager, ours, dtype)
    assert set(rules) <= {s.rule for s in explain(ours).sites if s.status == "rewritten"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_eager_refuses_is_right(name: str) -> None:
    eager, ours = _pair(BODIES[name][0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _step(eager, _x())
    exact = copy.deepcopy(eager).double()
    for _ in range(2):  # the first call captures
        for mine, oracle in zip(_step(ours, _x()), _step(exact, _x().double()), strict=True):
            torch.testing.assert_close(mine, oracle.to(mine.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["silu", "relu", "statistics"])
def test_evaluation_is_eagers(name: str) -> None:
    eager, ours = _pair(BODIES[name][0])
    with torch.no_grad():
        assert torch.allclose(ours(_x()), eager(_x()), atol=1e-5)


@pytest.mark.parametrize("name", ["statistics", "dropout", "residual"])
def test_a_lean_step_is_eagers(name: str) -> None:
    _assert_equal(*_pair(BODIES[name][0], torch.bfloat16, memory="min"), torch.bfloat16)


def test_a_frozen_gate_is_written_once() -> None:
    def body(block: Any, x: Tensor) -> Tensor:
        return x + block.d(F.silu(block.g(x.detach()), inplace=True) * block.u(x))

    eager, ours = _pair(body)
    for model in (eager, ours):
        for layer in model.layers:
            layer.g.requires_grad_(False)
    _assert_equal(eager, ours)


def test_two_casts_are_two_tensors() -> None:
    def body(block: Any, x: Tensor) -> Any:
        h = block.d(x)
        return h.double(), h.double()

    _, ours = _pair(body)
    with torch.no_grad():
        first, second = ours.layers[0](_x())
        before = second.clone()
        first.zero_()
    assert torch.equal(second, before)


def test_the_report_says_what_is_written_to_and_where() -> None:
    def body(block: Any, x: Tensor) -> Tensor:
        g = block.g(x)
        seen = g.view(-1)
        h = F.silu(g, inplace=True) * block.u(x)
        return x + block.d(h) + seen.view(x.shape)

    eager, ours = _pair(body)
    _assert_equal(eager, ours)
    sites = [s for s in explain(ours).sites if s.rule == "glu"]
    assert {s.status for s in sites} == {"refused"}
    assert all("is written to by" in s.reason for s in sites)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_checkpoint_inside_a_block_gives_the_gradients_of_its_kind(
    frozen: bool, reentrant: bool
) -> None:
    def body(block: Any, x: Tensor) -> Tensor:
        x = x.detach() if frozen else x
        inner = checkpoint(lambda t: block.d(t), x, use_reentrant=reentrant)
        return x + block.u(_norm(block, x)) + inner

    eager, ours = _pair(body)
    for model in (eager, ours):
        model(_x().requires_grad_()).sum().backward()
    given = [[p.grad is None for p in m.parameters()] for m in (eager, ours)]
    assert given[0] == given[1]
    notes = [b.reason for b in explain(ours).bypasses]
    assert any("reentrant" in n for n in notes) is reentrant


def test_a_checkpoint_around_a_block_counts_no_tensor_of_its_first_capture() -> None:
    def body(block: Any, x: Tensor) -> Tensor:
        y = _norm(block, x)
        return x + block.d(F.silu(block.g(y), inplace=True) * block.u(y))

    eager, ours = _pair(body)
    grads = []
    for model in (eager, ours):
        x = _x()
        for layer in model.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        x.sum().backward()  # raises where the first call has saved more than the second
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("part", ["mlp", "lora", "norm"])
def test_what_is_made_without_gradients_is_written_to_with_them(part: str) -> None:
    """Without biases: eager mode's own linear with one gives a view, and refuses the write."""

    def frozen(block: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            if part == "mlp":
                y = block.d(F.silu(block.g(x)) * block.u(x))
            elif part == "lora":
                a, b = block.g.weight[:2], block.u.weight[:, :2]
                y = block.d(x) + F.linear(F.linear(x, a), b) * 2.0
            else:
                n = _norm(block, x)
                y = block.g(n) + 0 * block.u(n)
        return y.add_(x) + block.d(x)

    eager, ours = _pair(frozen)
    _assert_equal(eager, ours)
    assert [s for s in explain(ours).sites if s.status == "rewritten"]


@pytest.mark.long("min", "speed")
@pytest.mark.parametrize("memory", ["speed", "min"])
def test_draws_stay_in_their_order_under_inductor(memory: str) -> None:
    """The second is the smaller one: memory would be saved if it came first."""

    def part(block: Any, x: Tensor) -> Tensor:
        return _norm(block, x + torch.rand(x.shape[-1]))

    def body(block: Any, x: Tensor) -> Tensor:
        gate = block.g(x)[..., :2].softmax(-1)
        x = x + _norm(block, gate[..., :1] * block.u(x) + gate[..., 1:] * block.d(x))
        x = x + _norm(block, x + torch.randn(x.shape))
        return x + checkpoint(lambda t: part(block, t), x, use_reentrant=False)

    made = []
    for model in _pair(body, codegen="inductor", memory=memory):
        torch.manual_seed(1)
        made.append((model(_x()), torch.rand(1)))
    torch.testing.assert_close(*made)
    assert "could not" not in str(explain(model))


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_an_unused_draw_in_a_checkpoint_stays_in_its_place(codegen: str) -> None:
    def part(block: Any, x: Tensor) -> Tensor:
        y = _norm(block, x)
        block.g(F.dropout(y, 0.25))
        return block.u(y)  # type: ignore[no-any-return]

    def body(block: Any, x: Tensor) -> Tensor:
        x = x + checkpoint(lambda t: part(block, t), x, use_reentrant=False)
        return x + block.d(F.dropout(x, 0.25))

    made = []
    for model in _pair(body, codegen=codegen):
        torch.manual_seed(1)
        x = _x().requires_grad_()
        model(x * 1).square().sum().backward()
        made.append((x.grad, torch.rand(1)))
    torch.testing.assert_close(*made)
