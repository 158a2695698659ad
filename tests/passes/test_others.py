"""Gated units, LoRA linears and the loss: recognised, and refused where they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.kernels.tolerance import exceeded

from ..capturing import capture, rewrite, rewritten

GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda g, u: F.silu(g) * u,
    "silu commuted": lambda g, u: u * F.silu(g),
    "silu by sigmoid": lambda g, u: g * torch.sigmoid(g) * u,
    "gelu": lambda g, u: F.gelu(g) * u,
    "gelu tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "gelu written out": lambda g, u: (
        0.5 * g * (1.0 + torch.tanh(0.7978845608 * (g + 0.044715 * torch.pow(g, 3.0)))) * u
    ),
    "relu2": lambda g, u: F.relu(g).square() * u,
    "sigmoid": lambda g, u: torch.sigmoid(g) * u,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_gated_units(name: str, dtype: torch.dtype) -> None:
    g, u = (torch.randn(2, 5, 12, dtype=dtype, requires_grad=True) for _ in range(2))
    assert rewritten(rewrite(capture(GATES[name], g, u))) == ["glu"]


@pytest.mark.parametrize("gate_first", [True, False])
def test_packed_gated_unit(gate_first: bool) -> None:
    def fn(both: Tensor) -> Tensor:
        a, b = both.chunk(2, dim=-1)
        return b * F.silu(a) if gate_first else a * F.silu(b)

    graph = capture(fn, torch.randn(2, 5, 24, requires_grad=True))
    assert rewritten(rewrite(graph)) == ["glu"]
    assert len([n for n in graph.graph.nodes if n.op.startswith("call")]) == 1


def test_an_unknown_activation_is_missed_with_the_reason() -> None:
    def fn(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.sin(F.linear(x, a)) * F.linear(x, b)

    x, a, b = torch.randn(2, 5, 8), torch.randn(12, 8), torch.randn(12, 8)
    findings = rewrite(capture(fn, x, a, b))
    assert [(f.rule, f.status) for f in findings] == [("glu", "missed")]
    assert "sin" in findings[0].reason


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3))),
        lambda x: x * torch.sigmoid(x),
        lambda x: torch.where(x > 0, x * x + x, F.softplus(x) * x),
    ],
    ids=["gelu", "silu", "two branches"],
)
def test_an_activation_by_itself_is_no_gated_unit(fn: Callable[[Tensor], Tensor]) -> None:
    x, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(12, 8)
    findings = rewrite(capture(lambda x, w: fn(F.linear(x, w)), x, w))
    assert [f for f in findings if f.status != "refused"] == []


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * 2.0


def _lora_inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((2, 5, 24), (16, 24), (4, 24), (16, 4))
    return [torch.randn(*s, dtype=dtype, requires_grad=i != 1) for i, s in enumerate(shapes)]


def test_lora_linear_with_bias_and_dropout() -> None:
    x, w, a, b = _lora_inputs()
    assert rewritten(rewrite(capture(_lora, x, w, a, b))) == ["lora_linear"]
    assert rewritten(rewrite(capture(_lora, x, w, a, b, torch.randn(16)))) == ["lora_linear"]

    def dropped(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        inner = F.linear(F.linear(F.dropout(x, 0.5, True), a), b)
        return F.linear(x, w) + inner * 0.5

    graph = capture(dropped, x, w, a, b)
    assert rewritten(rewrite(graph)) == ["lora_linear"]
    assert any(getattr(n.target, "__name__", "") == "dropout" for n in graph.graph.nodes)


def test_lora_on_rows_by_columns() -> None:
    """GPT-2's Conv1D: ``addmm`` with the transposed weight."""
    x, w, a, b = _lora_inputs()

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        base = torch.addmm(bias, x.view(-1, x.size(-1)), w).view(*x.size()[:-1], w.size(-1))
        return base + F.linear(F.linear(x, a), b) * 2.0

    columns = w.detach().t().contiguous()
    assert rewritten(rewrite(capture(fn, x, columns, a, b, torch.randn(16)))) == ["lora_linear"]
    learnt = columns.clone().requires_grad_()
    assert rewritten(rewrite(capture(fn, x, learnt, a, b, torch.randn(16)))) == ["lora_linear"]


