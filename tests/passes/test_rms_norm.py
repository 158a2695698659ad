"""RMSNorm: every spelling is recognised; whatever only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ..capturing import capture, rewrite, rewritten

D = 32


def _normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.to(torch.float32)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def _over(x: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows in fp32 over a root: ``root`` gives its reciprocal."""
    h = x.float()
    return h * root(h.pow(2).mean(-1, keepdim=True) + 1e-6)


SPELLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "llama": lambda x, w: w * _normed(x).to(x.dtype),
    "llama commuted": lambda x, w: _normed(x).to(x.dtype) * w,
    "gemma": lambda x, w: (_normed(x) * (1.0 + w.float())).type_as(x),
    "gemma commuted": lambda x, w: ((w.float() + 1) * _normed(x)).to(x.dtype),
    "olmo2": lambda x, w: (w * _normed(x)).to(x.dtype),
    "torch": lambda x, w: torch.nn.functional.rms_norm(x, (D,), w, 1e-6),
    "product": lambda x, w: (
        w
        * (x.float() * torch.rsqrt(torch.mean(x.float() * x.float(), -1, keepdim=True) + 1e-5)).to(
            x.dtype
        )
    ),
    "gemma3n": lambda x, w: (_over(x, lambda v: torch.pow(v, -0.5)) * w.float()).type_as(x),
    "one over a root": lambda x, w: w * _over(x, lambda v: 1.0 / torch.sqrt(v)).to(x.dtype),
    "reciprocal": lambda x, w: w * _over(x, lambda v: v.sqrt().reciprocal()).to(x.dtype),
    "over a root": lambda x, w: (
        w * (x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype)
    ),
    "cpmant": lambda x, w: (
        (x * torch.rsqrt(x.to(torch.float32).pow(2).mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        * w
    ),
    "eps first": lambda x, w: (
        w
        * (x.float() * torch.rsqrt(1e-5 + x.float().square().mean(dim=-1, keepdim=True))).to(
            x.dtype
        )
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, D, dtype=dtype, requires_grad=True)
    w = torch.randn(D, dtype=dtype, requires_grad=True)
    graph = capture(SPELLINGS[name], x, w)
    assert rewritten(rewrite(graph)) == ["rms_norm"]
    calls = [n for n in graph.graph.nodes if n.op.startswith("call")]
    assert len(calls) == 1


def test_without_weight() -> None:
    x = torch.randn(2, 5, D, dtype=torch.bfloat16, requires_grad=True)
    assert rewritten(rewrite(capture(lambda x: _normed(x).to(x.dtype), x))) == ["rms_norm"]


BARE: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x: x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6),
    "l2 over a root": lambda x: x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6),
    "l2 in fp32": lambda x: (
        x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + 1e-6)
    ).type_as(x),
    "a rounded root": lambda x: (
        x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BARE)
def test_spellings_without_weight(name: str, dtype: torch.dtype) -> None:
    graph = capture(BARE[name], torch.randn(2, 5, D, dtype=dtype, requires_grad=True))
    assert rewritten(rewrite(graph)) == ["rms_norm"]
    assert len([n for n in graph.graph.nodes if n.op.startswith("call")]) == 1


def test_an_l2_norm_joins_its_neighbours() -> None:
    def fn(x: Tensor, r: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = x + r
        return torch.nn.functional.linear(BARE["l2"](x), a), BARE["l2"](total), total

    inputs = [torch.randn(*s, requires_grad=True) for s in ((2, 5, D), (2, 5, D), (16, D))]
    found = rewritten(rewrite(capture(fn, *inputs)))
    assert found == ["add_rms_norm", "rms_norm", "rms_norm", "rms_norm_linear"]


NEAR: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "another power": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6)),
        "4",
    ),
    "another dimension": (
        lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6)),
        "-2",
    ),
    "another tensor": (
        lambda x, w: w * ((x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        "",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_it_is_missed_with_the_reason(name: str) -> None:
    fn, word = NEAR[name]
    x = torch.randn(2, 5, D, requires_grad=True)
    findings = rewrite(capture(fn, x, torch.randn(D)))
    assert rewritten(findings) == []
    missed = [f for f in findings if f.rule == "rms_norm" and f.status == "missed"]
    assert len(missed) == 1
    assert word in missed[0].reason


def test_an_inner_value_used_outside_refuses() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        variance = x.pow(2).mean(-1, keepdim=True)
        return w * (x * torch.rsqrt(variance + 1e-6)), variance

    findings = rewrite(capture(fn, torch.randn(2, 5, D, requires_grad=True), torch.randn(D)))
    assert rewritten(findings) == []
    assert any(f.status == "refused" and "also used by" in f.reason for f in findings)


def test_a_write_in_place_between_refuses() -> None:
    def fn(x: Tensor, w: Tensor) -> Tensor:
        y = x * 1.5
        variance = y.pow(2).mean(-1, keepdim=True)
        y.add_(1)
        return w * (y * torch.rsqrt(variance + 1e-6))

    findings = rewrite(capture(fn, torch.randn(2, 5, D), torch.randn(D)))
    assert rewritten(findings) == []


def test_duplicate_norms_are_two_sites_and_one_verdict() -> None:
    from fusewright.passes import PIPELINE
    from fusewright.rewrite.engine import Fuel, apply
    from fusewright.rewrite.op_table import TABLE
    from fusewright.rewrite.verify import Verifier

    x = torch.randn(2, 5, D, requires_grad=True)
    graph = capture(lambda x, a, b: b * _normed(a * _normed(x)), x, torch.randn(D), torch.randn(D))
    verifier = Verifier()
    findings = apply(graph, PIPELINE, TABLE, verifier, Fuel())
    assert rewritten(findings) == ["rms_norm", "rms_norm"]
    assert len(verifier.verdicts) <= 2  # the inputs' need of gradients may differ


def test_residual_add_and_norm_become_one() -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = r + x
        return w * _normed(total), total

    x, r = (torch.randn(2, 5, D, requires_grad=True) for _ in range(2))
    graph = capture(fn, x, r, torch.randn(D))
    assert rewritten(rewrite(graph)) == ["add_rms_norm", "rms_norm"]


def test_a_norm_that_only_feeds_linears_is_not_stored() -> None:
    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        n = w * _normed(x)
        return torch.nn.functional.linear(n, a, c), torch.nn.functional.linear(n, b)

    inputs = [
        torch.randn(*s, requires_grad=True) for s in ((2, 5, D), (D,), (24, D), (16, D), (24,))
    ]
    assert rewritten(rewrite(capture(fn, *inputs))) == ["rms_norm", "rms_norm_linear"]

    def other_user(x: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        n = w * _normed(x)
        return torch.nn.functional.linear(n, a), n.sin()

    assert rewritten(rewrite(capture(other_user, *inputs[:3]))) == ["rms_norm"]
