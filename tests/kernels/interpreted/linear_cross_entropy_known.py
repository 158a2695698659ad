"""The loss's Triton twin where the host has an idea of how many rows count, right or wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.loss import linear_cross_entropy_triton as kernels
from fusewright.kernels.loss.linear_cross_entropy import OP, linear_cross_entropy
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity_of_draws

ROWS, VOCABULARY, HIDDEN = 24, 70, 12
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"softcap": 3.0, "label_smoothing": 0.1})


def _operands() -> list[Tensor]:
    x, w = torch.randn(ROWS, HIDDEN), torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5
    return [t.requires_grad_() for t in (x, w, torch.randn(VOCABULARY))]


def _labels(count: int) -> Tensor:
    """Some sets of labels, of which ``count`` count."""
    labels = torch.full((3, ROWS), -100)
    for own in labels:
        own[torch.randperm(ROWS)[:count]] = torch.randint(0, VOCABULARY, (count,))
    return labels


def _rows_of_the_library(guess: int, tile: int) -> list[int]:
    """Let the host expect that many; returns how many rows each of its products has."""
    rows: list[int] = []

    def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        rows.append(x.shape[0])
        return (
            torch.addmm(bias, x, weight.t(), out=out)
            if bias is not None
            else torch.mm(x, weight.t(), out=out)
        )

    kernels.project, kernels.expected = project, lambda *given: guess
    kernels.TILE_BYTES = kernels.LARGE_TILE_BYTES = tile * VOCABULARY * 4
    return rows


def check_any_guess_gives_the_loss() -> None:
    """None at all, too few, all that count, some more, and more than there are."""
    for count, guess, tile, of_the_library in (
        (15, 0, 8, []),
        (15, 7, 8, [7]),
        (15, 15, 8, [8, 7]),
        (15, 18, 64, [18]),
        (22, 21, 8, [8, 8, 8]),  # nearly all: all are multiplied
        (22, 99, 64, [24]),
        (0, 5, 64, [5]),
    ):
        for options, trained in ((OPTIONS[0], 3), (OPTIONS[1], 2), (OPTIONS[0], 1)):
            rows, labels = _rows_of_the_library(guess, tile), _labels(count)

            def over(call: Any, labels: Tensor = labels, options: Any = options) -> Any:
                def losses(*given: Tensor) -> Tensor:
                    x, w, bias = given if len(given) == 3 else (*given, None)
                    found = [call(x, w, bias, own, **options) for own in labels]
                    return torch.stack(found).nan_to_num(7.0)  # without labels it is nan

                return losses

            def draw(trained: int = trained) -> list[Tensor]:
                x, w, bias = _operands()
                return [x, w.detach()] if trained == 1 else [x, w, bias][:trained]

            if count:
                assert_parity_of_draws(over(linear_cross_entropy), over(OP.reference), draw)
            else:
                x, w = draw(1)
                assert not torch.autograd.grad(over(linear_cross_entropy)(x, w).sum(), x)[0].any()
            times = len(rows) // max(len(of_the_library), 1)  # some more draws, by luck
            assert rows == of_the_library * max(times, len(labels))


def check_rows_that_do_not_count_may_hold_anything() -> None:
    """They are multiplied, and their logits go into no sum."""
    _rows_of_the_library(ROWS, 64)
    x, w, _ = _operands()
    labels = _labels(10)[0]
    with torch.no_grad():
        x[labels == -100] = torch.inf
    loss = linear_cross_entropy(x, w, None, labels)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert not dx[labels == -100].any()
    assert dx.isfinite().all()


if __name__ == "__main__":
    torch.manual_seed(0)
    run(check_any_guess_gives_the_loss, check_rows_that_do_not_count_may_hold_anything)
