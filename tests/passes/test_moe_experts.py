"""Routed experts: the spellings that are recognised, and what stops the rewrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.graph.canon import canonical
from fusewright.graph.opaque.stacks import updated_stack
from fusewright.kernels.processor import KINDS
from fusewright.rewrite.findings import Finding

from ..capturing import capture, rewrite

TOKENS, HIDDEN, INNER, EXPERTS, ACTIVE = 12, 16, 8, 4, 2


def _grouped(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows.to(weight.dtype), weight, offs=ends)


def _silu_gate(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def _clamped_gate(packed: Tensor) -> Tensor:
    gate, up = packed[..., ::2].clamp(max=2.0), packed[..., 1::2].clamp(-2.0, 2.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.7))


def experts(
    x: Tensor, index: Tensor, weights: Tensor, up: Tensor, down: Tensor,
    act: Callable[[Tensor], Tensor] = _silu_gate, biases: tuple[Tensor, Tensor] | None = None,
    between: Callable[[Tensor], Tensor] = lambda t: t,
    tail: Callable[[Tensor], Tensor] | None = None,
    masked: bool = False,
) -> Any:  # fmt: skip
    """transformers' grouped form; the arguments are what the tests vary."""
    tokens, active = index.shape
    number = up.shape[0]
    ids = index.reshape(-1)
    ordered, perm = torch.sort(ids)
    rows = x[perm // active]
    scales = weights.reshape(-1)[perm]
    counts = torch.histc(ordered.float(), bins=number, min=0, max=number - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    if masked:  # as for experts that are on another device
        elsewhere = (ordered >= number).unsqueeze(-1)
        ordered.clamp_(max=number - 1)
        rows.masked_fill_(elsewhere, 0.0)
    out = _grouped(rows, up.transpose(-2, -1), ends)
    if biases is not None:
        out.add_(biases[0][ordered])
    if masked:
        out = out.masked_fill(elsewhere, 0.0)
    h = between(act(out))
    out = _grouped(h, down.transpose(-2, -1), ends)
    if biases is not None:
        out.add_(biases[1][ordered])
    if masked:
        out = out.masked_fill(elsewhere, 0.0)
    scaled = out * scales.unsqueeze(-1)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0), device=x.device)
    total = scaled[inverse].view(tokens, active, -1).sum(dim=1).to(x.dtype)
    return total if tail is None else (total, tail(out))


def _inputs(dtype: torch.dtype = torch.bfloat16, gated: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(0.3).to(dtype).requires_grad_()

    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:ACTIVE]
                         for _ in range(TOKENS)])  # fmt: skip
    weights = torch.rand(TOKENS, ACTIVE, generator=generator).requires_grad_()
    wide = INNER * (1 + gated)
    return [leaf(TOKENS, HIDDEN), index, weights, leaf(EXPERTS, wide, HIDDEN),
            leaf(EXPERTS, HIDDEN, INNER), leaf(EXPERTS, wide), leaf(EXPERTS, HIDDEN)]  # fmt: skip


def _findings(fn: Callable[..., Any], inputs: list[Tensor]) -> tuple[Any, list[Finding]]:
    module = capture(fn, *inputs)
    return module, [f for f in rewrite(module) if f.rule == "moe_experts"]


CASES: dict[str, tuple[Callable[..., Any], bool]] = {
    "gated": (lambda x, i, w, u, d: experts(x, i, w, u, d), True),
    "own gate": (lambda x, i, w, u, d: experts(x, i, w, u, d, _clamped_gate), True),
    "no gate": (lambda x, i, w, u, d: experts(x, i, w, u, d, lambda t: F.relu(t).square()), False),
    "masked": (lambda x, i, w, u, d: experts(x, i, w, u, d, masked=True), True),
    "masked biases": (
        lambda x, i, w, u, d, b, c: experts(x, i, w, u, d, biases=(b, c), masked=True),
        True,
    ),
    "biases": (
        lambda x, i, w, u, d, b, c: experts(x, i, w, u, d, _clamped_gate, (b, c)),
        True,
    ),
}


