"""Single logits that are given out are those of the logits that are made after them.

Who compares the two relies on it: the highest logit equals the row's highest, the k-th is not above
itself, and the logit of a target is not above itself, whatever rounding did.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright import optimize
from fusewright.compiler.logits.lazy_logits import LazyLogits

from .test_logits import _LM, V, _plain

IDS = torch.arange(60).view(3, 20) % V
TARGETS = torch.arange(60).view(3, 20, 1) * 3 % V
MASK = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) > 0.4
AGAIN = torch.tensor([2, 0, 2])


@functools.cache
def _pair(dtype: torch.dtype = torch.float32, ties: bool = False) -> tuple[_LM, _LM]:
    torch.manual_seed(0)
    eager = _LM(_plain, False, True)
    if ties:  # each class is there three times, but for the last bits
        with torch.no_grad():
            third = eager.lm_head.weight[: V // 3]
            for i in (1, 2):
                near = third * (1 + i * torch.finfo(dtype).eps)
                eager.lm_head.weight[i * (V // 3) : (i + 1) * (V // 3)] = near
            eager.lm_head.bias.zero_()
    eager = eager.to(dtype)
    return eager, optimize(copy.deepcopy(eager), codegen="eager")


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda z: z,
    "a scale": lambda z: z / 0.7,
    "a cast": lambda z: z.double(),
    "a slice": lambda z: z[:, 3:-1],
    "a view": lambda z: z.view(-1, V),
    "chosen rows": lambda z: z[MASK],
    "rows twice": lambda z: z[AGAIN],
    "log-probabilities": lambda z: z.log_softmax(-1),
    "scaled log-probabilities": lambda z: 3 * (z[:, 1:] / 0.7).log_softmax(-1),
    "one row": lambda z: z[0][2],
}


def _warped(z: Tensor, k: int) -> Tensor:
    """As ``TopKLogitsWarper`` of transformers does."""
    return z.masked_fill(z < torch.topk(z, k)[0][..., -1, None], -torch.inf)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_are_the_highest_of_what_is_made_later(
    part: str, ties: bool, dtype: torch.dtype
) -> None:
    _, ours = _pair(dtype, ties)
    z = PARTS[part](ours(IDS))
    found = z.max(-1, keepdim=True)
    assert isinstance(z, LazyLogits)
    assert z.is_pending
    real = z + 0
    assert bool((real <= found.values).all())
    assert torch.equal(real.gather(-1, found.indices), found.values)
    z = PARTS[part](ours(IDS))
    classes = z.argmax(-1, keepdim=True)
    assert z.is_pending
    assert torch.equal((z + 0).gather(-1, classes), (z + 0).max(-1, keepdim=True).values)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_else_is_above_the_top_classes(part: str, ties: bool, dtype: torch.dtype) -> None:
    _, ours = _pair(dtype, ties)
    z = PARTS[part](ours(IDS))
    top = z.topk(5)
    real = z + 0
    assert torch.equal(real.gather(-1, top.indices), top.values)
    assert torch.equal(top.values.sort(-1, descending=True).values, top.values)
    others = real.scatter(-1, top.indices, -torch.inf)
    assert bool((others <= top.values[..., -1:]).all())


def test_all_that_is_given_out_agrees() -> None:
    _, ours = _pair()
    z = ours(IDS)
    single, highest, top = z.gather(-1, TARGETS), z.max(-1, keepdim=True), z.topk(4)
    assert torch.equal(top.values[..., :1], highest.values)
    ranks = [(z > single).sum(-1), (z >= top.values[..., -1:]).sum(-1)]
    expected = [(z + 0 > (z + 0).gather(-1, TARGETS)).sum(-1), torch.full((3, 20), 4)]
    assert all(map(torch.equal, ranks, expected))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_is_not_above_itself(part: str, dtype: torch.dtype) -> None:
    _, ours = _pair(dtype)
    z = PARTS[part](ours(IDS))
    assert isinstance(z, LazyLogits)
    targets = torch.arange(math.prod(z.shape[:-1])).view(*z.shape[:-1], 1) % V
    single = z.gather(-1, targets)
    assert z.is_pending
    assert torch.equal((z + 0).gather(-1, targets), single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 4])
def test_tokens_of_a_warper(dtype: torch.dtype, k: int) -> None:
    _, ours = _pair(dtype)
    z = ours(IDS)
    kept = (_warped(z, k) > -torch.inf).sum(-1)
    assert bool((kept >= k).all())


def test_what_was_given_out_may_be_written_to() -> None:
    _, ours = _pair()
    z = ours(IDS)
    with torch.no_grad():
        single, top = z.gather(-1, TARGETS), z.topk(2)
        kept = single.clone()
        single.zero_(), top.values.zero_(), top.indices.zero_()
    assert torch.equal((z + 0).gather(-1, TARGETS), kept)
    assert (z + 0).abs().min() > 0


def test_what_was_made_is_what_is_given_out() -> None:
    """A copy that is pending while the logits are there is of these."""
    _, ours = _pair()
    z = ours(IDS)
    rows = z[MASK]
    real = z + 0
    assert torch.equal(rows.max(-1).values, real[MASK].max(-1).values)
    assert torch.equal(rows.argmax(-1), real[MASK].argmax(-1))


def test_gradients_are_those_of_the_projection() -> None:
    found = []
    for m in _pair():
        m.zero_grad()
        z = m(IDS)
        top = z.topk(3)
        loss = (top.values * torch.tensor([1.0, 2.0, 3.0])).sum() + z.max(-1).values.sum()
        near = torch.where(z >= top.values[..., -1:], z, -1e9)
        (loss + F.cross_entropy(near.view(-1, V), top.indices[..., 0].flatten())).backward()
        found.append([p.grad for p in m.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=1e-6)
