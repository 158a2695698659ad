"""The kernels of the head at bounds: of the logits, and of the rows that the host expects."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fusewright.kernels.loss import head_tiles
from fusewright.kernels.loss import head_triton as kernels
from fusewright.kernels.loss.linear_cross_entropy import OP, linear_cross_entropy
from fusewright.kernels.loss.linear_logprob import linear_logprob, reference
from tests.kernels.interpreted import run
from tests.kernels.interpreted.head import FLOATS, check_outputs_of, labels_of, operands
from tests.kernels.util import assert_parity_of_draws

ROWS, VOCABULARY, HIDDEN = 24, 70, 12
F32 = torch.float32


def check_logits_near_their_bound() -> None:
    """There the slope of the cap is a difference of nearly equal numbers.

    In fp16 so small gradients leave the range.
    """
    names = ("logprob", "entropy", "topk_values")
    labels = [labels_of(33, 140, 33) for _ in range(4)]
    for dtype in (F32, torch.bfloat16):

        def draw(dtype: torch.dtype = dtype) -> list[Tensor]:
            x, w, _ = operands(33, 140, 20, F32)
            b = (torch.randint(0, 2, (140,)) * 2 - 1) * (6 + torch.rand(140))
            return [t.detach().to(dtype).requires_grad_() for t in (0.2 * x, w, b)]

        def losses(fn: Any) -> Any:
            return lambda x, w, b: torch.stack([fn(x, w, b, y, softcap=3.0) for y in labels])

        def outputs(fn: Any) -> Any:
            return lambda x, w, b: fn(x, w, b, labels[0], names, 3, softcap=3.0)

        assert_parity_of_draws(losses(linear_cross_entropy), losses(OP.reference), draw)
        assert_parity_of_draws(outputs(linear_logprob), outputs(reference), draw)


@contextmanager
def _rows_of_the_library(guess: int, tile: int, vocabulary: int) -> Iterator[list[int]]:
    """Let the host expect that many; yields the rows of each of the library's products."""
    rows: list[int] = []

    def project(x: Tensor, *given: Any) -> Tensor:
        rows.append(x.shape[0])
        return head_tiles.project(x, *given)

    size = tile * vocabulary * 4
    changes = {"project": project, "expected": lambda *given: guess}
    with mock.patch.multiple(kernels, TILE_BYTES=size, LARGE_TILE_BYTES=size, **changes):
        yield rows


def check_any_guess_gives_the_loss() -> None:
    """None at all, too few, all that count, some more, and more than there are."""
    guesses = (
        (15, 0, 8, []),
        (15, 7, 8, [7]),
        (15, 15, 8, [8, 7]),
        (15, 18, 64, [18]),
        (22, 21, 8, [8, 8, 8]),  # nearly all: all are multiplied
        (22, 99, 64, [24]),
    )
    ways = (({}, 3), ({"softcap": 3.0, "label_smoothing": 0.1}, 2), ({}, 1))
    for (count, guess, tile, by_library), (options, trained) in itertools.product(guesses, ways):
        labels = [labels_of(ROWS, VOCABULARY, count) for _ in range(3)]

        def over(fn: Any, labels: Any = labels, options: Any = options) -> Any:
            def losses(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
                return torch.stack([fn(x, w, b, own, **options) for own in labels])

            return losses

        def draw(trained: int = trained) -> Sequence[Tensor]:
            x, w, b = operands(ROWS, VOCABULARY, HIDDEN, F32)
            return [x, w.detach()] if trained == 1 else [x, w, b][:trained]

        with _rows_of_the_library(guess, tile, VOCABULARY) as rows:
            assert_parity_of_draws(over(linear_cross_entropy), over(OP.reference), draw)
        times = len(rows) // max(len(by_library), 1)  # some more draws, by luck
        assert rows == by_library * max(times, len(labels))


def check_any_guess_gives_the_outputs() -> None:
    guesses = ((13, 0, []), (13, 6, [6]), (13, 13, [8, 5]), (13, 16, [8, 8]), (20, 19, [8, 8, 5]))
    for (count, guess, by_library), trained in itertools.product(guesses, (False, True)):
        options = {"softcap": 4.0, "temperature": 0.7} if trained else {}
        with _rows_of_the_library(guess, 8, 140) as rows:
            check_outputs_of((21, 140, 20), F32, FLOATS, options, trained, count)
        assert rows[: len(by_library)] == by_library, (guess, rows)
        assert by_library or not rows


def check_rows_that_do_not_count_may_hold_anything() -> None:
    """They are multiplied, and their logits go into no sum."""
    x, w, _ = operands(ROWS, VOCABULARY, HIDDEN, F32)
    labels = labels_of(ROWS, VOCABULARY, 10)
    with torch.no_grad():
        x[labels == -100] = torch.inf
    with _rows_of_the_library(ROWS, 64, VOCABULARY):
        loss = linear_cross_entropy(x, w, None, labels)
        assert loss.isfinite()
        outputs = linear_logprob(x, w, None, labels, FLOATS, 2)
        for total in (loss, sum(t.sum() for t in outputs)):
            (dx,) = torch.autograd.grad(total, x)
            assert not dx[labels == -100].any()
            assert dx.isfinite().all()
        none = torch.full_like(labels, -100)
        (dx,) = torch.autograd.grad(linear_cross_entropy(x, w.detach(), None, none), x)
        assert not dx.any()


if __name__ == "__main__":
    torch.manual_seed(0)
    run(
        check_logits_near_their_bound,
        check_any_guess_gives_the_loss,
        check_any_guess_gives_the_outputs,
        check_rows_that_do_not_count_may_hold_anything,
    )
