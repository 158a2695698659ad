"""Rotary embeddings in every spelling: recognised, paired, and refused where they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ..capturing import capture, rewrite, rewritten

Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def _half(x: Tensor) -> Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def _pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def _unbound(x: Tensor) -> Tensor:
    a, b = x.view(*x.shape[:-1], -1, 2).unbind(dim=-1)
    return torch.stack((-b, a), dim=-1).flatten(start_dim=-2)


def _unflat(x: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    return x.view(*x.shape[:-1], count, -1).unbind(dim)


def _inputs(width: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k = (torch.randn(2, 5, h, 16, dtype=dtype).transpose(1, 2).requires_grad_() for h in (4, 2))
    return [q, k, *(torch.randn(2, 1, 5, width, dtype=dtype) for _ in range(2))]


def _parts(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = torch.chunk(x, 2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _regrouped(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _inverse(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., :8], x[..., 8:]
    return x * cos + torch.cat((b, -a), dim=-1) * sin


def _repeated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = (t[..., : t.shape[-1] // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
    return (x.float() * cos + _pairs(x).float() * sin).to(x.dtype)


def _last(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    keep, turn = x[..., :-8], x[..., -8:]
    return torch.cat([keep, turn * cos + _half(turn) * sin], dim=-1)


def _first(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turn, keep = x[..., :8], x[..., 8:]
    return torch.cat([turn * cos + _pairs(turn) * sin, keep], dim=-1)


SPELLINGS: dict[str, tuple[Rotate, int]] = {
    "halves": (lambda x, c, s: x * c + _half(x) * s, 16),
    "commuted": (lambda x, c, s: s * _half(x) + c * x, 16),
    "in fp32": (lambda x, c, s: (x.float() * c + _half(x.float()) * s).to(x.dtype), 16),
    "pairs": (lambda x, c, s: x * c + _pairs(x) * s, 16),
    "pairs, unbound": (lambda x, c, s: x * c + _unbound(x) * s, 16),
    "pairs, repeated tables": (_repeated, 16),
    "pairs to halves": (_regrouped, 8),
    "two parts": (_parts, 8),
    "the other way round": (_inverse, 16),
    "the first features": (_first, 8),
    "the last features": (_last, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    rotate, width = SPELLINGS[name]

    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(q, cos, sin)

    assert rewritten(rewrite(capture(fn, *_inputs(width, dtype)))) == ["rope"]


def test_complex_numbers() -> None:
    def fn(q: Tensor, k: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        both = []
        for x in (q, k):
            turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * freqs
            both.append(torch.view_as_real(turned).flatten(3).type_as(x))
        return both[0], both[1]

    q, k, cos, sin = _inputs(8)
    findings = rewrite(capture(fn, q, k, torch.complex(cos, sin)))
    assert [(f.rule, f.status, f.formulas) for f in findings] == [("rope", "rewritten", 2)]


@pytest.mark.parametrize("name", [n for n in SPELLINGS if n != "the last features"])
def test_q_and_k_are_one_site(name: str) -> None:
    rotate, width = SPELLINGS[name]

    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if name == "pairs, repeated tables":  # as models do it: once for both
            cos, sin = (t[..., :8].repeat_interleave(2, dim=-1) for t in (cos, sin))
            return q * cos + _pairs(q) * sin, k * cos + _pairs(k) * sin
        return rotate(q, cos, sin), rotate(k, cos, sin)

    graph = capture(fn, *_inputs(width))
    findings = rewrite(graph)
    assert [(f.rule, f.status, f.formulas) for f in findings] == [("rope", "rewritten", 2)]
    ropes = [n for n in graph.graph.nodes if getattr(n.target, "__name__", "") == "rope"]
    assert len(ropes) == 1
    assert len(ropes[0].args[0]) == 2


def test_rotations_that_cannot_stand_together_stay_two() -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        first = _last(q, cos, sin)
        return first, _last(k + first.mean(), cos, sin)

    findings = [f for f in rewrite(capture(fn, *_inputs(8))) if f.status == "rewritten"]
    assert [(f.rule, f.formulas) for f in findings] == [("rope", 1), ("rope", 1)]


WRONG: dict[str, Rotate] = {
    "sign": lambda x, c, s: x * c + torch.cat((x[..., 8:], x[..., :8]), -1) * s,
    "order": lambda x, c, s: x * c + torch.cat((-x[..., :8], x[..., 8:]), -1) * s,
    "pairs, unbound as halves": lambda x, c, s: (
        x * c + torch.stack((-_unflat(x, 2, -2)[1], _unflat(x, 2, -2)[0]), -1).flatten(-2) * s
    ),
    "pairs, unbound in another order": lambda x, c, s: (
        x * c + torch.stack((-_unflat(x, 8, -1)[0], _unflat(x, 8, -1)[1]), -1).flatten(-2) * s
    ),
    "pairs, sign": lambda x, c, s: (
        x * c + torch.stack((x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s
    ),
    "pairs, order": lambda x, c, s: (
        x * c + torch.stack((-x[..., ::2], x[..., 1::2]), -1).flatten(-2) * s
    ),
    "two inputs": lambda x, c, s: x * c + _half(x + 1) * s,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rotation_is_not_rope(name: str) -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return WRONG[name](q, cos, sin)

    assert "rope" not in rewritten(rewrite(capture(fn, *_inputs())))


def test_learnt_tables_are_refused() -> None:
    def fn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return q * cos + _half(q) * sin

    q, k, cos, sin = _inputs()
    findings = rewrite(capture(fn, q, k, cos.requires_grad_(), sin))
    assert "rope" not in rewritten(findings)
    assert any("needs a gradient" in f.reason for f in findings)