def test_a_narrow_projection_that_is_not_added_is_no_adapter() -> None:
    x, _, a, b = _lora_inputs()
    assert rewrite(capture(lambda x, a, b: F.relu(F.linear(F.linear(x, a), b)), x, a, b)) == []


def test_fp32_adapters_over_a_bf16_base() -> None:
    x, w, _, _ = _lora_inputs(torch.bfloat16)
    _, _, a, b = _lora_inputs(torch.float32)

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, w)
        y = y + F.linear(F.linear(x.to(torch.float32), a), b) * 2.0
        return y.to(torch.bfloat16)

    assert rewritten(rewrite(capture(fn, x, w, a, b))) == ["lora_linear"]


UPDATES: dict[str, Callable[..., Tensor]] = {
    "vectors": lambda x, w, a, b, v: F.linear(x, w) + v * F.linear(a[:, 0] * F.linear(x, a), b),
    "divided": lambda x, w, a, b, v: F.linear(x, w) + F.linear(F.linear(x, a), b) * 3.0 / v[0],
    "function": lambda x, w, a, b, v: F.linear(x, w) + F.linear(F.relu(F.linear(x, a)), b) * v,
    "columns": lambda x, w, a, b, v: F.linear(x, w) + x[..., :4] @ a[:, :16],
    "dropouts": lambda x, w, a, b, v: F.linear(x, w, v) + F.linear(F.linear(F.dropout(x), a), b) * 2
    + F.linear(F.linear(F.dropout(x), a), b) * 0.5,
    "matrix": lambda x, w, a, b, v: F.linear(x, w, v) + F.linear(x, w * torch.mm(b, a)),
    "replaced": lambda x, w, a, b, v: (y := F.linear(x, w)) + F.linear(x, w + b @ a) - y * 1,
}  # fmt: skip


@pytest.mark.parametrize("name", UPDATES)
def test_other_updates_of_a_frozen_projection(name: str) -> None:
    x, w, a, b = _lora_inputs()
    v = torch.randn(16, requires_grad=True)
    assert rewritten(rewrite(capture(UPDATES[name], x, w, a, b, v))) == ["lora_linear"]


def _several(x: Tensor, w: Tensor, *pairs: Tensor) -> Tensor:
    """Adapters of several scales, one after the other."""
    total = F.linear(x, w)
    for i in range(0, len(pairs), 2):
        total = total + F.linear(F.linear(x, pairs[i]), pairs[i + 1]) * (0.5 + i)
    return total


