"""``watch``: audit somebody's training loop at its first step and at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..compiler.pipeline import planner_of
from ..memory.budget import gigabytes
from ..memory.host_heap import large_blocks_mapped
from ..memory.meter import Meter
from ..sharding import collectives_of, has_peers, in_zero3
from .audit import audit_step
from .bench import autocast_of
from .checks import CHECKS
from .findings import Audit, AuditFinding
from .force import CountsCalls, checkpointing
from .in_force import Dropout, Rates
from .micro_batches import Average, MicroBatches, judge_logged
from .movement import Movement
from .reference import core_of, dtypes_of, step_bytes, unwrapped
from .slices import rows_of_one_sample, slice_of

OF_THE_LOOP = (
    "accumulation-scale", "loss-scale", "dropout", "checkpointing", "warmup", "weights-moved",
)  # fmt: skip
"""The questions that need a loop; ``audit`` answers the others from a model and a batch."""


class StepWatch:
    """Sees the steps of a training loop, and changes nothing of what they compute.

    The first optimizer step is looked at closely: up to two of its micro-batches are run again, and
    ``audit`` runs on a slice of its first one. After that only learning rates are noted. With
    several processes, all of them must have one: at the first step and at the end they combine what
    they found, by a collective each.

    Attributes:
        audit: what was found by now.
        batches: those of the first step; None where they cannot be seen, or are no longer.
        has_gradients: whether ``.grad`` has the gradients before a step of the optimizer; not so
            where an engine such as DeepSpeed keeps them.
        exempt: why frozen weights may change, as where adapters are merged while training; empty:
            they may not.
        no_dropout: whether the trainer was asked to switch dropout off.
        checkpointing: whether gradient checkpointing was asked for; None: by the model's flags.
        packing: whether packing was asked for.
        unasked: questions whose answer is meant to be no, each with the reason.
    """

    exempt = ""
    no_dropout = False
    checkpointing: bool | None = None
    packing = False

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        scheduler: Any = None,
        *,
        tokenizer: Any = None,
        average: Average = "tokens",
        unseen: str = "",
        objective: str = "",
        loss_of: Callable[[dict[str, Any]], Tensor] | None = None,
        expected_rates: Callable[[int], tuple[Sequence[float] | None, str]] | None = None,
        warmup_steps: int = 0,
        first_step: int = 0,
    ) -> None:
        begun = time.perf_counter()
        self.model, self.tokenizer = model, tokenizer
        self.inner = unwrapped(model)
        self.audit = Audit(type(core_of(model)).__name__)
        self.steps = 0
        self.unasked: dict[str, str] = {}
        self._expected_rates, self._warmup = expected_rates, warmup_steps
        self.has_gradients = not any(map(in_zero3, self.inner.parameters()))
        self._movement = Movement(self.inner, optimizers)
        self._rates = Rates(optimizers, scheduler, first_step)
        self._optimizers = optimizers
        self._dropout: Dropout | None = None
        self._batch: dict[str, Any] | None = None
        self._first_tokens: list[int] = []
        self._step_tokens = 0
        self._autocast: torch.dtype | None = None
        self._expected_loss: float | None = None
        self._moved = False
        self._unseen = unseen
        self.batches = None if unseen else MicroBatches(model, average, objective, loss_of)
        self._first_call: Any = None
        self._counted: CountsCalls | None = None
        if not unseen:
            if loss_of is None:
                self._first_call = model.register_forward_pre_hook(self._begin)
            if not _is_compiled(self.inner):
                self._counted = CountsCalls(self.inner)
                self._counted.__enter__()
        self._seconds = time.perf_counter() - begun

    def _begin(self, model: nn.Module, args: Any) -> None:
        if self._dropout is None and torch.is_grad_enabled():
            self._dropout = Dropout(self.inner)

    # --- events of a loop ------------------------------------------------------------------------

    def before_step(self) -> None:
        """The gradients of a step are complete, and the optimizer has not used them yet."""
        if self.steps == 0:
            with self._timed():
                self._judge_first()
        elif self.batches is not None:
            if self.batches.left_over:
                self.audit.add([_LEFT_OVER])
            self.batches.close()
            self.batches = None
        groups = [g for o in self._optimizers for g in o.param_groups]
        rates = {id(p): float(g["lr"]) for g in groups for p in g["params"]}
        self._movement.before_step(rates, max((float(g["lr"]) for g in groups), default=0.0))
        self._rates.note()

    def after_step(self, skipped: bool = False) -> None:
        """The optimizer has made its step, or a gradient scaler has skipped it."""
        self.steps += 1
        if self.batches is not None and self.steps == 1:
            self.batches.stepped()
        if skipped:
            return
        self._movement.after_step()
        if not self._moved and len(self._movement.pending) < self._movement.trained:
            self._moved = True
            self._add(self._movement.findings(False, self.has_gradients, self.exempt))

    @property
    def is_due(self) -> bool:
        """Whether ``examine`` has something to do: the first step is done, and not examined."""
        return self.steps == 1 and "seconds" not in self.audit.facts

    def examine(self) -> Audit | None:
        """After the first step, run ``audit`` on what it was given; None after later steps."""
        if not self.is_due:
            return None
        with self._timed():
            if self.batches is not None:
                self.batches.paused = True
            self._examine()
            if self.batches is not None:
                self.batches.paused = False
            self._add([self._rates_finding()])
            self._combine()
        self.audit.facts["seconds"] = round(self._seconds, 2)
        return self.audit

    def log(self, loss: float) -> None:
        """``loss`` is what is shown as the loss of the first step; no collective."""
        finding = judge_logged(loss, self._expected_loss)
        self._expected_loss = None
        if finding is not None:
            self._add([finding])

    def finish(self) -> Audit:
        """The end of training: what moved over all steps, and which learning rates were used."""
        self.close()
        if not self.steps:
            return self.audit
        with self._timed():
            self._replace(self._movement.findings(True, self.has_gradients, self.exempt))
            self._replace([self._rates_finding()])
            self._combine()
        self.audit.facts["steps"] = self.steps
        self.audit.facts["seconds"] = round(self._seconds, 2)
        return self.audit

    def close(self) -> None:
        """Remove all hooks; ``finish`` does so, too."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None
        self._stop_looking()

    def _stop_looking(self) -> None:
        if self._counted is not None:
            self._counted.__exit__()
            self._counted = None
        if self._first_call is not None:
            self._first_call.remove()
            self._first_call = None

    # --- what is asked ---------------------------------------------------------------------------

    def _judge_first(self) -> None:
        """Before the first step: what needs its batches and gradients."""
        drew: bool | None = None
        if self.batches is not None:
            self._batch = next((b.arguments for b in self.batches.batches), None)
            self._first_tokens = [b.tokens for b in self.batches.batches[:1]]
            ids = (self._batch or {}).get("input_ids")
            if isinstance(ids, Tensor):
                self._step_tokens = ids.numel() * len(self.batches.batches)
            cast = next((b.autocast for b in self.batches.batches), None)
            device = next((p.device.type for p in self.inner.parameters()), "cpu")
            self._autocast = cast[1] if cast else autocast_of(self.inner, device)
            drew = self.batches.drew_random
            self._add(self.batches.findings(self.inner))
            self._expected_loss = self.batches.expected_loss
        else:
            self._add(AuditFinding(n, "skipped", self._unseen) for n in OF_THE_LOOP[:2])
        dropout = self._dropout or Dropout(self.inner)
        self._add([dropout.finding(drew, self.no_dropout), self._checkpointing()])
        self._stop_looking()

    def _checkpointing(self) -> AuditFinding:
        planner = planner_of(self.inner)
        if planner is not None and any(planner.levels.values()):
            return _planned(planner, self.checkpointing)
        if self._counted is None:
            why = self._unseen or "the model is compiled: its modules cannot be watched"
            return AuditFinding("checkpointing", "skipped", why)
        return checkpointing(self.inner, self._counted, self.checkpointing)

    def _rates_finding(self) -> AuditFinding:
        expected: Sequence[float] | None = None
        asked = "no schedule was asked for by arguments"
        if self._expected_rates is not None:
            expected, asked = self._expected_rates(self._rates.first + len(self._rates.used))
        return self._rates.finding(expected, asked, self._warmup)

    def _examine(self) -> None:
        rest = [name for name in CHECKS if name not in OF_THE_LOOP]
        batch = {
            name: value for name, value in (self._batch or {}).items() if isinstance(value, Tensor)
        }
        if "num_items_in_batch" in batch:  # as of a step of this batch alone: the same graphs
            (first,) = self._first_tokens
            batch["num_items_in_batch"] = torch.full_like(batch["num_items_in_batch"], first)
        self._batch = None
        why = self._unseen or collectives_of(self.inner) or ""
        if not why and not isinstance(batch.get("labels"), Tensor):
            why = "no batch with labels was seen"
        tokens = 0
        if not why:
            tokens, recompute, why = _tokens_that_fit(self.inner, self._step_tokens, self._autocast)
        if not why:
            ids = slice_of(batch, tokens)[0].get("input_ids")
            uncut = ids.numel() if isinstance(ids, Tensor) else 0
            if uncut > max(tokens, _SLICES[0]):
                why = (
                    f"the batch has more than tokens, so that it cannot be cut, and its {uncut} "
                    "tokens take too long: fusewright audit looks at them"
                )
        if not why:
            on_host = all(p.device.type == "cpu" for p in self.inner.parameters())
            try:
                with (
                    large_blocks_mapped() if recompute and on_host else contextlib.nullcontext(),
                    _without_noise(self.inner),
                ):
                    found = audit_step(
                        self.inner, batch, tokenizer=self.tokenizer, autocast=self._autocast,
                        tokens=tokens, moves=_LOOKS, recompute=recompute,
                    )  # fmt: skip
            except Exception as error:  # the run must not end because it could not be audited
                why = f"the audit could not run: {type(error).__name__}: {error}"
            else:
                self.audit.facts |= found.facts
                meant = {*self.unasked, *(["dropout"] if self.no_dropout else [])}
                self._add(f for f in found.findings if f.check not in meant)
                self._add(AuditFinding(name, "skipped", w) for name, w in self.unasked.items())
                if any(f.check == "loss-scale" for f in found.failed):
                    self._follow_from_the_loss()
                self._take_back(next(
                    (f.reason for f in found.findings
                     if f.check == "loss-scale" and f.verdict == "skipped"), "",
                ))  # fmt: skip
            if self.packing and (padded := rows_of_one_sample(batch)):
                self._add([AuditFinding(
                    "packing", "fail", f"packing was asked for, and the first batch has {padded} "
                    f"row{'s' * (padded > 1)} of one sample and padding",
                    advice="something switched packing off, which costs speed: engines do so for "
                    "kinds of models and of attention that they cannot pack, or by the collator",
                )])  # fmt: skip
        if why:
            self._add(AuditFinding(name, "skipped", why) for name in rest)
            self._take_back(why)

    def _follow_from_the_loss(self) -> None:
        """Skip what was measured with the model's loss as a mean over tokens, which it is not."""
        self.audit.findings = [
            replace(f, verdict="skipped", reason="the model's own loss is no mean: see loss-scale")
            if f.check == "accumulation-scale" and f.figures
            else f
            for f in self.audit.findings
        ]

    def _take_back(self, why: str) -> None:
        """Skip what was taken on the model's word, if ``why`` says that the audit cannot tell."""
        if why and self.batches is not None and self.batches.is_assumed:
            self._replace([AuditFinding(name, "skipped", why) for name in OF_THE_LOOP[:2]])

    # --- findings --------------------------------------------------------------------------------

    def _add(self, findings: Sequence[AuditFinding] | Iterator[AuditFinding]) -> None:
        self.audit.add(findings)

    def _replace(self, findings: Sequence[AuditFinding]) -> None:
        """Let what is known at the end stand for what the first step said, unless it is worse."""
        for new in findings:
            self.audit.findings = [
                f for f in self.audit.findings if f.check != new.check or f.verdict == "fail"
            ]
        self._add(findings)

    def _combine(self) -> None:
        """Bring the findings of all processes together, the worst of each, in order."""
        if has_peers():
            everyone: list[list[AuditFinding]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(everyone, self.audit.findings)
            combined = Audit(self.audit.model)
            for findings in everyone:
                combined.add(findings)
            self.audit.findings = combined.findings
        order = list(CHECKS)
        self.audit.findings.sort(key=lambda f: order.index(f.check))

    def _timed(self) -> _Clock:
        return _Clock(self)


class _Clock:
    """Adds the time of a block to a watch."""

    def __init__(self, watch: StepWatch) -> None:
        self._watch = watch

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._watch._seconds += time.perf_counter() - self._begun


_LEFT_OVER = AuditFinding(
    "accumulation-scale", "fail", "the gradients of the first step were still there in the second "
    "one, and are added to its own", advice="call optimizer.zero_grad() after optimizer.step()",
)  # fmt: skip


@contextlib.contextmanager
def _without_noise(model: nn.Module) -> Iterator[None]:
    """No noise on embeddings (NEFTune), which a plain model does not add."""
    noisy: list[Any] = [m for m in model.modules() if getattr(m, "neftune_noise_alpha", None)]
    amounts = [m.neftune_noise_alpha for m in noisy]
    for module in noisy:
        module.neftune_noise_alpha = 0.0
    try:
        yield
    finally:
        for module, amount in zip(noisy, amounts, strict=True):
            module.neftune_noise_alpha = amount


_SLICES = 512, 256, 128, 64
"""Tokens that are compared with a plain model: as many as there is memory and time for."""

_SHARE = 32
"""One token in so many of a step is compared: each runs several times, by the plain model too."""

_LOOKS = 2
"""So often other tokens are looked at where a bias of the gradients is not clear."""


def _tokens_that_fit(
    model: nn.Module, step: int, autocast: torch.dtype | None
) -> tuple[int, bool, str]:
    """How many tokens can be compared within the device's memory, or the planner's budget.

    And within the time of a step, which has ``step`` tokens. Then whether the plain model must
    checkpoint its blocks: where they do not fit otherwise, or memory is planned to be least. No
    tokens, with the reason, if none fit.
    """
    parameters = list(model.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    _, exact = dtypes_of(model, autocast)
    planner, meter = planner_of(model), Meter(device)
    limit = planner.budget.bytes if planner is not None else None
    limit = limit or meter.capacity()
    least = planner is not None and planner.budget.mode == "min"
    slices = [n for n in _SLICES if n <= step / _SHARE] or _SLICES[-1:]
    if limit is None:
        return slices[0], least, ""
    room = limit - meter.used()
    for recompute in (True,) if least else (False, True):
        for tokens in slices:
            needed = step_bytes(model, exact, tokens, recompute)
            if needed <= room:
                return tokens, recompute, ""
    why = (
        f"a plain model's step of {_SLICES[-1]} tokens needs about {gigabytes(needed)}, and "
        f"{gigabytes(max(room, 0))} are free: audit it where there is more memory, by fusewright "
        "audit"
    )
    return 0, True, why


def _planned(planner: Any, asked: bool | None) -> AuditFinding:
    """What fusewright's memory planner has decided, which takes the place of checkpoints."""
    levels = list(filter(None, planner.levels.values()))
    again = sum(level not in ("weights", "all") for level in levels)
    text = f"fusewright plans memory: {again} of {len(levels)} blocks compute some of it again"
    wrong = bool(asked) and not again
    return AuditFinding("checkpointing", "fail" if wrong else "pass", text)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()
    )


class LoopWatch(StepWatch):
    """The ``StepWatch`` of a hand-written loop, which hears of the steps by hooks of the optimizer.

    A context manager: its end is the end of training.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(model, optimizers, *args, **kwargs)
        self._steps = [
            optimizers[0].register_step_pre_hook(lambda *_: self.before_step()),
            optimizers[-1].register_step_post_hook(lambda *_: self._stepped()),
        ]

    def _stepped(self) -> None:
        self.after_step()
        self.examine()

    def close(self) -> None:
        """Remove all hooks."""
        super().close()
        for handle in self._steps:
            handle.remove()
        self._steps = []

    def __enter__(self) -> LoopWatch:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    scheduler: Any = None,
    *,
    tokenizer: Any = None,
    average: Average = "tokens",
    checkpointing: bool | None = None,
    warmup_steps: int = 0,
) -> LoopWatch:
    """Audit a training loop at its first step and at its end, without changing what it computes.

        with watch(model, optimizer, scheduler) as w:
            for batch in loader: ...
        print(w.audit)

    To be called right before the loop, when model and optimizer are prepared, and by each process.

    Args:
        model: what the loop calls.
        optimizer: or several, in the order of their steps.
        scheduler: its own, for ``warmup``.
        tokenizer: to know which tokens end an answer.
        average: a step is meant to be the mean over its ``"tokens"``, or over its ``"batches"``.
        checkpointing: whether gradient checkpointing is meant to be on; None: if the model's
            modules say so.
        warmup_steps: that the schedule is meant to have; 0: not compared.
    """
    several = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    loop = LoopWatch(
        model, list(map(inner_optimizer, several)), scheduler,
        tokenizer=tokenizer, average=average, warmup_steps=warmup_steps,
    )  # fmt: skip
    loop.checkpointing = checkpointing
    return loop


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that accelerate has wrapped."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
