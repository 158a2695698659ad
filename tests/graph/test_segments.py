"""Functions of one sequence, run over each segment of rows apart, and which functions these are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusewright.graph.opaque import functions
from fusewright.graph.opaque.functions import (
    CHUNKED,
    CONVOLUTION,
    DELTA,
    SELECTIVE,
    convention,
    leaf,
    segmented_convention,
    segmented_leaf,
)
from fusewright.kernels.op import sample_starts, starts_of
from fusewright.passes import PIPELINE

from ..capturing import capture, rewrite, rewritten
from ..passes.test_selective_scan import chunked, scan


@pytest.fixture(autouse=True)
def _functions_of_tests_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of libraries."""
    monkeypatch.setattr(functions, "LIBRARIES", (*functions.LIBRARIES, "tests"))


def conv(hidden: Any, weight: Any, bias: Any = None, activation: Any = None, **more: Any) -> Any:
    """A causal convolution as model code has it."""
    out = F.conv1d(
        hidden, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=weight.shape[0]
    )[..., : hidden.shape[2]]
    return out if activation is None else F.silu(out)


def linear(x: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
    """The same arguments, and no convolution."""
    return F.linear(x, weight, bias)


def reversed_conv(x: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
    return conv(x.flip(2), weight, bias, activation).flip(2)


def delta(
    query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
    output_final_state: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """The gated delta rule, position by position."""
    state = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    if initial_state is not None:
        state = initial_state
    outs = []
    for t in range(value.shape[1]):
        decay = g[:, t].exp()
        state = state * (decay[..., None] if g.dim() == 3 else decay)[..., None]
        error = value[:, t] - (key[:, t, :, None] @ state)[..., 0, :]
        state = state + key[:, t, :, :, None] * (beta[:, t, :, None] * error)[..., None, :]
        outs.append((query[:, t, :, None] @ state)[..., 0, :])
    return torch.stack(outs, 1), state.float() if output_final_state else None


def _segments(batch: int, length: int, *places: int) -> Tensor:
    begins = torch.zeros(batch, length, dtype=torch.bool)
    begins[-1, list(places)] = True
    return starts_of(begins)


def _inputs(kind: Any, batch: int, length: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes: dict[Any, Any] = {
        SELECTIVE.name: ((batch, 4, length), (batch, 4, length), (4, 3), *[(batch, 3, length)] * 2),
        CHUNKED.name: (
            (batch, length, 4, 3),
            (batch, length, 4),
            (4,),
            *[(batch, length, 2, 5)] * 2,
        ),
        DELTA.name: (*[(batch, length, 2, 3)] * 3, *[(batch, length, 2)] * 2),
        CONVOLUTION.name: ((batch, 4, length), (4, 3), (4,)),
    }
    made = [torch.randn(s, dtype=torch.float64) for s in shapes[kind.name]]
    for i in {SELECTIVE.name: (2,), CHUNKED.name: (2,), DELTA.name: (3,)}.get(kind.name, ()):
        made[i] = -made[i].abs() - 0.1
    return [t.requires_grad_() for t in made]


FUNCTIONS: dict[Any, Any] = {
    SELECTIVE.name: scan, CHUNKED.name: chunked, DELTA.name: delta, CONVOLUTION.name: conv
}  # fmt: skip
KINDS = SELECTIVE, CHUNKED, DELTA, CONVOLUTION
OPTIONS: dict[Any, dict[str, Any]] = {CHUNKED.name: {"chunk_size": 4}}


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_each_segment_is_as_by_itself(kind: Any) -> None:
    function, given = FUNCTIONS[kind.name], OPTIONS.get(kind.name, {})
    assert segmented_convention(function) is kind
    batch, length, places = 2, 150, (3, 4, 100)
    inputs = _inputs(kind, batch, length)
    call = segmented_leaf(function)
    out = call(_segments(batch, length, *places), *inputs, **given)
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, inputs, upstream)
    spans = [(0, 0, length), *((1, a, b) for a, b in ((0, 3), (3, 4), (4, 100), (100, length)))]
    total: Any = 0.0
    for row, start, stop in spans:
        cut = [
            t[row : row + 1].narrow(kind.time, start, stop - start)
            if t.dim() > 2 and t.shape[kind.time] == length else t
            for t in inputs
        ]  # fmt: skip
        part = function(*cut, **given)
        part = part[0] if isinstance(part, tuple) else part
        own = upstream[row : row + 1].narrow(kind.time, start, stop - start)
        here = out[row : row + 1].narrow(kind.time, start, stop - start)
        torch.testing.assert_close(here, part, rtol=1e-9, atol=1e-11)
        total = total + (part * own).sum()
    for a, b in zip(ours, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_what_asks_for_a_state_is_refused() -> None:
    q, k, v, g, beta = _inputs(DELTA, 1, 9)
    with pytest.raises(NotImplementedError, match="output_final_state"):
        segmented_leaf(delta)(_segments(1, 9, 4), q, k, v, g, beta, output_final_state=True)


@pytest.mark.parametrize("other", [linear, reversed_conv, lambda x, weight: x])
def test_only_causal_convolutions_of_channels_count(other: Any) -> None:
    assert segmented_convention(other) is None
    assert convention(conv) is None, "without segments it is traced"


def test_functions_of_other_packages_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    calls = []

    def convolution(x: Any, weight: Any, bias: Any = None, activation: Any = None) -> Any:
        calls.append("convolution")
        return conv(x, weight, bias, activation)

    def rule(
        query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
        output_final_state: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        calls.append("rule")
        return delta(query, key, value, g, beta, initial_state, output_final_state)

    def selective(
        u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
        delta_bias: Any = None, delta_softplus: bool = False, **more: Any,
    ) -> Any:  # fmt: skip
        calls.append("scan")
        return scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    assert segmented_convention(convolution) is segmented_convention(rule) is None
    assert not functions._is_overlooked(selective, "num_items_in_batch")
    assert calls == []


@pytest.mark.parametrize("kind", [SELECTIVE, CHUNKED, CONVOLUTION], ids=lambda k: k.name)
def test_calls_become_ops(kind: Any) -> None:
    call, inputs = segmented_leaf(FUNCTIONS[kind.name]), [t.float() for t in _inputs(kind, 2, 21)]
    given = OPTIONS.get(kind.name, {})
    segments = _segments(2, 21, 5, 6)
    graph = capture(lambda s, *t: call(s, *t, **given), segments, *inputs)
    [rule] = {r.name for r in PIPELINE} & set(rewritten(rewrite(graph)))
    assert rule == ("short_conv" if kind is CONVOLUTION else "selective_scan")
    torch.testing.assert_close(graph(segments, *inputs)[0], call(segments, *inputs, **given))


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_a_call_without_segments_is_another_node(kind: Any) -> None:
    if kind is not CONVOLUTION:
        assert leaf(FUNCTIONS[kind.name]) is not segmented_leaf(FUNCTIONS[kind.name])
    with pytest.raises(TypeError):
        segmented_leaf(linear)


def test_samples_begin_where_positions_do_not_count_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [5, 6, 9, 10, 2, 3], [0, 1, 2, 3, 4, 5]])
    expected = [[0, 0, 0, 3, 4, 4], [0, 0, 2, 2, 4, 4], [0] * 6]
    assert sample_starts(positions).tolist() == expected
