"""Products of a few rows that are far smaller than their bias: the sum is rounded as eager's is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.kernels.loss.linear_cross_entropy import linear_cross_entropy
from fusewright.kernels.loss.linear_cross_entropy import reference as loss_reference
from fusewright.kernels.loss.linear_logprob import linear_logprob
from fusewright.kernels.loss.linear_logprob import reference as logprob_reference
from fusewright.kernels.norms.rms_norm_linear import OP as NORM
from fusewright.kernels.tolerance import exceeded

from .by_parts import LORA, MLP, QKV

Fn = Callable[..., Tensor]


def _norm(run: Callable[..., tuple[Tensor, ...]]) -> Fn:
    return lambda x, w, b, *_: run(x, None, 1e-6, 0.0, "inner", [w * 1e-3], [b])[0]


def _block(run: Callable[..., tuple[Tensor, ...]]) -> Fn:
    return lambda x, w, b, a, c: run(x, [w], [b], [a], [c], [1.0], [None])[0]


def _mlp(run: Fn) -> Fn:
    def call(x: Tensor, w: Tensor, b: Tensor, a: Tensor, c: Tensor) -> Tensor:
        lists = [[w, w, w.mT], [b, b, b[:1].expand(64).clone()], [a, a, c.mT], [c, c, a.mT]]
        return run(x, *lists, [1.0] * 3, [None] * 3, "silu")

    return call


LABELS = torch.zeros(3, dtype=torch.int64)
CASES: dict[str, tuple[Fn, Fn]] = {
    "lora_linear": (lambda *t: LORA.call(*t, 1.0), lambda *t: LORA.reference(*t, 1.0)),
    "qkv_block": (_block(QKV.call), _block(QKV.reference)),
    "mlp_block": (_mlp(MLP.call), _mlp(MLP.reference)),
    "rms_norm_linear": (_norm(NORM.call), _norm(NORM.reference)),
    "linear_cross_entropy": (
        lambda x, w, b, *_: linear_cross_entropy(x, w, b, LABELS[: len(x)]),
        lambda x, w, b, *_: loss_reference(x, w, b, LABELS[: len(x)]),
    ),
    "linear_logprob": (
        lambda x, w, b, *_: linear_logprob(x, w, b, LABELS[: len(x)])[0],
        lambda x, w, b, *_: logprob_reference(x, w, b, LABELS[: len(x)])[0],
    ),
}


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_rounded_as_eager_rounds(name: str, rows: int, turned: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 64) * 1e-3
    given = (
        torch.randn(rows, 64),
        weight.mT.contiguous().mT if turned else weight,
        torch.randn(128),
        torch.randn(4, 64) * 1e-3,
        torch.randn(128, 4) * 1e-3,
    )
    ours, reference = CASES[name]
    exact = reference(*(t.double() for t in given))
    assert exceeded(ours(*given), reference(*given), exact) is None


def test_what_is_looked_for_would_be_seen() -> None:
    """A sum that rounds each product to the size of the bias is outside the budget."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 64), torch.randn(128, 64) * 1e-3, torch.randn(128)
    total = bias.clone()
    for i in range(64):
        total = total + x[0, i] * weight[:, i]
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert exceeded(total[None], F.linear(x, weight, bias), exact) is not None
