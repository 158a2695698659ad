"""``audit``: run the checks on a model and a batch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import DataError, ModelError
from . import force, losses, packs, trainable
from . import gradients as of_gradients
from . import tokens as of_tokens
from .bench import MOVES, Bench, autocast_of, device_of, run
from .checks import CHECKS
from .findings import Audit, AuditFinding
from .fresh import fresh_sources
from .reference import AuditStep, Batch, Loss, PlainModel, core_of
from .slices import samples_of, slice_of
from .state import only_dropout, unchanged


def audit(
    model: nn.Module,
    batch: Batch | Iterable[Batch],
    *,
    loss: Loss | None = None,
    tokenizer: Any = None,
    autocast: torch.dtype | None = None,
    expected: Sequence[str] = (),
    checkpointing: bool | None = None,
    tokens: int = 512,
) -> Audit:
    """Judge one training step of ``model``, whoever built it. The model is unchanged at the end.

    Args:
        model: as it is trained: plain, with adapters, quantized, patched, optimized, wrapped.
        batch: what it is called with, labels included; of a loader, the first batch is taken.
        loss: what the trainer computes, from model and batch; the model's own loss by default.
        tokenizer: to know which tokens begin and end an answer.
        autocast: the dtype that the step runs under; by default, that of the call of ``audit``.
        expected: regular expressions of the names that are meant to be trained; by default, what
            the adapters' configurations say.
        checkpointing: whether it was asked for; by default, what the model's flags say.
        tokens: about so many are compared with the plain model.

    Raises:
        DataError: there is no batch, or it is no mapping.
    """
    begun = time.perf_counter()
    whole = _first(batch)
    part, _ = slice_of(whole, tokens)
    part = _of_the_model(part)
    autocast = autocast or autocast_of(model, device_of(part))
    call = loss or losses.of_model
    with unchanged(model), awake(model, 0.05):
        dropout = force.dropout(model, part, call, autocast)
    with force.CountsCalls(model) as counted:
        result = audit_step(
            model, whole, loss=call, tokenizer=tokenizer, autocast=autocast, expected=expected,
            tokens=tokens,
        )  # fmt: skip
    result.add([dropout, force.checkpointing(model, counted, checkpointing)])
    result.findings.sort(key=lambda f: list(CHECKS).index(f.check))
    result.facts["seconds"] = time.perf_counter() - begun
    return result


def audit_step(
    model: nn.Module,
    batch: Batch,
    *,
    loss: Loss = losses.of_model,
    tokenizer: Any = None,
    autocast: torch.dtype | None = None,
    expected: Sequence[str] = (),
    tokens: int = 512,
    moves: int = MOVES,
    recompute: bool = False,
) -> Audit:
    """``audit`` without the questions that a loop answers by its own step: dropout, checkpointing.

    ``moves``: so often the tokens may be moved for another look at a bias of the gradients.
    ``recompute``: the plain model checkpoints its blocks.
    """
    part, facts = slice_of(batch, tokens)
    result = Audit(type(core_of(model)).__name__, facts=facts)
    result.add(of_tokens.findings(model, batch, tokenizer))
    part = _of_the_model(part)
    with unchanged(model), fresh_sources() as sources, awake(model, 0.002):
        with only_dropout(model):
            step = run(model, part, loss, autocast)
            try:
                bench: Bench | None = Bench(
                    model, PlainModel(model, sources, autocast, recompute), loss, autocast, moves
                )
            except ModelError as error:
                bench = None
                result.add(_without_reference(step, str(error)))
            if bench is not None:
                try:
                    _compare(result, bench, part, step, expected)
                except ModelError as error:
                    result.add(_without_reference(step, str(error)))
                facts["reference"] = str(bench.plain.exact).removeprefix("torch.")
                facts["reference_bytes"] = bench.plain.nbytes(part)
                facts["not_compared"] = bench.plain.left_out
        result.add([trainable.trainable_set(model, bench, expected)])
        facts["exchanged"] = sorted(set(sources.patched))
    return result


def _of_the_model(batch: Batch) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k not in of_tokens.NOT_OF_THE_MODEL}


def _compare(
    result: Audit, bench: Bench, batch: Batch, step: AuditStep, expected: Sequence[str]
) -> None:
    exact, eager = bench.exact(batch), bench.eager(batch)
    leaks = packs.look(bench, batch, exact, eager)
    result.add(packs.findings(leaks))
    if isinstance(leaks, packs.Leaks) and leaks.only_plain:
        bench.samples = samples_of(batch)
        exact, eager = bench.exact(batch), bench.eager(batch)
    faults, figures = bench.faults(batch, step, exact, eager)
    inert, of_inert = trainable.inert_adapters(bench, batch, step, eager)
    reached, of_experts = trainable.experts_reached(
        bench.model, step.gradients, exact.gradients, eager.gradients, expected
    )
    if of_experts and of_experts <= of_inert:
        reached = replace(reached, verdict="skipped", reason="their adapters: see adapter-reach")
    faults = trainable.renamed(faults, of_experts, "experts-reached")
    faults = trainable.renamed(faults, of_inert, "adapter-reach")
    faults, where = bench.by_rows(batch, faults)
    factor = of_gradients.common_factor(faults, int(figures["compared"]))
    of_loss = list(losses.findings(step, exact, eager, batch, bench.plain.dtype, factor))
    scaled = any(f.check == "loss-scale" and f.verdict == "fail" for f in of_loss)
    if factor is not None and scaled:  # they follow the loss
        faults = trainable.renamed(faults, {f.name for f in faults}, "loss-scale")
    found = list(of_gradients.findings(faults, figures, exact.order, where))
    if any(f.check == "adapter-reach" for f in faults):  # the plain model's are in its forward
        found, of_loss = (list(map(_behind_adapters, each)) for each in (found, of_loss))
    result.add(of_loss)
    result.add([trainable.adapter_reach(bench.model, inert), reached])
    result.add(found)
    if any(f.agreement for f in faults):
        result.add([AuditFinding("gradient-drift", "skipped", "single gradients are wrong")])
    else:
        result.add([bench.drift(batch, step, exact, eager)])


def _behind_adapters(finding: AuditFinding) -> AuditFinding:
    if finding.verdict != "fail" or finding.check not in ("gradient-value", "loss-value"):
        return finding
    reason = f"{finding.reason}; it may follow from adapter-reach: audit again when that is right"
    return replace(finding, verdict="skipped", reason=reason)


def _without_reference(step: AuditStep, reason: str) -> Iterator[AuditFinding]:
    """What gradients say by themselves."""
    for check in (
        *of_gradients.GRADIENT_CHECKS, "gradient-drift", "loss-value", "loss-scale",
        *packs.PACK_CHECKS, "adapter-reach", "experts-reached",
    ):  # fmt: skip
        if check not in ("gradient-missing", "gradient-finite"):
            yield AuditFinding(check, "skipped", reason)
    number = len(step.gradients)
    missing = tuple(n for n, g in step.gradients.items() if g is None)
    if missing and len(missing) < number:  # a part that this batch does not call, such as a tower
        text = f"{len(missing)} of {number} tensors have no gradient, and no plain model tells why"
        yield AuditFinding("gradient-missing", "skipped", text, missing)
    else:
        text = f"{number} tensors" if not missing else f"none of {number} tensors has a gradient"
        yield AuditFinding("gradient-missing", "fail" if missing else "pass", text, missing)
    wrong = tuple(
        n for n, g in step.gradients.items() if g is not None and not bool(torch.isfinite(g).all())
    )
    yield AuditFinding(
        "gradient-finite", "fail" if wrong else "pass",
        f"{len(wrong)} of {number} tensors have inf or nan" if wrong else f"{number} tensors",
        wrong,
    )  # fmt: skip


@contextlib.contextmanager
def awake(model: nn.Module, size: float) -> Iterator[None]:
    """Give adapters' matrices of zeros small values: else half the gradients are zero."""
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
            p.copy_(size * torch.randn(p.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in asleep.values():
                p.zero_()


def _first(batch: Batch | Iterable[Batch]) -> Batch:
    first = batch if isinstance(batch, Mapping) else next(iter(batch), None)
    if not isinstance(first, Mapping):
        raise DataError(
            f"audit: a batch is a mapping of names to tensors, and this is {type(first).__name__}"
        )
    return first
