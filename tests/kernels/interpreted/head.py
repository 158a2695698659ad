"""The Triton kernels of the head op under the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusewright.kernels.loss import head_triton as kernels
from fusewright.kernels.loss.linear_cross_entropy import OP, linear_cross_entropy
from fusewright.kernels.loss.linear_logprob import linear_logprob, reference
from tests.kernels.interpreted import run
from tests.kernels.util import assert_parity_of_draws

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"softcap": 3.0, "logit_scale": 2.0},
    {"softcap": 30.0, "logit_scale": 0.3, "label_smoothing": 0.2},
)
FLOATS = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "picked", "topk_values")
NAMES = (("logprob",), ("entropy", "mean_logit"), ("sum_p2", "logsumexp"), ("picked",), FLOATS)
OUTPUTS: tuple[dict[str, Any], ...] = ({}, {"softcap": 4.0, "temperature": 0.7})
WHOLE = kernels.TILE_BYTES


def operands(n: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    x, w = torch.randn(n, hidden), torch.randn(vocabulary, hidden) * hidden**-0.5
    return [t.to(dtype).requires_grad_() for t in (x, w, torch.randn(vocabulary))]


def frozen(n: int, vocabulary: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows that require a gradient, and a head that does not."""
    x, w, _ = operands(n, vocabulary, hidden, dtype)
    return [x, w.detach()]


def labels_of(n: int, vocabulary: int, count: int) -> Tensor:
    """Labels (n,), of which ``count`` count."""
    labels = torch.full((n,), -100)
    labels[torch.randperm(n)[:count]] = torch.randint(0, vocabulary, (count,))
    return labels


def check_loss_of(draw: Callable[[], list[Tensor]], count: int, options: dict[str, Any]) -> None:
    """Parity of four losses at once: the error of a single number is a matter of luck."""
    n, vocabulary = (t.shape[0] for t in draw()[:2])
    labels = [labels_of(n, vocabulary, count) for _ in range(4)]

    def over(fn: Any) -> Any:
        def losses(x: Tensor, w: Tensor, b: Any = None, h: Any = None, lora_b: Any = None) -> Any:
            more = options | {"narrow": h, "lora_b": lora_b}
            return torch.stack([fn(x, w, b, y, **more) for y in labels])

        return losses

    assert_parity_of_draws(over(linear_cross_entropy), over(OP.reference), draw)


def check_outputs_of(
    sizes: tuple[int, int, int], dtype: torch.dtype, names: Any, options: Any, trained: bool,
    count: int = 12,
) -> None:  # fmt: skip
    labels = labels_of(*sizes[:2], min(count, sizes[0]))

    def draw() -> list[Tensor]:
        x, w, b = operands(*sizes, dtype)
        scale = torch.tensor(0.8, dtype=dtype)
        return [x, *(t.detach().requires_grad_(trained) for t in (w, b, scale))]

    def over(fn: Any) -> Any:
        return lambda x, w, b, s: fn(x, w, b, labels, names, 3, logit_scale=s, **options)

    assert_parity_of_draws(over(linear_logprob), over(reference), draw)


def check_losses() -> None:
    for dtype, options in itertools.product(DTYPES, LOSSES):
        sizes = 13, 140, 20, dtype
        check_loss_of(lambda sizes=sizes: operands(*sizes), 13, options)
        kernels.TILE_BYTES = 8 * 140 * dtype.itemsize  # tiles of 8 rows
        check_loss_of(lambda sizes=sizes: frozen(*sizes), 7, options)
        kernels.TILE_BYTES = WHOLE
    # several blocks of classes, and two of rows
    check_loss_of(lambda: operands(3, 4200, 8, DTYPES[0]), 3, LOSSES[-1])
    check_loss_of(lambda: operands(70, 90, 24, DTYPES[0]), 35, {})


def check_outputs() -> None:
    for trained, (i, names) in itertools.product((False, True), enumerate(NAMES)):
        kernels.TILE_BYTES = 8 * 140 * 4 if trained else WHOLE  # tiles of 8 rows
        check_outputs_of((21, 140, 20), DTYPES[0], names, OUTPUTS[(i + trained) % 2], trained)
    kernels.TILE_BYTES = WHOLE
    for half in DTYPES[1:]:
        check_outputs_of((21, 140, 20), half, NAMES[1], OUTPUTS[1], False)
        check_outputs_of((21, 140, 20), half, FLOATS, OUTPUTS[1], True)
    check_outputs_of((9, 4200, 8), DTYPES[0], FLOATS, OUTPUTS[1], True)


def check_adapters() -> None:
    for dtype in DTYPES:  # in fp32
        kernels.TILE_BYTES = 16 * 150 * dtype.itemsize

        def adapted(dtype: torch.dtype = dtype) -> list[Tensor]:
            x, w, b = operands(37, 150, 24, dtype)
            return [x, w.detach(), b, *operands(37, 150, 5, torch.float32)[:2]]

        check_loss_of(adapted, 18, {"softcap": 3.0})
    labels = labels_of(37, 150, 18)

    def over(fn: Any) -> Any:
        def call(x: Tensor, w: Tensor, h: Tensor, lora_b: Tensor) -> Any:
            return fn(x, w, None, labels, ("logprob", "entropy"), narrow=h, lora_b=lora_b)

        return call

    def draw() -> list[Tensor]:
        return [*frozen(37, 150, 24, torch.float32), *operands(37, 150, 5, torch.float32)[:2]]

    assert_parity_of_draws(over(linear_logprob), over(reference), draw)
    kernels.TILE_BYTES = WHOLE


def check_rows_without_classes() -> None:
    x, w, b = operands(6, 70, 24, torch.float32)
    none, strange = torch.full((6,), -100), torch.tensor([1, 2, 70, 3, 4, 5])
    loss = linear_cross_entropy(x, w, b, none)
    assert loss.isnan()
    assert all(not g.any() for g in torch.autograd.grad(loss, (x, w, b)))
    assert linear_cross_entropy(x, w, b, none, reduction="sum") == 0
    assert linear_cross_entropy(x, w, b, strange).isnan(), "a label that is no class goes unseen"
    every = (*FLOATS, "argmax", "topk_indices")
    found = linear_logprob(x, w, b, none, every, 2)
    assert all(not t.any() for t in found)
    total = sum(t.sum() for t in found[: len(FLOATS)])
    assert all(not g.any() for g in torch.autograd.grad(total, (x, w, b)))
    for t in linear_logprob(x, w, b, strange, ("logprob", "picked")):
        assert t.isnan().tolist() == [False, False, True, False, False, False]
    classes = linear_logprob(x, w, b, None, ("argmax", "topk_indices"), 2)
    expected = reference(x, w, b, None, ("argmax", "topk_indices"), 2)
    assert all(torch.equal(a, c) for a, c in zip(classes, expected, strict=True))


if __name__ == "__main__":
    torch.manual_seed(0)
    run(check_losses, check_outputs, check_adapters, check_rows_without_classes)
