"""Every spelling of an operation has one canonical view."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.graph.canon import canonical

from ..capturing import capture

X, Y, W = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(5, 8)


def _last(fn: Callable[..., Tensor], *inputs: Tensor) -> tuple[object, ...]:
    """Name and arguments of the graph's last operation; nodes by name."""
    nodes = [n for n in capture(fn, *inputs).graph.nodes if n.op.startswith("call")]
    canon = canonical(nodes[-1])
    assert canon is not None, nodes[-1]
    return (canon.name, *(a.name if isinstance(a, torch.fx.Node) else a for a in canon.args))


@pytest.mark.parametrize(
    "fns",
    [
        [
            lambda x, y: x * y,
            lambda x, y: torch.mul(x, y),
            lambda x, y: x.mul(y),
            lambda x, y: torch.multiply(x, y),
            lambda x, y: torch.mul(input=x, other=y),
        ],
        [
            lambda x, y: x + y,
            lambda x, y: torch.add(x, y),
            lambda x, y: x.add(y),
            lambda x, y: x.add(other=y),
        ],
        [
            lambda x, y: x / y,
            lambda x, y: torch.div(x, y),
            lambda x, y: x.div(y),
            lambda x, y: torch.true_divide(x, y),
        ],
        [lambda x, y: -x, lambda x, y: x.neg(), lambda x, y: torch.neg(x)],
        [
            lambda x, y: x.pow(2),
            lambda x, y: x**2,
            lambda x, y: torch.pow(x, 2),
            lambda x, y: x.square(),
            lambda x, y: torch.square(x),
        ],
        [
            lambda x, y: x.var(-1, unbiased=False, keepdim=True),
            lambda x, y: x.var(2, False, True),
            lambda x, y: x.var(dim=(-1,), correction=0, keepdim=True),
            lambda x, y: torch.var(x, dim=-1, unbiased=False, keepdim=True),
            lambda x, y: torch.var(input=x, dim=[2], correction=0, keepdim=True),
        ],
        [lambda x, y: x.var(), lambda x, y: x.var(True), lambda x, y: torch.var(x, unbiased=True)],
        [lambda x, y: x.reciprocal(), lambda x, y: torch.reciprocal(x)],
        [
            lambda x, y: x.mean(-1, keepdim=True),
            lambda x, y: x.mean(2, True),
            lambda x, y: torch.mean(x, dim=(-1,), keepdim=True),
        ],
        [
            lambda x, y: x.to(torch.bfloat16),
            lambda x, y: x.bfloat16(),
            lambda x, y: x.to(dtype=torch.bfloat16),
        ],
        [lambda x, y: F.silu(x), lambda x, y: F.silu(x, inplace=False)],
        [
            lambda x, y: x.transpose(1, 2),
            lambda x, y: torch.transpose(x, 2, 1),
            lambda x, y: x.transpose(-1, -2),
        ],
        [
            lambda x, y: x[..., :4],
            lambda x, y: x[:, :, 0:4],
            lambda x, y: x.chunk(2, -1)[0],
            lambda x, y: torch.chunk(x, 2, dim=2)[0],
            lambda x, y: x.split(4, dim=-1)[0],
        ],
        [lambda x, y: x[:, None], lambda x, y: x.unsqueeze(1)],
        [lambda x, y: torch.cat((x, y), -1), lambda x, y: torch.cat([x, y], dim=2)],
    ],
)
def test_spellings_agree(fns: list[Callable[..., Tensor]]) -> None:
    views = [_last(fn, X, Y) for fn in fns]
    assert all(repr(v) == repr(views[0]) for v in views), views


def test_linear_spellings_agree() -> None:
    fns = [F.linear, lambda x, w: F.linear(x, weight=w), lambda x, w: x @ w.T,
           lambda x, w: torch.matmul(x, w.t())]  # fmt: skip
    views = [_last(fn, X, W) for fn in fns]
    assert all(v[0] == "linear" and v[3] is None for v in views), views


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, y: x[..., 1::2][..., ::2][0],
        lambda x, y: x[0],
        lambda x, y: x[:, 1:, :4],
        lambda x, y: torch.cumprod(x, 0),
    ],
)
def test_what_is_not_known_has_no_view(fn: Callable[..., Tensor]) -> None:
    nodes = [n for n in capture(fn, X, Y).graph.nodes if n.op.startswith("call")]
    assert canonical(nodes[-1]) is None


def test_alpha_is_an_argument_and_not_dropped() -> None:
    assert _last(lambda x, y: torch.add(x, y, alpha=2), X, Y)[-1] == 2
