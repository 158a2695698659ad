"""LayerNorm: PyTorch's own and the hand-written spellings; whatever only looks like one is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..capturing import capture, rewrite, rewritten

D = 32


def _centred(h: Tensor) -> Tensor:
    return h - h.mean(-1, keepdim=True)


def _formula(x: Tensor, root: Callable[[Tensor], Tensor]) -> Tensor:
    """Cohere's, which computes the difference twice."""
    h = x.to(torch.float32)
    mean = h.mean(-1, keepdim=True)
    return root((h - mean).pow(2).mean(-1, keepdim=True) + 1e-5) * (h - mean)


def _var_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x.float(), -1, unbiased=False, keepdim=True)
    return (x.float() - mean) / torch.sqrt(var + 1e-5)


def _var(x: Tensor) -> Tensor:
    h = x.float()
    return _centred(h) * torch.rsqrt(h.var(dim=-1, keepdim=True, unbiased=False) + 1e-5)


Fn = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, Fn] = {
    "torch": lambda x, w, b: F.layer_norm(x, (D,), w, b, 1e-5),
    "torch, keywords": lambda x, w, b: torch.layer_norm(
        input=x, normalized_shape=[D], weight=w, bias=b, eps=1e-6
    ),
    "torch, no bias": lambda x, w, b: F.layer_norm(x, (D,), w, None, 1e-5),
    "torch between casts": lambda x, w, b: F.layer_norm(x.float(), (D,), w.float(), b.float()).to(
        x.dtype
    ),
    "torch between casts, bare": lambda x, w, b: F.layer_norm(x.float(), (D,)).type_as(x),
    "cohere": lambda x, w, b: (w.float() * _formula(x, torch.rsqrt)).to(x.dtype),
    "cohere commuted": lambda x, w, b: (_formula(x, torch.rsqrt) * w.float()).to(x.dtype),
    "with bias": lambda x, w, b: (w.float() * _formula(x, torch.rsqrt) + b.float()).to(x.dtype),
    "power": lambda x, w, b: (w.float() * _formula(x, lambda v: v**-0.5)).to(x.dtype),
    "one over": lambda x, w, b: (w.float() * _formula(x, lambda v: 1 / v.sqrt())).to(x.dtype),
    "var": lambda x, w, b: _var(x).to(x.dtype),
    "var_mean": lambda x, w, b: (_var_mean(x) * w.float() + b.float()).to(x.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, D, dtype=dtype, requires_grad=True)
    w, b = (torch.randn(D, dtype=dtype, requires_grad=True) for _ in range(2))
    graph = capture(SPELLINGS[name], x, w, b)
    findings = rewrite(graph)
    assert [(f.rule, f.status) for f in findings] == [("layer_norm", "rewritten")]
    assert len([n for n in graph.graph.nodes if n.op.startswith("call")]) == 1


def test_a_weight_per_head() -> None:
    x = torch.randn(2, 5, 4, D, requires_grad=True)
    w = torch.randn(4, D, requires_grad=True)
    graph = capture(lambda x, w: w.float() * _formula(x, torch.rsqrt), x, w)
    assert rewritten(rewrite(graph)) == ["layer_norm"]
    assert len([n for n in graph.graph.nodes if n.op.startswith("call")]) == 1


def test_an_offset_of_the_weight_stays() -> None:
    x, w = torch.randn(2, 5, D, requires_grad=True), torch.randn(D, requires_grad=True)
    graph = capture(lambda x, w: F.layer_norm(x, (D,), w + 1, None, 1e-5), x, w)
    assert rewritten(rewrite(graph)) == ["layer_norm"]


def test_what_pytorch_makes_contiguous_stays_so() -> None:
    x, w = torch.randn(2, 4, 5, D, requires_grad=True), torch.randn(D)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return F.layer_norm(x.transpose(1, 2), (D,), w).view(-1, D)

    graph = capture(fn, x, w)
    assert rewritten(rewrite(graph)) == ["layer_norm"]
    names = [n.target for n in graph.graph.nodes if n.op == "placeholder"]
    ordered = [x if "x" in str(n) else w for n in names]
    torch.testing.assert_close(graph(*ordered)[0], fn(x, w))


NEAR: dict[str, tuple[Fn, str, str]] = {
    "two dimensions": (lambda x, w, b: F.layer_norm(x, (5, D)), "refused", "last dimension"),
    "unbiased": (
        lambda x, w, b: _centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5),
        "missed",
        "1 where 0",
    ),
    "another mean": (
        lambda x, w, b: (
            (x - x.mean(-2, keepdim=True))
            * torch.rsqrt(_centred(x).pow(2).mean(-1, keepdim=True) + 1e-5)
        ),
        "missed",
        "",
    ),
    "eps outside the root": (
        lambda x, w, b: _centred(x) / (x.std(-1, keepdim=True) + 1e-6),
        "",
        "",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_only_looks_like_it(name: str) -> None:
    fn, status, word = NEAR[name]
    x = torch.randn(2, 5, D, requires_grad=True)
    findings = rewrite(capture(fn, x, torch.randn(D), torch.randn(D)))
    assert [(f.rule, f.status) for f in findings] == ([("layer_norm", status)] if status else [])
    assert all(word in f.reason for f in findings)


def test_an_inner_value_used_outside_leaves_an_rms_norm() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        centred = _centred(x)
        return w * (centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)), centred

    findings = rewrite(capture(fn, torch.randn(2, 5, D, requires_grad=True), torch.randn(D)))
    assert rewritten(findings) == ["rms_norm"]
    refused = [f for f in findings if f.status == "refused"]
    assert [f.rule for f in refused] == ["layer_norm"]
    assert "also used by" in refused[0].reason
