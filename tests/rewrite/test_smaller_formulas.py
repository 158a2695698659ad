"""The smaller form of a formula: sizes, layouts and constants, without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.graph import facts
from fusewright.rewrite.engine import Candidate
from fusewright.rewrite.matcher import Trace
from fusewright.rewrite.rule import Rule
from fusewright.rewrite.smaller_weights import _example, smaller

from .graphs import last, named, trace


class Product(Rule):
    """A linear layer."""

    name = op = "product"

    def patterns(self, p: Any, x: Any, w: Any) -> Any:
        """One spelling."""
        yield p.linear(x, w)


def _candidate(w: Tensor) -> Candidate:
    """A linear layer over 5 features more than ``w`` has rows."""
    features = w.shape[1]
    module = trace(lambda x, weight: F.linear(x, weight), (2, 6, features), (8, features))
    named(module, "weight").meta["example_value"] = w
    node = last(module)
    node.meta["example_value"] = torch.empty(2, 6, w.shape[0], device="meta")
    match = next(Product().find(node, Trace()))
    inputs = tuple(node.all_input_nodes)
    return Candidate(Product(), match, inputs, match.nodes, match.outputs, {})


def _shapes(w: Tensor) -> list[tuple[int, ...]] | None:
    made = smaller(_candidate(w))
    if made is None:
        return None
    tensors = [facts.tensor(n) for n in (*made.inputs, *made.outputs)]
    return [tuple(t.shape) for t in tensors if t is not None]


def _weight(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def test_a_large_size_becomes_a_small_one_wherever_it_stands() -> None:
    assert _shapes(_weight(49152, 64)) == [(2, 6, 64), (896, 64), (2, 6, 896)]


def test_a_small_size_is_none_that_there_is() -> None:
    assert _shapes(_weight(49152, 896)) == [(2, 6, 896), (1152, 896), (2, 6, 1152)]


def test_nothing_to_gain_or_weights_with_gaps() -> None:
    assert _shapes(_weight(1000, 64)) is None
    assert _shapes(_weight(49152, 128)[:, 64:]) is None
    assert _shapes(_weight(49152, 128)[:, ::2]) is None


@pytest.mark.parametrize(
    ("large", "strides"),
    [
        (_weight(5000, 3), (3, 1)),
        (_weight(3, 5000).T, (1, 8)),
        (_weight(1, 3).expand(5000, 3), (0, 1)),
        (_weight(5000, 1).expand(5000, 3), (1, 0)),
    ],
)
def test_an_example_lies_in_memory_as_the_real_one(large: Tensor, strides: tuple[int, ...]) -> None:
    real = large.to(torch.bfloat16).as_strided(large.shape, large.stride()).requires_grad_()
    made = _example(real, {5000: 8})
    assert (made.shape, made.stride()) == ((8, 3), strides)
    assert made.is_meta
    assert made.dtype is torch.bfloat16
    assert made.requires_grad
    assert not _example(large, {5000: 8}).requires_grad


def test_an_example_that_has_no_such_size_stays() -> None:
    small = _weight(4, 3)
    assert _example(small, {5000: 8}) is small
    assert _example(7, {7: 8}) == 7
