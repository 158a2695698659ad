"""What is wrong with a loss: it is compared with cross entropy by hand, and the plain model's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.tolerance import budget, unit
from .by_hand import token_losses
from .findings import AuditFinding
from .gradients import slack_of
from .reference import AuditStep, Batch


def of_model(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model computes itself."""
    outputs: Any = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss


def findings(
    step: AuditStep,
    exact: AuditStep,
    eager: AuditStep,
    batch: Batch,
    dtype: torch.dtype,
    factor: float | None,
) -> Iterator[AuditFinding]:
    """Whether the loss is the cross entropy, and what it is divided by.

    ``factor``: all gradients are that many times the plain model's; None: they are not.
    """
    found = None if exact.logits is None else token_losses(exact.logits, batch)
    wanted, by_hand, count, others = exact.loss, None, 0, {}
    if found is not None and bool(found[1].any()):
        losses, trained = found
        count, total = int(trained.sum()), float(losses.sum())
        items = batch.get("num_items_in_batch")
        by_hand = total / (count if items is None else float(items))
        of_rows = [
            float(row[on].mean()) for row, on in zip(losses, trained, strict=True) if on.any()
        ]
        others = {
            "their sum, not their mean": total,
            "their sum over all tokens, trained or not": total / losses.numel(),
            "the mean of the rows' means": sum(of_rows) / len(of_rows),
            "their sum over the rows": total / len(losses),
        }
        if items is not None:
            others["their mean, though num_items_in_batch is given"] = total / count
    if not wanted:
        for check in ("loss-value", "loss-scale"):
            yield AuditFinding(check, "skipped", "the plain model's loss is zero")
        return
    rounding = abs(eager.loss - wanted) / abs(wanted)
    # a sum in fp32 over all tokens
    summing = unit(torch.float32) * math.log2(max(2, count)) / 2
    allowed = budget(rounding, slack_of(dtype) + summing)
    off = abs(step.loss - wanted) / abs(wanted)
    figures = {
        "loss": step.loss, "by_hand": by_hand, "plain": exact.loss, "off": off, "allowed": allowed,
    }  # fmt: skip
    right = "" if by_hand is None else f", by hand {by_hand:.4f}"
    if by_hand is not None and not _near(wanted, by_hand, 1e-4):
        right += f" and {wanted - by_hand:.4f} that the plain model adds"
        if not _near(step.loss, by_hand, allowed):
            # the loss that is asked for: of a trainer, or with a router's
            others = {w: v for w, v in others.items() if not _near(v, by_hand, allowed)}
            words = next((w for w, v in others.items() if _near(wanted, v, 1e-4)), "")
            if words and off <= allowed:
                yield _scaled(step, count, words, by_hand, figures)
                yield AuditFinding("loss-value", "pass", f"{step.loss:.4f}", figures=figures)
                return
    if off <= allowed:
        yield AuditFinding("loss-value", "pass", f"{step.loss:.4f}{right}", figures=figures)
        if by_hand is None:
            yield AuditFinding("loss-scale", "skipped", "the batch has no labels (rows, tokens)")
        else:
            yield AuditFinding("loss-scale", "pass", f"over {count} tokens", figures=figures)
        return
    words = next((w for w, v in others.items() if _near(step.loss, v, allowed)), "")
    if by_hand is not None and _near(step.loss, by_hand, allowed):
        words, factor = "", None  # right but for what the plain model adds: a router's loss
    if not words and factor is not None and _near(step.loss, wanted * factor, 0.02):
        words = f"{step.loss / wanted:.3g}x their mean, and so are all gradients"
    if words:
        yield _scaled(step, count, words, wanted, figures)
        yield AuditFinding("loss-value", "skipped", "it is another multiple: see loss-scale")
        return
    yield AuditFinding(
        "loss-value", "fail",
        f"the loss is {step.loss:.4f}, the plain model's {wanted:.4f}{right} (a relative "
        f"difference of {off:.1e}, and rounding allows {allowed:.1e})", figures=figures,
    )  # fmt: skip
    yield AuditFinding("loss-scale", "skipped", "the loss is another: see loss-value")


def _near(a: float, b: float, relative: float) -> bool:
    return abs(a - b) <= relative * abs(b)


def _scaled(
    step: AuditStep, count: int, words: str, right: float, figures: dict[str, Any]
) -> AuditFinding:
    return AuditFinding(
        "loss-scale", "fail",
        f"the loss is {step.loss:.4f}: of the {count} tokens' losses, it is {words}; right is "
        f"{right:.4f}", figures=figures,
    )  # fmt: skip
