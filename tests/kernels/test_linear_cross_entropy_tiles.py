"""What ``linear_cross_entropy`` multiplies, allocates and reads back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels import matmul
from fusewright.kernels.loss import head_tiles
from fusewright.kernels.loss import linear_cross_entropy_tiles as tiles
from fusewright.kernels.loss.linear_cross_entropy import linear_cross_entropy

from .test_linear_cross_entropy import BF16, F32, operands, targets


class Record(TorchDispatchMode):
    """Notes the ops that run, the rows that matmuls multiply, and the largest tensor made."""

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


def run_tiles(x: Tensor, w: Tensor, labels: Tensor, wanted: list[bool]) -> None:
    """The op's body, called directly: a dispatch mode does not see inside the opaque op."""
    tiles.compute(x.detach(), w.detach(), None, labels, -100, 0.0, 0.0, 1.0, wanted)


def use_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 KiB, and products and strips of a few rows."""
    monkeypatch.setattr(head_tiles, "TILE_BYTES", 1 << 18)
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 1)
    monkeypatch.setattr(head_tiles, "STRIP_ELEMENTS", 1 << 14)
    monkeypatch.setattr(matmul, "SLICE_ELEMENTS", 1 << 14)
    monkeypatch.setattr(matmul, "LEAST", 16)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_exist_only_in_tiles(monkeypatch, dtype):
    use_small_tiles(monkeypatch)
    x, w, _ = operands((1000, 16), 2000, dtype)
    with Record() as seen:
        run_tiles(x, w, targets(1000, 2000)[0], [True, True, False])
    assert seen.largest <= 1 << 18
    assert seen.largest < 1000 * 2000 * x.element_size() / 10


def test_a_tile_keeps_enough_rows_for_the_matmuls():
    assert head_tiles.row_tiles(1024, 49152 * 2) == [(0, 512), (512, 1024)]
    assert head_tiles.row_tiles(1024, 131072 * 2)[0] == (
        0,
        512,
    )  # past the usual size, within twice
    assert head_tiles.row_tiles(500, 262144 * 4)[0] == (0, 125)
    assert head_tiles.row_tiles(5, 1 << 30) == [(i, i + 1) for i in range(5)]
    assert head_tiles.row_tiles(0, 1000) == []


def test_ignored_rows_are_never_multiplied():
    x, w, _ = operands((100, 16), 50, F32)
    labels = targets(100, 50)[0]
    labels[20:] = -100
    with Record() as seen:
        run_tiles(x, w, labels, [True, False, False])
    assert seen.rows == [20, 20]
    labels[:] = -100
    with Record() as seen:
        run_tiles(x, w, labels, [True, True, True])
    assert seen.rows == []


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        ([False, False, False], 1),
        ([True, False, False], 2),
        ([False, True, False], 2),
        ([False, False, True], 1),
        ([True, True, True], 3),
    ],
)
def test_only_needed_gradients_are_computed(wanted, products):
    x, w, _ = operands((10, 16), 50, F32)
    with Record() as seen:
        run_tiles(x, w, targets(10, 50)[0], wanted)
    assert len(seen.rows) == products


def test_without_gradients_only_the_loss_is_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "fusewright.kernels.loss.linear_cross_entropy_parts.compute",
        lambda *a: calls.append(a[8]) or tiles.compute(*a),
    )
    inputs = operands((10, 16), 50, F32)
    labels = targets(10, 50)[0]
    with torch.no_grad():
        linear_cross_entropy(*inputs, labels)
    frozen = [t.detach() for t in inputs]
    linear_cross_entropy(*frozen, labels)
    linear_cross_entropy(inputs[0], *frozen[1:], labels)
    assert calls == [[False] * 5, [False] * 5, [True, *[False] * 4]]


def test_backward_multiplies_and_reads_nothing_back():
    inputs = operands((10, 16), 50, F32)
    loss = linear_cross_entropy(*inputs, targets(10, 50, 0.4)[0])
    with Record() as seen:
        loss.backward()
    assert not seen.names & {"mm", "addmm", "linear", "_local_scalar_dense", "nonzero"}
