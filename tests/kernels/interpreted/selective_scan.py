"""The selective scan's Triton kernels under the interpreter."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fusewright.kernels.op import starts_of
from fusewright.kernels.scan.selective_scan import OP
from tests.kernels.test_selective_scan import draw
from tests.kernels.util import assert_parity_of, assert_parity_over

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def _frozen() -> Sequence[Tensor | None]:
    """Gradients of two inputs alone."""
    inputs = draw(1, 4, 2, 18, FP32)
    return [t if t is None or i < 2 else t.requires_grad_(False) for i, t in enumerate(inputs)]


def main() -> None:
    checks = 0
    torch.manual_seed(0)
    # one chunk and a part, whole chunks, fewer steps than one chunk; odd channels and states
    for dtype, size, given in (
        (FP32, (2, 37, 4, 19), (True, True, True)),
        (FP32, (1, 40, 3, 32), (False, True, False)),
        (BF16, (2, 5, 4, 19), (True, True, True)),
        (FP16, (1, 9, 2, 5), (True, False, True)),
        (FP32, (2, 64, 2, 1), (False, False, False)),
    ):
        for softplus in (True, False):
            inputs = draw(*size, dtype, *given)
            assert_parity_of(OP, inputs, softplus)
            checks += 1
    for length, places in ((18, (1, 16)), (37, (3, 4, 15, 31)), (33, (32,))):
        begins = torch.zeros(2, length, dtype=torch.bool)
        begins[1, list(places)] = True
        make = functools.partial(draw, 2, 37, 4, length, FP32)
        assert_parity_over(OP, make, True, starts_of(begins))
        checks += 1
    assert_parity_over(OP, _frozen, True)
    print(f"{checks + 1} checks passed")


if __name__ == "__main__":
    main()
