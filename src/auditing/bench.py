"""An audited model and the plain one side by side, on any part of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..memory.budget import gigabytes
from ..memory.meter import Meter
from .drift import Lean, drifts, lean
from .findings import AuditFinding
from .gradients import Fault, compare
from .reference import SEED, AuditStep, Batch, Loss, PlainModel, core_of, unwrapped
from .slices import SampleSpan, alone, first_rows, first_tokens, moved_on

MOVES = 15
"""So often tokens are moved for another look at the bias of gradients."""

DRAWS = 6
"""So often eager mode runs with other rounding errors before a gradient is called wrong."""


@dataclass
class Bench:
    """What runs a step of the audited model, and of the plain one.

    Attributes:
        model: the audited one.
        plain: the reference.
        loss: what is trained, from model and batch.
        autocast: the dtype that the audited model runs under, or None.
        moves: so often ``drift`` may look at other tokens.
        samples: of a pack whose samples see each other in the plain model, though they must not:
            the plain model gets them one by one.
    """

    model: nn.Module
    plain: PlainModel
    loss: Loss
    autocast: torch.dtype | None
    moves: int = MOVES
    samples: Sequence[SampleSpan] = ()

    def exact(self, batch: Batch) -> AuditStep:
        """A step of the reference: in fp32 if the model cannot be computed in fp64.

        Raises a ModelError if it does not fit, or if its loss is not finite even then.
        """
        meter = Meter(next(self.model.parameters()).device)
        capacity, needed = meter.capacity(), self.plain.nbytes(batch)
        free = needed if capacity is None else capacity - meter.used()
        if self.plain.is_wide and needed > free:
            self.plain.exact = torch.float32
            needed = self.plain.nbytes(batch)
        if needed > free:
            raise ModelError(
                f"the reference takes about {gigabytes(needed)} for these "
                f"{batch['input_ids'].numel()} tokens, and {gigabytes(free)} are free: audit "
                "fewer tokens, or train fewer weights"
            )
        step = None
        with contextlib.suppress(ModelError) if self.plain.is_wide else contextlib.nullcontext():
            step = self.plain.step(batch, self._plain_loss, "exact")
        if step is None or (not step.is_finite and self.plain.is_wide):
            # an operation with one dtype alone, or a mask whose least value is none in fp32
            self.plain.exact = torch.float32
            step = self.plain.step(batch, self._plain_loss, "exact")
        if not step.is_finite:
            raise ModelError("the plain model's own loss or gradients are not finite")
        return step

    def eager(self, batch: Batch, noise: int | None = None) -> AuditStep:
        """A step of the plain model in the audited one's dtypes."""
        return self.plain.step(batch, self._plain_loss, "own", noise)

    def _plain_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.samples:
            return self.loss(model, batch)
        parts = [alone(batch, sample) for sample in self.samples]
        items = batch.get("num_items_in_batch")
        if items is None:
            items = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        each = [self.loss(model, {**part, "num_items_in_batch": items}) for part in parts]
        return torch.stack(each).sum()

    def faults(
        self, batch: Batch, step: AuditStep, exact: AuditStep, eager: AuditStep
    ) -> tuple[list[Fault], dict[str, Any]]:
        """What is wrong with the gradients of ``step``, whatever the rounding errors are."""
        runs, draws = [eager.gradients], 0
        if self.plain.exact == self.plain.dtype:  # it is eager mode: its errors are unknown
            runs.append(self.eager(batch, noise=-1).gradients)
        faults, figures = compare(step.gradients, exact.gradients, runs, self.plain.dtype)
        while draws < DRAWS and any(f.may_be_rounding for f in faults):
            runs.append(self.eager(batch, noise=draws).gradients)
            draws += 1
            faults, figures = compare(step.gradients, exact.gradients, runs, self.plain.dtype)
        for by in (5, 11):
            # rounding may send a token to another expert, but not always the same tensor's
            if not any(f.may_be_rounding for f in faults):
                break
            if (other := moved_on(batch, by)) is not None:
                wrong = self.wrong(other)
                faults = [f for f in faults if f.name in wrong or not f.may_be_rounding]
        return faults, {**figures, "draws": draws}

    def drift(
        self, batch: Batch, step: AuditStep, exact: AuditStep, eager: AuditStep
    ) -> AuditFinding:
        """Whether the errors of gradients that are right one by one have a bias.

        A few tokens tell little: where their mean is no clear chance, more are looked at.
        """
        labels, leans, found = batch.get("labels"), [_leans(step, eager, exact)], []
        tokens = int((labels[..., 1:] != -100).sum()) if isinstance(labels, Tensor) else 1
        for by in range(3, 3 * self.moves + 1, 3):
            found = drifts(leans, self.plain.dtype, tokens * len(leans))
            unclear = [d for d in found if not d.kind and d.is_suspect]
            other = moved_on(batch, by) if unclear and not unclear[0].exceeded else None
            if other is None:
                break
            steps = run(self.model, other, self.loss, self.autocast), self.eager(other)
            leans.append(_leans(*steps, self.exact(other)))
        figures = {f"{d.kind or 'all'}, {d.direction}": d.bias for d in found}
        beyond = [d for d in found if d.exceeded]
        if beyond:
            worst = max(beyond, key=lambda d: abs(d.bias - d.eager) / d.allowed)
            return AuditFinding("gradient-drift", "fail", worst.text(), figures=figures)
        return AuditFinding("gradient-drift", "pass", "no bias beyond chance", figures=figures)

    def wrong(self, batch: Batch) -> set[str]:
        """The tensors whose gradients are wrong on ``batch``."""
        step = run(self.model, batch, self.loss, self.autocast)
        exact = self.exact(batch)
        runs = [self.eager(batch, noise=draw).gradients for draw in (None, 0, 1)]
        return {f.name for f in compare(step.gradients, exact.gradients, runs, self.plain.dtype)[0]}

    def by_rows(self, batch: Batch, faults: list[Fault]) -> tuple[list[Fault], str]:
        """Tell faults that spare the first row, or the first tokens, from others; and in words."""
        by_factor = [f for f in faults if f.check in ("gradient-scale", "gradient-sign")]
        # one factor for all is no matter of rows
        scales = [f.agreement.scale for f in by_factor if f.agreement]
        uniform = bool(scales) and max(scales) - min(scales) < 0.05 * abs(max(scales))
        if self.samples:
            return faults, ""
        values = {f.name for f in faults if f.check == "gradient-value"}
        values |= set() if uniform else {f.name for f in by_factor}
        if not values or uniform:
            return faults, ""
        where = ""
        alone = first_rows(batch, 1)
        if alone is not None and not values & self.wrong(alone):
            where = "the first row alone is right"
        rows = alone or batch
        if not where and (right := self._right_up_to(rows, values)):
            where = f"the first {right} tokens alone are right, more are not"
        if not where:
            return faults, ""
        return [replace(f, check="gradient-rows") if f.name in values else f for f in faults], where

    def _right_up_to(self, batch: Batch, values: set[str]) -> int:
        """The largest number of first tokens, of the powers of 2 from 8, that is right."""
        right, tokens = 0, 8
        while (part := first_tokens(batch, tokens)) is not None and not values & self.wrong(part):
            right, tokens = tokens, 2 * tokens
        return right


