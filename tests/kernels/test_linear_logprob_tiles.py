"""What ``linear_logprob`` multiplies, allocates and reads back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusewright.kernels.loss.linear_logprob import linear_logprob
from fusewright.kernels.loss.linear_logprob_tiles import compute, differentiate

from .test_linear_cross_entropy import BF16, F32, operands
from .test_linear_cross_entropy_tiles import Record, use_small_tiles
from .test_linear_logprob import EVERY, some_targets


def run_forward(made: list[str], *given: Any, names: tuple[str, ...] = ("logprob",)) -> Any:
    """The op's body, called directly: a dispatch mode does not see inside the opaque op."""
    x, w, labels = given
    return compute(
        x.detach(), w.detach(), None, labels, None, list(names), made, 3, -100, 0.7, 2.0, 1.5
    )


def run_backward(wanted: list[bool], *given: Any) -> Any:
    x, w, labels = given
    grads = [torch.randn(len(x)), torch.randn(len(x))]
    names = ["logprob", "entropy"]
    return differentiate(
        grads, None, x.detach(), w.detach(), None, labels, torch.tensor(1.5), names, -100, 0.7,
        2.0, 1.0, wanted,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_exist_only_in_tiles(monkeypatch, dtype):
    use_small_tiles(monkeypatch)
    x, w, _ = operands((1000, 16), 2000, dtype)
    given = x, w, some_targets((1000,), 2000, 0.0)
    with Record() as seen:
        run_forward([], *given, names=EVERY)
        run_forward(["logprob", "entropy"], *given, names=("logprob", "entropy"))
        run_backward([True, True, True, True], *given)
    assert len(seen.rows) > 100
    assert seen.largest <= 1 << 18
    assert seen.largest < 1000 * 2000 * x.element_size() / 10


def test_ignored_rows_are_never_multiplied():
    x, w, _ = operands((100, 16), 50, F32)
    labels = some_targets((100,), 50, 0.0)
    labels[20:] = -100
    with Record() as seen:
        run_forward(["logprob"], x, w, labels)
        run_backward([True, True, True, True], x, w, labels)
    assert seen.rows == [20, 20, 20, 20, 50]
    labels[:] = -100
    with Record() as seen:
        run_forward(["logprob"], x, w, labels)
        run_backward([True, True, True, True], x, w, labels)
    assert seen.rows == []


def products(call: Any) -> int:
    """How many times the head is multiplied, in opaque ops too."""
    x, w, _ = operands((10, 16), 50, F32)
    labels = some_targets((10,), 50, 0.0)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        call(x, w, labels)
    count, rest = divmod(counter.get_total_flops(), 2 * 10 * 16 * 50)
    assert rest == 0
    return count


@pytest.mark.parametrize(
    ("names", "deferred", "forward", "backward"),
    [
        (("logprob",), (), 2, 0),
        (("logprob", "argmax"), (), 2, 0),
        (("logprob", "entropy"), (), 3, 0),
        (("logprob", "entropy"), ("entropy",), 2, 0),
        (("logprob", "entropy", "logsumexp"), (), 1, 2),
        (("topk_values",), (), 1, 2),
    ],
)
def test_a_frozen_head_is_multiplied_in_forward(names, deferred, forward, backward):
    for more, expected in ((False, forward), (True, forward + backward)):

        def call(x, w, labels):
            out = linear_logprob(x, w.detach(), None, labels, names, 2, deferred=deferred)
            if more:  # noqa: B023  # called at once
                out[0].sum().backward()

        assert products(call) == expected


def test_a_trained_head_is_projected_once_more():
    def forward(x, w, labels):
        return linear_logprob(x, w, None, labels, ("logprob", "entropy"))

    assert products(forward) == 1
    assert products(lambda *t: sum(forward(*t)).sum().backward()) == 1 + 3
    assert products(lambda x, w, y: forward(x.detach(), w, y)[0].sum().backward()) == 1 + 2


def test_without_gradients_only_the_outputs_are_computed():
    def frozen(x, w, labels):
        linear_logprob(x.detach(), w.detach(), None, labels)

    def unrecorded(x, w, labels):
        with torch.no_grad():
            linear_logprob(x, w, None, labels)

    assert products(frozen) == products(unrecorded) == 1


def test_scaling_reads_nothing_back():
    x, w, _ = operands((10, 16), 50, F32)
    out = linear_logprob(x, w.detach(), None, some_targets((10,), 50, 0.4))[0]
    with Record() as seen:
        out.square().sum().backward()
    assert not seen.names & {"mm", "addmm", "linear", "_local_scalar_dense", "nonzero"}
