"""The Triton kernels of state-space duality under the interpreter."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fusewright.kernels.op import starts_of
from fusewright.kernels.scan.ssd import OP, ssd
from tests.kernels.interpreted import run
from tests.kernels.test_ssd import draw
from tests.kernels.util import assert_parity_over

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check_parity() -> None:
    """Parts of a chunk and several; odd sizes, wider than a tile; heads that share B and C."""
    torch.manual_seed(0)
    for dtype, size, given in (
        (FP32, (1, 131, 8, 2, 5, 19), (True, True)),
        (FP16, (1, 70, 3, 1, 67, 35), (True, False)),
        (FP32, (1, 64, 8, 2, 16, 33), (False, True)),
        (FP16, (2, 9, 9, 1, 8, 16), (False, False)),
        (BF16, (1, 70, 3, 1, 19, 35), (True, True)),
        (FP32, (3, 3, 18, 2, 3, 5), (True, True)),
        (FP32, (1, 64, 2, 1, 5, 4), (True, True)),  # A's gradient has two numbers
    ):
        for softplus in (True, False):
            assert_parity_over(OP, functools.partial(draw, size, dtype, *given), softplus)


def check_clamped_steps() -> None:
    torch.manual_seed(0)
    assert_parity_over(OP, lambda: draw((2, 70, 6, 2, 8, 8), FP32), True, (0.7, 1.2))


def check_frozen_inputs() -> None:
    torch.manual_seed(0)
    for trainable in range(7):

        def make(trainable: int = trainable) -> list[Any]:
            inputs = draw((1, 70, 4, 1, 4, 6), FP32)
            for i, t in enumerate(inputs):
                t.requires_grad_(i == trainable)
            return inputs

        assert_parity_over(OP, make, True)


def check_layouts() -> None:
    """Time last in memory, and an upstream gradient that is one number."""
    torch.manual_seed(0)

    def make() -> list[Any]:
        inputs = [t.detach() for t in draw((2, 70, 4, 2, 5, 6), FP32)]
        for i in (0, 1, 3, 4):
            inputs[i] = inputs[i].transpose(1, -1).contiguous().transpose(1, -1)
        return [t.requires_grad_() for t in inputs]

    assert_parity_over(OP, make, True)
    ssd(*make(), True).sum().backward()


def check_segments() -> None:
    """Beginnings within chunks, at their ends, none in a chunk, and segments of one position."""
    torch.manual_seed(0)
    for length, places in ((70, (3, 64)), (131, (1, 2, 60)), (130, (63, 127, 129)), (9, (4,))):
        begins = torch.zeros(1, length, dtype=torch.bool)
        begins[:, list(places)] = True
        options = True, (0.0, float("inf")), starts_of(begins)
        assert_parity_over(OP, lambda n=length: draw((1, n, 4, 2, 5, 6), FP32), *options)


def check_steep_decays() -> None:
    inputs = draw((1, 100, 4, 2, 4, 4), FP32)
    inputs[2] = (inputs[2].detach() * 1e4).requires_grad_()
    out = ssd(*inputs, True)
    grads = torch.autograd.grad(out.square().sum(), inputs)
    assert all(bool(torch.isfinite(t).all()) for t in (out, *grads))


def check_library_ops_keep_their_contract() -> None:
    inputs = [t.detach() for t in draw((2, 9, 4, 2, 4, 5), FP16)]
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.fusewright
    torch.library.opcheck(
        ops.ssd_triton_forward.default, (*inputs, True, 0.0, 9.0, None), test_utils=tests
    )
    for needs in ([True] * 7, [True, False] * 3 + [True]):
        given = (torch.randn(inputs[0].shape), *inputs, True, 0.0, 9.0, None, needs)
        torch.library.opcheck(ops.ssd_triton_backward.default, given, test_utils=tests)


if __name__ == "__main__":
    run(
        check_parity,
        check_clamped_steps,
        check_frozen_inputs,
        check_layouts,
        check_segments,
        check_steep_decays,
        check_library_ops_keep_their_contract,
    )
