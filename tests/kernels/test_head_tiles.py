"""Products, memory and reads of the head op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fusewright.kernels import matmul
from fusewright.kernels.loss import head_strips, head_tiles
from fusewright.kernels.loss.head_plain import compute
from fusewright.kernels.loss.linear_cross_entropy import linear_cross_entropy
from fusewright.kernels.loss.linear_logprob import linear_logprob

from .test_head import BF16, EVERY, F32, labels_of, operands


class Record(TorchDispatchMode):
    """Note the ops that run, the rows that matmuls multiply, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.largest = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        if name in ("mm", "addmm", "addmm_"):
            self.rows.append(args[-2].shape[0])
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


# The op's bodies are called directly: a dispatch mode does not see inside opaque ops.


def run_forward(
    made: list[str], x: Tensor, w: Tensor, labels: Tensor, names: Any = ("logprob",),
    wanted: Any = (True, False, False),
) -> Any:  # fmt: skip
    terms = [float(n == m) for m in made for n in made]
    return compute(
        x.detach(), w.detach(), None, None, None, labels, None, list(names), made, terms, [], 3,
        -100, 0.7, 2.0, 1.5, [*wanted, False, False, False],
    )  # fmt: skip


def run_backward(x: Tensor, w: Tensor, labels: Tensor) -> Any:
    return compute(
        x.detach(), w.detach(), None, None, None, labels, torch.tensor(1.5), [],
        ["logprob", "entropy"], [], [torch.randn(len(x)), torch.randn(len(x))], 0, -100, 0.7, 2.0,
        1.0, [True, True, True, False, False, True],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_exist_only_in_tiles(monkeypatch, dtype):
    monkeypatch.setattr(head_tiles, "TILE_BYTES", 1 << 18)
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 1)
    monkeypatch.setattr(head_strips, "STRIP_ELEMENTS", 1 << 14)
    monkeypatch.setattr(matmul, "SLICE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(matmul, "LEAST", 16)
    x, w, _ = operands((1000, 16), 2000, dtype)
    given = x, w, labels_of(1000, 2000)
    with Record() as seen:
        run_forward(["logprob"], *given, wanted=(True, True, False))
        run_forward([], *given, names=EVERY)
        run_forward(["logprob", "entropy"], *given, names=("logprob", "entropy"))
        run_backward(*given)
    assert len(seen.rows) > 100
    assert seen.largest <= 1 << 18
    assert seen.largest < 1000 * 2000 * x.element_size() / 10


def test_a_tile_keeps_enough_rows_for_the_matmuls():
    assert head_tiles.row_tiles(1024, 49152 * 2) == [(0, 512), (512, 1024)]
    # past the usual size, within twice
    assert head_tiles.row_tiles(1024, 131072 * 2)[0] == (0, 512)
    assert head_tiles.row_tiles(500, 262144 * 4)[0] == (0, 125)
    assert head_tiles.row_tiles(5, 1 << 30) == [(i, i + 1) for i in range(5)]
    assert head_tiles.row_tiles(0, 1000) == []


def test_ignored_rows_are_never_multiplied():
    x, w, _ = operands((100, 16), 50, F32)
    labels = labels_of(100, 50)
    labels[20:] = -100
    with Record() as seen:
        run_forward(["logprob"], x, w, labels)
        run_forward(["logprob"], x, w, labels, wanted=(True, True, True))
        run_backward(x, w, labels)
    assert seen.rows == [20, 20, 20, 20, 50, 20, 20, 50]
    labels[:] = -100
    with Record() as seen:
        run_forward(["logprob"], x, w, labels, wanted=(True, True, True))
        run_backward(x, w, labels)
    assert seen.rows == []


@pytest.mark.parametrize(
    ("made", "wanted", "products"),
    [
        ([], (False, False, False), 1),
        (["logprob"], (True, False, False), 2),
        (["logprob"], (False, True, False), 2),
        (["logprob"], (False, False, True), 1),
        (["logprob"], (True, True, True), 3),
    ],
)
def test_only_needed_gradients_are_computed(made, wanted, products):
    x, w, _ = operands((10, 16), 50, F32)
    with Record() as seen:
        run_forward(made, x, w, labels_of(10, 50), wanted=wanted)
    assert len(seen.rows) == products


def products(call: Any) -> int:
    """The number of times that the head is multiplied, in opaque ops too."""
    x, w, _ = operands((10, 16), 50, F32)
    labels = labels_of(10, 50)
    with FlopCounterMode(display=False) as counter:
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


def test_a_trained_head_of_outputs_is_projected_once_more():
    def forward(x, w, labels):
        return linear_logprob(x, w, None, labels, ("logprob", "entropy"))

    assert products(forward) == 1
    assert products(lambda *t: sum(forward(*t)).sum().backward()) == 1 + 3
    assert products(lambda x, w, y: forward(x.detach(), w, y)[0].sum().backward()) == 1 + 2


@pytest.mark.parametrize(("trained", "expected"), [("", 1), ("x", 2), ("w", 2), ("x w", 3)])
def test_a_loss_is_multiplied_in_forward(trained, expected):
    def call(x, w, labels):
        x, w = (t if n in trained else t.detach() for n, t in (("x", x), ("w", w)))
        loss = linear_cross_entropy(x, w, None, labels)
        if trained:
            loss.backward()

    assert products(call) == expected


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprob])
def test_without_gradients_only_the_outputs_are_computed(function):
    def unrecorded(x, w, labels):
        with torch.no_grad():
            function(x, w, None, labels)

    assert products(unrecorded) == 1
    assert products(lambda x, w, y: function(x.detach(), w.detach(), None, y)) == 1


@pytest.mark.parametrize("is_loss", [True, False], ids=["loss", "logprob"])
def test_backward_multiplies_and_reads_nothing_back(is_loss):
    x, w, b = operands((10, 16), 50, F32)
    labels = labels_of(10, 50, 0.4)
    if is_loss:
        loss = linear_cross_entropy(x, w, b, labels)
    else:
        loss = linear_logprob(x, w.detach(), None, labels)[0].square().sum()
    with Record() as seen:
        loss.backward()
    assert not seen.names & {"mm", "addmm", "linear", "_local_scalar_dense", "nonzero"}
