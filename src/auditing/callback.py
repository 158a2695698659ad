"""``AuditCallback``: audit a run of transformers' Trainer, or of TRL's trainers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from .findings import Audit
from .micro_batches import Average
from .watch import Watch, _inner_optimizer, headline


class AuditCallback(TrainerCallback):
    """Audits a run at its first step and at its end, and changes nothing of what it computes.

        trainer = Trainer(..., callbacks=[AuditCallback()])

    Args:
        average: a step is meant to be the mean over its ``"tokens"``, or over its ``"batches"``.
        report: is given the audit after the first step, if something is wrong, and at the end; by
            default it is printed, by the first process.

    Attributes:
        audit: what was found by now; None before training.
    """

    def __init__(
        self, *, average: Average = "tokens", report: Callable[[Audit], None] | None = None
    ) -> None:
        self.average, self._report = average, report
        self.watch: Watch | None = None
        self._main = True

    @property
    def audit(self) -> Audit | None:
        """What was found by now."""
        return None if self.watch is None else self.watch.audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self._main = state.is_world_process_zero
        self.watch = self.make_watch(args, state, **kwargs)
        self._logged = state.global_step

    def make_watch(
        self, args: TrainingArguments, state: Any, model: Any, optimizer: Any, lr_scheduler: Any,
        processing_class: Any = None, **_: Any,
    ) -> Watch:  # fmt: skip
        """What sees the steps of a run that begins."""
        inner = _inner_optimizer(optimizer)
        schedule = Schedule(args, state.max_steps, inner, lr_scheduler)
        first = getattr(lr_scheduler, "last_epoch", None)
        watch = Watch(
            model, [inner], lr_scheduler, tokenizer=processing_class, average=self.average,
            unseen=_unseen(args), expected_rates=schedule.rates,
            first_step=first if isinstance(first, int) else state.global_step,
        )  # fmt: skip
        watch.checkpointing = args.gradient_checkpointing or None
        watch.no_dropout = bool(getattr(args, "disable_dropout", False))
        watch.has_gradients &= getattr(args, "deepspeed", None) is None
        return watch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The gradients of a step are complete."""
        if self.watch is not None:
            self.watch.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        if self.watch is not None:
            skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)
            self.watch.after_step(skipped is True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit the model after the first step, now that its gradients are freed."""
        if self.watch is not None:
            audit = self.watch.examine()
            if audit is not None and not audit.passed:
                self.report(audit)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare the loss that is logged of the first step."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if self.watch is not None and loss is not None:
            if state.global_step == self._logged + 1 and self.watch.steps == 1:
                self.watch.log(float(loss))
            self._logged = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what the whole run did."""
        if self.watch is not None:
            self.report(self.watch.finish())

    def report(self, audit: Audit) -> None:
        """Show an audit."""
        if self._report is not None:
            self._report(audit)
        elif self._main:
            print(headline(audit))
            for finding in audit.failed:
                print(f"  {finding.check}: {finding.reason}")


def _unseen(args: TrainingArguments) -> str:
    """Why the calls of the model cannot be watched; empty: they can."""
    if args.torch_compile:
        return "the model is compiled: hooks would be compiled with it"
    if args.n_gpu > 1:
        return "nn.DataParallel calls copies of the model"
    return ""


class Schedule:
    """The learning rates that a trainer's arguments ask for."""

    def __init__(
        self, args: TrainingArguments, steps: int, optimizer: Any, scheduler: Any
    ) -> None:
        self.kind = SchedulerType(args.lr_scheduler_type)
        self.steps, self.warmup = steps, args.get_warmup_steps(steps)
        self.words = f"the schedule {self.kind.value!r} over {steps} steps"
        if self.warmup:
            self.words += f" with {self.warmup} of warmup"
        group = optimizer.param_groups[0] if optimizer.param_groups else {}
        base = float(group.get("initial_lr", group.get("lr", args.learning_rate)))
        self.asked: Any = None
        self.why = ""
        self._known: list[float] = []
        self._optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=base)
        if self.kind in (SchedulerType.REDUCE_ON_PLATEAU, getattr(SchedulerType, "GREEDY", None)):
            self.why = f"the schedule {self.kind.value!r} depends on the results"
            return
        self.asked = get_scheduler(
            self.kind, self._optimizer, self.warmup, steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )  # fmt: skip
        plain = not self.warmup and self.kind == SchedulerType.LINEAR
        if plain and not _alike(self.asked, scheduler):
            self.asked = None
            self.why = "the trainer was given a scheduler, and the arguments ask for none"

    def rates(self, steps: int) -> tuple[Sequence[float] | None, str]:
        """The rates of the first ``steps`` steps, and the schedule in words."""
        if self.asked is None:
            return None, self.why
        while len(self._known) < min(steps, self.steps):
            self._known.append(float(self._optimizer.param_groups[0]["lr"]))
            self._optimizer.step()
            self.asked.step()
        return self._known, self.words


def _alike(asked: Any, scheduler: Any) -> bool:
    """Whether two schedulers are made by the same function with the same numbers."""
    if type(asked) is not type(scheduler) or not isinstance(asked, LambdaLR):
        return type(asked) is type(scheduler)
    ours, theirs = asked.lr_lambdas[0], scheduler.lr_lambdas[0]
    return all(
        getattr(ours, name, None) == getattr(theirs, name, None) for name in ("func", "keywords")
    )
