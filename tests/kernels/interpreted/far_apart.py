"""Elements that 32-bit offsets do not reach, in files without content: the bits of near ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from triton.runtime.interpreter import GridExecutor

from fusewright.kernels.attention import rope_triton
from fusewright.kernels.linear import lora_linear_triton
from fusewright.kernels.mlp import glu_triton
from fusewright.kernels.norms import layer_norm_triton, rms_norm_triton
from tests.kernels.interpreted import run

BF16 = torch.bfloat16
FAR = (1 << 30) + 64
"""Elements from row to row: the third is out of reach of 31 bits."""


def _spread(x: Tensor, *strides: int) -> Tensor:
    size = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    with tempfile.NamedTemporaryFile(suffix=".sparse") as file:
        file.truncate(size * x.itemsize)
        base = torch.from_file(file.name, shared=True, size=size, dtype=x.dtype)
    return base.as_strided(x.shape, strides).copy_(x)


def _assert_equal(
    launch: Callable[[Tensor], Sequence[Tensor]], near: Tensor, *strides: int
) -> None:
    made = (launch(x) for x in (near, _spread(near, *strides)))
    for ours, expected in zip(*made, strict=True):
        assert torch.equal(ours, expected)


def check_norms() -> None:
    x, w = torch.randn(4, 64, dtype=BF16), torch.randn(64, dtype=BF16)
    _, rstd = rms_norm_triton.forward(x, w, 1e-6, 0.0, False)
    _assert_equal(lambda x: rms_norm_triton.forward(x, w, 1e-6, 0.0, False), x, FAR, 1)
    _assert_equal(
        lambda x: rms_norm_triton.backward(x, x, w, rstd, None, 0.0, False, True, True), x, FAR, 1
    )
    _assert_equal(lambda x: layer_norm_triton.forward(x, w, w, 1e-6), x, FAR, 1)


def check_units() -> None:
    x = torch.randn(4, 64, dtype=BF16)
    _assert_equal(lambda y: [glu_triton.forward(y, x, "silu")], x, FAR, 1)
    q, c = torch.randn(1, 2, 4, 16, dtype=BF16), torch.randn(1, 1, 4, 16, dtype=BF16)
    _assert_equal(
        lambda q: rope_triton.rotate([q], c, c, 16, "halves", False, BF16), q, 4 * FAR, 16, FAR, 1
    )


def check_low_rank() -> None:
    base, left, right = torch.randn(4, 64, dtype=BF16), torch.randn(4, 16), torch.randn(16, 64)
    _assert_equal(lambda t: [lora_linear_triton.rank_update(t, left, right)], base, FAR, 1)
    wide, narrow = torch.randn(80, 64, dtype=BF16), torch.randn(64, 16)
    far = (1 << 25) + 64, 1
    _assert_equal(lambda t: [lora_linear_triton.wide_product(t, narrow, 1.0, False)], wide, *far)


if __name__ == "__main__":
    torch.manual_seed(0)
    # tensors are on the CPU already: nothing is to be copied back, file by file
    GridExecutor._restore_args_dev = lambda *_: None
    run(check_norms, check_units, check_low_rank)
