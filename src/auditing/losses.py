"""The loss, by hand: cross entropy in fp64 from the plain model's logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..rewrite.tolerance import FACTOR, unit
from .findings import Finding
from .reference import Batch, Step


def of_model(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes itself."""
    outputs: Any = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss


def token_losses(logits: Tensor, batch: Batch) -> Tensor | None:
    """Negative log likelihoods (rows, tokens) in fp64, nan where nothing is trained; None: unknown.

    A token's loss stands where it is predicted from.
    """
    labels = batch.get("shift_labels")
    if not isinstance(labels, Tensor):
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        labels = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if logits.shape[:-1] != labels.shape:
        return None
    labels = labels.to(logits.device)
    trained = labels != -100
    rows = logits[trained].double()
    wanted = rows.gather(1, labels[trained].unsqueeze(1)).squeeze(1)
    losses = torch.full(labels.shape, math.nan, dtype=torch.float64, device=logits.device)
    losses[trained] = rows.logsumexp(1) - wanted
    return losses


def findings(
    step: Step, exact: Step, eager: Step, batch: Batch, dtype: torch.dtype
) -> Iterator[Finding]:
    """Whether the loss is the cross entropy, and what it is divided by."""
    losses = None if exact.logits is None else token_losses(exact.logits, batch)
    if losses is None:
        yield Finding("loss-value", "skipped", "the batch has no labels (rows, tokens)")
        return
    trained = ~losses.isnan()
    count = int(trained.sum())
    if not count:
        yield Finding("loss-value", "skipped", "no token of the slice is trained")
        return
    total = float(losses[trained].sum())
    items = batch.get("num_items_in_batch")
    by_hand = total / (float(items) if items is not None else count)
    # what the plain model adds: a router's loss
    added = exact.loss - by_hand
    wanted = by_hand + added if abs(added) > 1e-4 * abs(by_hand) else by_hand
    off = abs(step.loss - wanted) / abs(wanted)
    rounding = abs(eager.loss - wanted) / abs(wanted)
    allowed = FACTOR * rounding + unit(dtype) + unit(torch.float32) * math.log2(max(2, count)) / 2
    figures = {
        "loss": step.loss, "by_hand": by_hand, "plain": exact.loss, "off": off, "allowed": allowed,
    }  # fmt: skip
    if off <= allowed:
        yield Finding(
            "loss-value", "pass", f"{step.loss:.4f}, by hand {by_hand:.4f}", (), "", figures
        )
        yield Finding("loss-scale", "pass", f"over {count} tokens", (), "", figures)
        return
    rows = losses.nanmean(1)
    others = {
        "their sum, not their mean": total,
        "their sum over all tokens, trained or not": total / losses.numel(),
        "the mean of the rows' means": float(rows[~rows.isnan()].mean()),
        "their sum over the rows": total / len(losses),
    }
    for words, value in others.items():
        if abs(step.loss - value) / abs(value) <= allowed:
            yield Finding(
                "loss-scale", "fail",
                f"the loss is {step.loss:.4f}: the {count} tokens' losses, but {words}; their mean "
                f"is {by_hand:.4f}",
                (), "", figures,
            )  # fmt: skip
            return
    yield Finding(
        "loss-value", "fail",
        f"the loss is {step.loss:.4f}, by hand {wanted:.4f} (off by {off:.1e}, and rounding allows "
        f"{allowed:.1e})",
        (), "", figures,
    )  # fmt: skip
