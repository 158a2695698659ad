"""The Triton kernels of ``linear_cross_entropy`` under the interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.loss import linear_cross_entropy_triton as kernels
from fusewright.kernels.loss.linear_cross_entropy import OP, linear_cross_entropy
from tests.kernels.util import assert_parity

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"softcap": 3.0, "logit_scale": 2.0},
    {"softcap": 30.0, "logit_scale": 0.3, "label_smoothing": 0.2},
)


def operands(n: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    x, w = torch.randn(n, hidden), torch.randn(vocabulary, hidden) * hidden**-0.5
    return [t.to(dtype).requires_grad_() for t in (x, w, torch.randn(vocabulary))]


def check(inputs: list[Tensor], ignored: float, options: dict[str, Any]) -> None:
    """Parity of four losses at once: the error of a single number is a matter of luck."""
    n, vocabulary = inputs[0].shape[0], inputs[1].shape[0]
    labels = torch.randint(0, vocabulary, (4, n))
    labels[torch.rand(4, n) < ignored] = -100
    labels[:, 1] = 3  # at least one row counts

    def over(fn):
        def losses(x, w, b=None, h=None, lora_b=None):
            each = [fn(x, w, b, y, **options, narrow=h, lora_b=lora_b) for y in labels]
            return torch.stack(each)

        return losses

    assert_parity(over(linear_cross_entropy), over(OP.reference), *inputs)


def main() -> None:
    torch.manual_seed(0)
    checks = 0
    whole = kernels.TILE_BYTES
    cases = [
        *itertools.product([(13, 140, 20)], DTYPES, OPTIONS),
        ((3, 4200, 8), torch.float32, OPTIONS[-1]),  # more than one block of classes
    ]
    for (n, vocabulary, hidden), dtype, options in cases:
        x, w, b = operands(n, vocabulary, hidden, dtype)
        check([x, w, b], 0.0, options)
        kernels.TILE_BYTES = 8 * vocabulary * x.element_size()  # tiles of 8 rows
        check([x, w.detach()], 0.5, options)
        kernels.TILE_BYTES = whole
        checks += 2
    x, w, b = operands(70, 90, 24, torch.float32)  # two blocks of rows, the second ignored
    check([x, w, b], 0.5, {})
    x, w, b = operands(6, 70, 24, torch.float32)
    none = torch.full((6,), -100)
    loss = linear_cross_entropy(x, w, b, none)
    assert loss.isnan()
    assert all(not g.any() for g in torch.autograd.grad(loss, (x, w, b)))
    assert linear_cross_entropy(x, w, b, none, reduction="sum") == 0
    strange = torch.tensor([1, 2, 70, 3, 4, 5])
    assert linear_cross_entropy(x, w, b, strange).isnan(), "a label that is no class goes unseen"
    for dtype in DTYPES:  # an adapter, in fp32
        x, w, b = operands(37, 150, 24, dtype)
        h, lora_b, _ = operands(37, 150, 5, torch.float32)
        kernels.TILE_BYTES = 16 * 150 * x.element_size()
        check([x, w.detach(), b, h, lora_b], 0.5, {"softcap": 3.0})
        kernels.TILE_BYTES = whole
    print(f"{checks + 8} checks passed")


if __name__ == "__main__":
    main()
