"""``audit``: run the checks on a model and a batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from . import gradients as of_gradients
from . import losses
from .bench import Bench, run
from .findings import Audit, Finding
from .fresh import fresh_sources
from .reference import Batch, Loss, PlainModel, Step, core_of
from .slices import slice_of
from .state import unchanged, without_dropout


def audit(
    model: nn.Module,
    batch: Batch | Iterable[Batch],
    *,
    loss: Loss | None = None,
    tokenizer: Any = None,
    autocast: torch.dtype | None = None,
    tokens: int = 512,
) -> Audit:
    """Judge one training step of ``model``, whoever built it. The model is unchanged at the end.

    Args:
        model: as it is trained: plain, with adapters, quantized, patched, optimized, wrapped.
        batch: what it is called with, labels included; of a loader, the first batch is taken.
        loss: what the trainer computes, from model and batch; the model's own loss by default.
        tokenizer: to know which tokens end an answer.
        autocast: the dtype that the step runs under; by default, that of the call of ``audit``.
        tokens: about so many are compared with the plain model.
    """
    begun = time.perf_counter()
    taken, facts = slice_of(_first(batch), tokens)
    result = Audit(type(core_of(model)).__name__, facts=facts)
    autocast = autocast or _autocast_of(taken)
    call = loss or losses.of_model
    with unchanged(model), fresh_sources() as sources, without_dropout(model), awake(model):
        step = run(model, taken, call, autocast)
        result.facts["audited_seconds"] = time.perf_counter() - begun
        try:
            plain = PlainModel(model, sources, autocast)
        except ModelError as error:
            result.add(_without_reference(step, str(error)))
        else:
            _compare(result, Bench(model, plain, call, autocast), taken, step)
            result.facts["reference"] = str(plain.exact).removeprefix("torch.")
            result.facts["not_compared"] = plain.left_out
        result.facts["exchanged"] = sorted(set(sources.patched))
    result.facts["seconds"] = time.perf_counter() - begun
    return result


def _compare(result: Audit, bench: Bench, batch: Batch, step: Step) -> None:
    exact, eager = bench.exact(batch), bench.eager(batch)
    faults, figures = bench.faults(batch, step, exact, eager)
    faults, where = bench.by_rows(batch, faults)
    result.add(of_gradients.findings(faults, figures, exact.order, where))
    result.add(losses.findings(step, exact, eager, batch, bench.plain.dtype))


def _without_reference(step: Step, reason: str) -> Iterator[Finding]:
    """What gradients say by themselves."""
    for check in (*of_gradients.GRADIENT_CHECKS, "loss-value", "loss-scale"):
        if check not in ("gradient-missing", "gradient-finite"):
            yield Finding(check, "skipped", reason)
    number = len(step.gradients)
    missing = tuple(n for n, g in step.gradients.items() if g is None)
    yield Finding(
        "gradient-missing", "fail" if missing else "pass",
        f"{len(missing)} of {number} tensors have no gradient" if missing else f"{number} tensors",
        missing,
    )  # fmt: skip
    wrong = tuple(
        n for n, g in step.gradients.items() if g is not None and not bool(torch.isfinite(g).all())
    )
    yield Finding(
        "gradient-finite", "fail" if wrong else "pass",
        f"{len(wrong)} of {number} tensors have inf or nan" if wrong else f"{number} tensors",
        wrong,
    )  # fmt: skip


@contextlib.contextmanager
def awake(model: nn.Module) -> Iterator[None]:
    """Give adapters' matrices that are all zeros small values: else half the gradients are zero."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    asleep: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for p in module.parameters():
                if p.requires_grad and p.ndim > 1 and p.numel() and not bool(p.any()):
                    asleep[id(p)] = p
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in asleep.values():
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in asleep.values():
                p.zero_()


def _first(batch: Batch | Iterable[Batch]) -> Batch:
    if isinstance(batch, Mapping):
        return batch
    return next(iter(batch))


def _autocast_of(batch: Batch) -> torch.dtype | None:
    device = next((t.device.type for t in batch.values() if isinstance(t, Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