@pytest.mark.parametrize(
    ("kind", "scales", "dtype"),
    [
        (None, [2.0], torch.bfloat16),
        (None, [2.0, 0.5], torch.float32),
        *((kind, [0.3, 0.3], torch.float32) for kind in (None, *KINDS)),
    ],
    ids=str,
)
def test_stacks_with_updates(
    scales: list[float], dtype: torch.dtype, kind: str | None, choose_for: Callable[[str], None]
) -> None:
    """On the processor that is there, and as chosen for others."""
    if kind is not None:
        choose_for(kind)

    def fn(x: Tensor, i: Tensor, w: Tensor, u: Tensor, d: Tensor, *factors: Tensor) -> Any:
        up, down = (
            updated_stack(stack, list(parts[: len(scales)]), list(parts[len(scales) :]), scales)
            for stack, parts in (
                (u, factors[: 2 * len(scales)]),
                (d, factors[2 * len(scales) :]),
            )
        )
        return experts(x, i, w, up, down)

    inputs, factors = _inputs()[:5], []
    for _, rows, columns in (inputs[3].shape, inputs[4].shape):
        factors += [torch.randn(EXPERTS, rows, 2 + n).mul(0.3) for n in range(len(scales))]
        factors += [torch.randn(EXPERTS, 2 + n, columns).mul(0.3) for n in range(len(scales))]
    module, found = _findings(fn, [*inputs, *(t.to(dtype).requires_grad_() for t in factors)])
    assert [f.status for f in found] == ["rewritten"], found
    assert not any(n.target is updated_stack for n in module.graph.nodes)


@pytest.mark.parametrize("name", CASES)
def test_spellings(name: str) -> None:
    fn, gated = CASES[name]
    inputs = _inputs(gated=gated)
    inputs = inputs if "biases" in name else inputs[:5]
    module, found = _findings(fn, inputs)
    assert [f.status for f in found] == ["rewritten"], found
    names = [n.target.__name__ for n in module.graph.nodes if n.op == "call_function"
             and hasattr(n.target, "__name__")]  # fmt: skip
    assert {"moe_route", "moe_up", "moe_down"} <= set(names)
    assert not [n for n in module.graph.nodes if (c := canonical(n)) and c.name == "grouped_mm"]


def test_transformers_operator_for_fp32() -> None:
    pytest.importorskip("transformers.integrations.moe")

    def grouped(x: Tensor, i: Tensor, w: Tensor, u: Tensor, d: Tensor) -> Any:
        return experts(x, i, w, u, d)

    def fallback(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(rows, weight, offs=ends)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "_grouped", fallback)
        _, found = _findings(grouped, _inputs(torch.float32)[:5])
    assert [f.status for f in found] == ["rewritten"], found


NEGATIVES: dict[str, tuple[Callable[..., Any], str]] = {
    "another user of the sum": (
        lambda x, i, w, u, d: (lambda up: (experts(x, i, w, up, d), up.sum()))(
            updated_stack(u, [u[..., :2]], [u[:, :2]], [0.5])
        ),
        "also used by",
    ),
    "another user": (
        lambda x, i, w, u, d: experts(x, i, w, u, d, tail=lambda t: t.sum()),
        "also used by",
    ),
    "rows mixed between": (
        lambda x, i, w, u, d: experts(x, i, w, u, d, between=lambda t: t - t.mean(0, keepdim=True)),
        "not one row per pair",
    ),
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_what_stops_it(name: str) -> None:
    fn, reason = NEGATIVES[name]
    _, found = _findings(fn, _inputs()[:5])
    assert [f.status for f in found] == ["refused"], found
    assert reason in found[0].reason


def test_a_lone_grouped_matmul_is_reported() -> None:
    def fn(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(x, w, offs=ends)

    inputs = [torch.randn(16, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16(),
              torch.tensor([8, 16], dtype=torch.int32)]  # fmt: skip
    _, found = _findings(fn, inputs)
    assert [f.status for f in found] == ["missed"]
    assert "grouped matmul" in found[0].reason


def test_writes_that_are_seen_by_others_stay() -> None:
    def fn(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        _, perm = torch.sort(ids)
        inverse = torch.zeros_like(perm)
        early = inverse + 1
        inverse[perm] = torch.arange(perm.size(0))
        return x[inverse], early

    module = capture(fn, torch.randn(5, 3), torch.tensor([3, 1, 0, 2, 2]))
    rewrite(module)
    assert any(getattr(n.target, "__name__", "") == "setitem" for n in module.graph.nodes)
