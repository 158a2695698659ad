"""The Triton kernels of ``linear_logprob`` under the interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.loss import head_tiles
from fusewright.kernels.loss import linear_cross_entropy_triton as shared
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
    sizes: tuple[int, int, int], dtype: torch.dtype, names: Any, options: Any, trained: bool,
    count: int | None = None,
) -> None:  # fmt: skip
    """Against the reference; ``count`` rows count, or about half of them."""
    n, vocabulary, _ = sizes
    labels = torch.randint(0, vocabulary, (n,))
    labels[torch.rand(n) < 0.4 if count is None else torch.randperm(n)[count:]] = -100
    if count is None:
        labels[1] = 3  # at least one row counts

    def draw() -> list[Tensor]:
        x, w, b = operands(*sizes, dtype)
        scale = torch.tensor(0.8, dtype=dtype)
        return [x, *(t.detach().requires_grad_(trained) for t in (w, b, scale))]

    def over(fn: Any) -> Any:
        return lambda x, w, b, s: fn(x, w, b, labels, names, 3, logit_scale=s, **options)

    assert_parity_of_draws(over(linear_logprob), over(reference), draw)


def check_what_the_host_expects() -> int:
    """None, too few, all that count, some more, nearly all, and more rows than there are."""
    own, sizes = shared.expected, (shared.TILE_BYTES, shared.LARGE_TILE_BYTES)
    rows: list[int] = []

    def project(x: Tensor, *given: Any) -> Tensor:
        rows.append(x.shape[0])
        return head_tiles.project(x, *given)

    kernels.project = project
    shared.TILE_BYTES = shared.LARGE_TILE_BYTES = 8 * 140 * 4  # tiles of 8 rows
    guesses = ((13, 0, []), (13, 6, [6]), (13, 13, [8, 5]), (13, 16, [8, 8]), (20, 19, [8, 8, 5]))
    for (count, guess, of_the_library), trained in itertools.product(guesses, (False, True)):
        shared.expected = lambda *given, guess=guess: guess
        rows.clear()
        check((21, 140, 20), DTYPES[0], FLOATS, OPTIONS[trained], trained, count)
        assert rows[: len(of_the_library)] == of_the_library, (guess, rows)
        assert of_the_library or not rows
    shared.expected = lambda *given: 21
    x, w, _ = operands(21, 140, 20, torch.float32)
    labels = torch.randint(0, 140, (21,))
    labels[5:15] = -100
    with torch.no_grad():
        x[5:15] = torch.inf  # rows that do not count may hold anything
    found = linear_logprob(x, w, None, labels, FLOATS, 2)
    (dx,) = torch.autograd.grad(sum(t.sum() for t in found), x)
    assert dx.isfinite().all()
    assert not dx[5:15].any()
    shared.expected, kernels.project = own, head_tiles.project
    shared.TILE_BYTES, shared.LARGE_TILE_BYTES = sizes
    return 2 * len(guesses) + 1


def main() -> None:
    torch.manual_seed(0)
    checks = check_what_the_host_expects()
    whole = shared.TILE_BYTES
    for trained, (i, names) in itertools.product((False, True), enumerate(NAMES)):
        shared.TILE_BYTES = 8 * 140 * 4 if trained else whole  # tiles of 8 rows
        check((21, 140, 20), DTYPES[0], names, OPTIONS[(i + trained) % 2], trained)
        checks += 1
    shared.TILE_BYTES = whole
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
