"""The kernels of a head under the interpreter where all logits are near their bound.

There the slope of the cap is a difference of nearly equal numbers, in which each rounding counts.
In fp16 so small gradients leave the range.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.loss import linear_cross_entropy as loss
from fusewright.kernels.loss import linear_logprob as logprob
from tests.kernels.util import assert_parity, assert_parity_of_draws

FLOATS = ("logprob", "entropy", "topk_values")


def operands(dtype: torch.dtype) -> list[Tensor]:
    x, w = 0.2 * torch.randn(33, 20), torch.randn(140, 20) * 20**-0.5
    b = (torch.randint(0, 2, (140,)) * 2 - 1) * (6 + torch.rand(140))
    return [t.to(dtype).requires_grad_() for t in (x, w, b)]


def check_loss(dtype: torch.dtype) -> None:
    """Parity of four losses at once: the error of a single number is a matter of luck."""
    labels = torch.randint(0, 140, (4, 33))

    def over(fn: Any) -> Any:
        return lambda x, w, b: torch.stack([fn(x, w, b, y, softcap=3.0) for y in labels])

    assert_parity(over(loss.linear_cross_entropy), over(loss.reference), *operands(dtype))


def check_logprob(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 140, (33,))

    def over(fn: Any) -> Any:
        return lambda x, w, b: fn(x, w, b, labels, FLOATS, 3, softcap=3.0)

    assert_parity_of_draws(
        over(logprob.linear_logprob), over(logprob.reference), lambda: operands(dtype)
    )


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        check_loss(dtype)
        check_logprob(dtype)
    print("4 checks passed")


if __name__ == "__main__":
    main()
