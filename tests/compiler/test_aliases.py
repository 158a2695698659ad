"""Which results of a block share memory, or are one tensor: as in eager, with each other and x.

AOTAutograd returns two objects over one memory where eager returns one object twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .test_effects import _norm, _pair, _x

Results = tuple[Tensor, ...]


def _casts(block: Any, x: Tensor) -> Results:
    h = block.d(x)
    return h.double(), h.double()


def _itself(block: Any, x: Tensor) -> Results:
    h = block.d(x)
    return h, h.float(), h.contiguous(), h.view(-1, 16), h.detach(), F.dropout(h, 0.0)


def _input(block: Any, x: Tensor) -> Results:
    return x, x.float(), x.view(-1), block.d(x)


def _halves(block: Any, x: Tensor) -> Results:
    both = torch.cat((block.g(x), block.u(x)), -1)
    gate, up = both.chunk(2, -1)
    return gate, up, F.silu(gate) * up, both


def _normed(block: Any, x: Tensor) -> Results:
    n = _norm(block, x)
    return n, block.g(n), block.u(n), n


def _total(block: Any, x: Tensor) -> Results:
    h = x + block.d(x)
    return h, _norm(block, h), h.view(-1, 16)


def _repeated(block: Any, x: Tensor) -> Results:
    k = block.g(x).view(2, 5, 2, 1, 8).expand(2, 5, 2, 3, 8)
    return k, k.reshape(2, 5, 6, 8), k[:, :, 0]


def _twice(block: Any, x: Tensor) -> Results:
    h = block.d(x)
    return -h, -h, torch.zeros_like(h), torch.zeros_like(h)


def _shared(tensors: Sequence[Tensor], identity: bool) -> list[list[tuple[bool, bool]]]:
    places = [t.untyped_storage().data_ptr() for t in tensors]
    return [[(a is b and identity, i == j) for b, j in zip(tensors, places, strict=True)]
            for a, i in zip(tensors, places, strict=True)]  # fmt: skip


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "body", [_casts, _itself, _input, _halves, _normed, _total, _repeated, _twice]
)
def test_results_share_memory_as_in_eager(body: Any, codegen: str, grad: bool) -> None:
    found = []
    for model in _pair(body, codegen=codegen):
        with torch.set_grad_enabled(grad):
            x = _x().requires_grad_(grad) * 1
            found.append(_shared([x, *model.layers[0](x)], codegen == "eager"))
    assert found[0] == found[1]
