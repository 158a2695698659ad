"""The Triton kernels of ``linear_logprob`` under the interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.loss import linear_logprob_triton as kernels
from fusewright.kernels.loss.linear_logprob import linear_logprob, reference
from tests.kernels.util import assert_parity_of_draws

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"softcap": 4.0, "temperature": 0.7})
FLOATS = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "topk_values")
NAMES = (("logprob",), ("entropy", "mean_logit"), ("sum_p2", "logsumexp"), FLOATS)


def operands(n: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    x, w = torch.randn(n, hidden), torch.randn(vocabulary, hidden) * hidden**-0.5
    return [t.to(dtype).requires_grad_() for t in (x, w, torch.randn(vocabulary))]


def check(
    sizes: tuple[int, int, int], dtype: torch.dtype, names: Any, options: Any, trained: bool
) -> None:
    n, vocabulary, _ = sizes
    labels = torch.randint(0, vocabulary, (n,))
    labels[torch.rand(n) < 0.4] = -100
    labels[1] = 3  # at least one row counts

    def draw() -> list[Tensor]:
        x, w, b = operands(*sizes, dtype)
        scale = torch.tensor(0.8, dtype=dtype)
        return [x, *(t.detach().requires_grad_(trained) for t in (w, b, scale))]

    def over(fn: Any) -> Any:
        return lambda x, w, b, s: fn(x, w, b, labels, names, 3, logit_scale=s, **options)

    assert_parity_of_draws(over(linear_logprob), over(reference), draw)


def main() -> None:
    torch.manual_seed(0)
    checks = 0
    whole = kernels.TILE_BYTES
    for trained, (i, names) in itertools.product((False, True), enumerate(NAMES)):
        kernels.TILE_BYTES = 8 * 140 * 4 if trained else whole  # tiles of 8 rows
        check((21, 140, 20), DTYPES[0], names, OPTIONS[(i + trained) % 2], trained)
        checks += 1
    kernels.TILE_BYTES = whole
    for half in DTYPES[1:]:
        check((21, 140, 20), half, NAMES[1], OPTIONS[1], False)
        check((21, 140, 20), half, FLOATS, OPTIONS[1], True)
        checks += 2
    check((9, 4200, 8), DTYPES[0], FLOATS, OPTIONS[1], True)  # more than one block of classes
    x, w, b = operands(6, 70, 24, torch.float32)
    none = torch.full((6,), -100)
    every = (*FLOATS, "argmax", "topk_indices")
    found = linear_logprob(x, w, b, none, every, 2)
    assert all(not t.any() for t in found)
    total = sum(t.sum() for t in found[: len(FLOATS)])
    assert all(not g.any() for g in torch.autograd.grad(total, (x, w, b)))
    strange = torch.tensor([1, 2, 70, 3, 4, 5])
    logprob = linear_logprob(x, w, b, strange)[0]
    assert logprob.isnan().tolist() == [False, False, True, False, False, False]
    classes = linear_logprob(x, w, b, None, ("argmax", "topk_indices"), 2)
    expected = reference(x, w, b, None, ("argmax", "topk_indices"), 2)
    assert all(torch.equal(a, c) for a, c in zip(classes, expected, strict=True))
    print(f"{checks + 6} checks passed")


if __name__ == "__main__":
    main()
