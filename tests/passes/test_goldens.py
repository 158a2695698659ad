"""Graphs before and after, as text: what a rule does, for people to read.

``pytest tests/passes/test_goldens.py --update-goldens`` writes the files anew. The numbers are
tested beside the text: the rewritten graph gives what the captured one gave.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.graph.printer import text

from ..capturing import capture, rewrite

FOLDER = pathlib.Path(__file__).parent / "golden"


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def _norm(x: Tensor, w: Tensor) -> Tensor:
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x[..., :4], x[..., 4:]
    return torch.cat((-b, a), dim=-1)


def residual_norm_and_gated_mlp(
    x: Tensor, r: Tensor, w: Tensor, gate: Tensor, up: Tensor, down: Tensor
) -> Tensor:
    total = r + x
    n = _norm(total, w)
    return total + F.linear(F.silu(F.linear(n, gate)) * F.linear(n, up), down)


def norm_into_linears(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    n = _norm(x, w)
    return F.linear(n, a), F.linear(n, b)


def layer_norms(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).pow(2).mean(-1, keepdim=True)
    return F.layer_norm(x, (8,), w, b), w * ((x - mean) * torch.rsqrt(var + 1e-5))


def l2_norm(x: Tensor) -> tuple[Tensor]:
    return (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6),)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w) + F.linear(F.linear(F.dropout(x, 0.1), a), b) * 2.0


def loss(h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    logits = torch.tanh(F.linear(h, w) / 30.0) * 30.0
    return F.cross_entropy(logits.float().view(-1, 50), t), logits


CASES: list[tuple[Callable[..., Any], list[Tensor]]] = [
    (residual_norm_and_gated_mlp, [_leaf(2, 5, 8), _leaf(2, 5, 8), _leaf(8), _leaf(12, 8),
                                   _leaf(12, 8), _leaf(8, 12)]),
    (norm_into_linears, [_leaf(2, 5, 8), _leaf(8), _leaf(12, 8), _leaf(4, 8)]),
    (layer_norms, [_leaf(2, 5, 8), _leaf(8), _leaf(8)]),
    (l2_norm, [_leaf(2, 5, 8)]),
    (rotary, [_leaf(2, 4, 5, 8), _leaf(2, 2, 5, 8), torch.randn(2, 1, 5, 8),
              torch.randn(2, 1, 5, 8)]),
    (lora, [_leaf(2, 5, 24), _leaf(16, 24), _leaf(4, 24), _leaf(16, 4)]),
    (loss, [_leaf(2, 5, 8), _leaf(50, 8), torch.randint(0, 50, (10,))]),
]  # fmt: skip


@pytest.mark.parametrize(("fn", "inputs"), CASES, ids=lambda c: getattr(c, "__name__", ""))
def test_golden(
    fn: Callable[..., Any], inputs: list[Tensor], request: pytest.FixtureRequest
) -> None:
    module = capture(fn, *inputs)
    original = copy.deepcopy(module)
    before = text(module)
    rewrite(module)
    shown = f"before\n\n{before}\nafter\n\n{text(module)}"
    path = FOLDER / f"{fn.__name__}.txt"
    if request.config.getoption("--update-goldens"):
        path.write_text(shown)
    assert shown == path.read_text()
    _assert_same_numbers(module, original, inputs)


def _assert_same_numbers(module: Any, original: Any, inputs: list[Tensor]) -> None:
    names = [n.target for n in original.graph.nodes if n.op == "placeholder"]
    assert names == [n.target for n in module.graph.nodes if n.op == "placeholder"]
    examples = [n.meta["example_value"] for n in original.graph.nodes if n.op == "placeholder"]
    ordered = [next(i for i in inputs if i.shape == e.shape and i.dtype == e.dtype)
               for e in examples]  # fmt: skip
    results = []
    for graph in (module, original):
        torch.manual_seed(0)  # the dropout
        outputs = graph(*ordered)
        leaves = [i for i in dict.fromkeys(ordered) if i.requires_grad]
        grads = torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)
        results.append((*outputs, *grads))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