def _leans(step: AuditStep, eager: AuditStep, exact: AuditStep) -> dict[str, Lean]:
    found = {}
    for name, truth in exact.gradients.items():
        ours, plain = step.gradients.get(name), eager.gradients.get(name)
        if ours is not None and plain is not None and truth is not None:
            each = lean(ours, plain, truth)
            if each is not None:
                found[name] = each
    return found


def run(model: nn.Module, batch: Batch, loss: Loss, autocast: torch.dtype | None) -> AuditStep:
    """One forward and backward of the audited model."""
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(SEED)
    with torch.enable_grad():
        with cast_to(batch, autocast):
            value = loss(model, batch)
        value.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in trained(model)}
    for p in model.parameters():
        p.grad = None
    return AuditStep(float(value.detach()), gradients)


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trainable parameters, by their names without wrappers."""
    return ((name, p) for name, p in unwrapped(model).named_parameters() if p.requires_grad)


def cast_to(batch: Batch, dtype: torch.dtype | None) -> Any:
    """Autocast to ``dtype``, or as it is."""
    return torch.autocast(device_of(batch), dtype=dtype) if dtype else contextlib.nullcontext()


def autocast_of(model: nn.Module, device: str) -> torch.dtype | None:
    """The dtype that a call of ``model`` is autocast to: by the caller, or by accelerate inside."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    # by that accelerate undoes its own; an adapter may have been put around it
    if not any("_original_forward" in vars(m) for m in (unwrapped(model), core_of(model))):
        return None
    from accelerate.state import AcceleratorState, is_initialized

    precision = AcceleratorState().mixed_precision if is_initialized() else "no"
    return {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision)


def device_of(batch: Batch) -> str:
    """The type of the device of a batch."""
    return next((t.device.type for t in batch.values() if isinstance(t, Tensor)), "cpu")