@pytest.mark.parametrize("ranks", [(4, 1), (4, 1, 3), (2, 1, 2, 2, 3, 2, 1, 2)], ids=len)
def test_adapters_on_one_linear_are_joined(ranks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, w, *_ = _lora_inputs()
    pairs = [torch.randn(*s, requires_grad=True) for r in ranks for s in ((r, 24), (16, r))]
    pairs[1].requires_grad_(False)
    graph = capture(_several, x, w, *pairs)
    assert rewritten(rewrite(graph)) == ["lora_linear"]
    # one draw of so few numbers says little about two errors of the same size
    draws = [[torch.randn_like(t) for t in (x, w, *pairs)] for _ in range(16)]
    ours = torch.stack([graph(*draw)[0] for draw in draws])
    eager = torch.stack([_several(*draw) for draw in draws])
    exact = torch.stack([_several(*(t.double() for t in draw)) for draw in draws])
    assert exceeded(ours, eager, exact) is None


def test_joined_adapters_stand_before_their_block() -> None:
    """So that the linears on one input become one op."""
    x, w, *_ = _lora_inputs()
    pairs = [t for _ in range(4) for t in _lora_inputs()[2:]]

    def fn(x: Tensor, w: Tensor, *t: Tensor) -> Tensor:
        return torch.tanh(_several(x, w, *t[:4])) + _several(x, w, *t[4:])

    found = rewritten(rewrite(capture(fn, x, w, *pairs)))
    assert found == ["lora_linear", "lora_linear", "qkv_block"]


def test_adapters_of_several_dtypes_fall_back() -> None:
    x, w, a, b = _lora_inputs()
    c, d = a.detach().to(torch.bfloat16), b.detach().to(torch.bfloat16)

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return _lora(x, w, a, b) + F.linear(F.linear(x.to(c.dtype), c), d) * 0.5

    findings = rewrite(capture(fn, x, w, a, b, c, d))
    assert rewritten(findings) == []
    assert any("several dtypes" in f.reason for f in findings if f.status == "refused")


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda h, w, t: F.cross_entropy(F.linear(h, w).float().view(-1, 50), t),
    "sum": lambda h, w, t: F.cross_entropy(F.linear(h, w).view(-1, 50), t, reduction="sum") / 7,
    "softcap": lambda h, w, t: F.cross_entropy(
        (torch.tanh(F.linear(h, w) / 30.0) * 30.0).float().view(-1, 50), t),
    "scale": lambda h, w, t: F.cross_entropy((F.linear(h, w) * 0.25).float().view(-1, 50), t),
    "learnt scale": lambda h, w, t: F.cross_entropy(
        (F.linear(h, w).float() * w[0, 0]).view(-1, 50), t),
    "copied": lambda h, w, t: F.cross_entropy(F.linear(h, w).contiguous().view(-1, 50), t),
    "divided": lambda h, w, t: F.cross_entropy((F.linear(h, w) / 4.0).float().view(-1, 50), t),
    "smoothing": lambda h, w, t: F.cross_entropy(
        F.linear(h, w).view(-1, 50), t, label_smoothing=0.1),
    "ignore index": lambda h, w, t: F.cross_entropy(
        F.linear(h, w).view(-1, 50), t, ignore_index=3),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    h, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    target = torch.randint(0, 50, (10,))
    assert rewritten(rewrite(capture(LOSSES[name], h, w, target))) == ["linear_cross_entropy"]


SHIFTED: dict[str, Callable[[Tensor], Tensor]] = {
    "cast, cut": lambda y: y.float()[..., :-1, :].contiguous().view(-1, 50),
    "cut, cast": lambda y: y[:, :-1].float().reshape(-1, 50),
    "cut, copied, cast": lambda y: y[..., :-1, :].contiguous().float().view(-1, 50),
    "cut, flat, cast": lambda y: y[:, :-1, :].reshape(-1, 50).float(),
    "scaled, capped": lambda y: (torch.tanh(y * 0.5 / 9) * 9)[:, :-1].float().reshape(-1, 50),
    "copied at once": lambda y: y.contiguous()[:, :-1].contiguous().view(-1, 50),
    "the first cut off": lambda y: y[:, 1:].contiguous().view(-1, 50),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHIFTED)
def test_losses_that_cut_off_the_last_logits(name: str, dtype: torch.dtype) -> None:
    h = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    w = torch.randn(50, 8, dtype=dtype, requires_grad=True)

    def fn(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(SHIFTED[name](F.linear(h, w)), t)

    graph = capture(fn, h, w, torch.randint(0, 50, (8,)))
    assert rewritten(rewrite(graph)) == ["linear_cross_entropy"]


def test_a_learnt_factor_is_not_multiplied_into_float16_rows() -> None:
    """Rows may be as large as fp16 goes where the logits are finite."""

    def fn(h: Tensor, w: Tensor, scale: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy((F.linear(h, w) * scale).float().view(-1, 50), t)

    for dtype, status in ((torch.float16, "refused"), (torch.bfloat16, "rewritten")):
        h, w = (torch.randn(n, 8, dtype=dtype).requires_grad_() for n in (10, 50))
        scale = torch.tensor(1.5, dtype=dtype, requires_grad=True)
        findings = rewrite(capture(fn, h, w, scale, torch.randint(0, 50, (10,))))
        found = next(f for f in findings if f.rule == "linear_cross_entropy")
        assert found.status == status
        assert status == "rewritten" or "may leave their range" in found.reason


def test_an_unreduced_loss_is_refused_with_the_reason() -> None:
    h, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(50, 8)
    findings = rewrite(capture(
        lambda h, w, t: F.cross_entropy(F.linear(h, w).view(-1, 50), t, reduction="none"),
        h, w, torch.randint(0, 50, (10,)),
    ))  # fmt: skip
    assert rewritten(findings) == []
    assert any("reduction='none'" in f.reason for f in findings)


def test_fuel_bisects() -> None:
    g, u = (torch.randn(2, 12, requires_grad=True) for _ in range(2))
    graph = capture(lambda g, u: F.silu(F.silu(g) * u) * u, g, u)
    findings = rewrite(graph, fuel=1)
    assert rewritten(findings) == ["glu"]
    assert any("FUSEWRIGHT_FUEL" in f.reason for f in findings)
