"""Scans and convolutions of rows with several segments: as each segment gives by itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.op import Op, starts_of
from fusewright.kernels.scan import gated_delta_rule, selective_scan, short_conv, ssd

FP64 = torch.float64


def _scan(batch: int, length: int) -> tuple[list[Tensor], tuple[Any, ...], int]:
    shapes = ((batch, 6, length), (batch, 6, length), (6, 3), (batch, 3, length))
    u, delta, a, b = (torch.randn(s, dtype=FP64) for s in shapes)
    gate, c = torch.randn_like(u), torch.randn_like(b)
    vectors = torch.randn(2, 6, dtype=FP64).unbind()
    return [u, delta, -a.abs() - 0.1, b, c, vectors[0], gate, vectors[1]], (True,), 2


def _dual(batch: int, length: int) -> tuple[list[Tensor], tuple[Any, ...], int]:
    x, dt = (torch.randn(batch, length, *s, dtype=FP64) for s in ((4, 3), (4,)))
    b, c = torch.randn(2, batch, length, 2, 5, dtype=FP64).unbind()
    a, d, bias = torch.randn(3, 4, dtype=FP64).unbind()
    return [x, dt, -a.abs() - 0.1, b, c, d, bias], (True, (0.0, float("inf"))), 1


def _conv(batch: int, length: int) -> tuple[list[Tensor], tuple[Any, ...], int]:
    x, weight = torch.randn(batch, 6, length, dtype=FP64), torch.randn(6, 4, dtype=FP64)
    return [x, weight, torch.randn(6, dtype=FP64)], (True,), 2


def _delta(
    batch: int, length: int, per_feature: bool = False
) -> tuple[list[Tensor], tuple[Any, ...], int]:
    q, k = torch.randn(2, batch, length, 2, 6, dtype=FP64).unbind()
    v, g = torch.randn(2, batch, length, 4, 6, dtype=FP64).unbind()
    beta = torch.rand(batch, length, 4, dtype=FP64)
    return [q, k, v[..., :3], -g.abs()[... if per_feature else (..., 0)], beta], (None, True), 1


Make = Callable[[int, int], tuple[list[Tensor], tuple[Any, ...], int]]
CASES: dict[str, tuple[Op, Make]] = {
    "selective_scan": (selective_scan.OP, _scan),
    "ssd": (ssd.OP, _dual),
    "short_conv": (short_conv.OP, _conv),
    "gated_delta_rule": (gated_delta_rule.OP, _delta),
    "kda": (gated_delta_rule.KDA, functools.partial(_delta, per_feature=True)),
}


def _run(op: Op, tensors: Sequence[Tensor], options: tuple[Any, ...], segments: Tensor) -> Tensor:
    given = (*tensors, segments, *options) if op.name == "short_conv" else (
        *tensors, *options, segments
    )  # fmt: skip
    result: Any = op.call(*given)
    return result[0] if isinstance(result, tuple) else result


def _differences(op: Op, make: Make, begins: Tensor) -> list[float]:
    """Of the outputs and all gradients, in rows and apart."""
    segments = starts_of(begins)
    batch, length = begins.shape
    tensors, options, time = make(batch, length)
    tensors = [t.requires_grad_() for t in tensors]
    sequences = [t.dim() > 2 and t.shape[0] == batch and t.shape[time] == length for t in tensors]
    out = _run(op, tensors, options, segments)
    upstream = torch.randn_like(out)
    ours = [out.detach(), *torch.autograd.grad(out, tensors, upstream)]
    parts = []
    for row in range(batch):
        places = [*begins[row].nonzero().flatten().tolist(), length]
        places = places if places[0] == 0 else [0, *places]
        for start, stop in itertools.pairwise(places):
            apart = [
                t[row : row + 1].narrow(time, start, stop - start) if is_sequence else t
                for t, is_sequence in zip(tensors, sequences, strict=True)
            ]
            one = torch.zeros(1, stop - start, dtype=torch.int32)
            part = _run(op, apart, options, one)
            own = upstream[row : row + 1].narrow(time, start, stop - start)
            parts.append((part, own, row, start))
    total = sum((part * own).sum() for part, own, *_ in parts)
    assert isinstance(total, Tensor)
    theirs = [torch.empty_like(out), *torch.autograd.grad(total, tensors)]
    for part, _, row, start in parts:
        theirs[0][row : row + 1].narrow(time, start, part.shape[time]).copy_(part.detach())
    return [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_rows_give_what_segments_give_apart(name: str, data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    begins = data.draw(st.lists(st.booleans(), min_size=batch * length, max_size=batch * length))
    torch.manual_seed(length)
    differences = _differences(*CASES[name], torch.tensor(begins).view(batch, length))
    assert max(differences) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_segments_across_chunks(name: str) -> None:
    begins = torch.zeros(2, 300, dtype=torch.bool)
    begins[0, [1, 63, 64, 65, 191]] = begins[1, [128, 140, 299]] = True
    torch.manual_seed(0)
    assert max(_differences(*CASES[name], begins)) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_what_a_segment_gives_is_its_own(name: str) -> None:
    """To the bit: nothing of one before it, however large."""
    op, make = CASES[name]
    begins = torch.zeros(1, 90, dtype=torch.bool)
    begins[0, 70] = True
    torch.manual_seed(0)
    tensors, options, time = make(1, 90)
    results = []
    for factor in (1.0, 1e150):
        first = tensors[0].clone()
        first.narrow(time, 0, 70).mul_(factor)
        x = first.requires_grad_()
        out = _run(op, [x, *tensors[1:]], options, starts_of(begins))
        own = out.narrow(time, 70, 20)
        (grad,) = torch.autograd.grad(own.sum(), x)
        assert not grad.narrow(time, 0, 70).any()
        results.append(own)
    assert torch.equal(*results)
