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
from .watch import StepWatch, inner_optimizer


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
        self.watch: StepWatch | None = None
        self._main = True

    @property
    def audit(self) -> Audit | None:
        """What was found by now."""
        return None if self.watch is None else self.watch.audit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self._main = state.is_world_process_zero
        if self.watch is not None:
            self.watch.close()  # of a run that did not reach its end
        self.watch = self.make_watch(args, state, **kwargs)
        self._logged = state.global_step

    def make_watch(self, args: TrainingArguments, state: Any, **kwargs: Any) -> StepWatch:
        """What sees the steps of a run that begins."""
        lr_scheduler = kwargs.get("lr_scheduler")
        inner = inner_optimizer(kwargs["optimizer"])
        first = getattr(lr_scheduler, "last_epoch", None)
        schedule = self.schedule(args, state.max_steps, inner, lr_scheduler)
        watch = StepWatch(
            kwargs["model"], [inner], lr_scheduler,
            tokenizer=kwargs.get("processing_class"), average=self.average,
            expected_rates=schedule.rates, warmup_steps=0 if schedule.why else schedule.warmup,
            first_step=first if isinstance(first, int) else state.global_step,
            unseen=_unseen(args), **self.settings(),
        )  # fmt: skip
        watch.checkpointing = args.gradient_checkpointing or None
        watch.packing = bool(getattr(args, "packing", False))
        if getattr(args, "sync_ref_model", False):
            watch.exempt = "the reference model is moved while it trains"
        watch.no_dropout = bool(getattr(args, "disable_dropout", False))
        watch.has_gradients &= getattr(args, "deepspeed", None) is None
        return watch

    def schedule(
        self, args: TrainingArguments, steps: int, optimizer: Any, scheduler: Any
    ) -> Schedule:
        """The schedule that is asked for."""
        return Schedule(args, steps, optimizer, scheduler)

    def settings(self) -> dict[str, Any]:
        """What else the watch is told."""
        return {}

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
            print(audit.headline if audit.passed else audit)


def _unseen(args: TrainingArguments) -> str:
    """Why the calls of the model cannot be watched; empty: they can."""
    if args.torch_compile:
        return "the model is compiled: hooks would be compiled with it"
    if args.n_gpu > 1:
        return "nn.DataParallel calls copies of the model"
    return ""


class Schedule:
    """The learning rates that a trainer's arguments ask for.

    Args:
        steps: of the whole run.
        optimizer: what has the learning rate that the schedule begins with.
        scheduler: what the trainer uses.
    """

    def __init__(self, args: TrainingArguments, steps: int, optimizer: Any, scheduler: Any) -> None:
        self.kind = SchedulerType(args.lr_scheduler_type)
        self.steps, self.warmup = steps, args.get_warmup_steps(steps)
        group = optimizer.param_groups[0] if optimizer.param_groups else {}
        # a cycle has its highest rate elsewhere than at its beginning
        rates = (group[name] for name in ("max_lr", "initial_lr", "lr") if name in group)
        base = float(next(rates, args.learning_rate))
        self._optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=base)
        self._known: list[float] = []
        self.why = ""
        if self.kind.value in ("reduce_lr_on_plateau", "greedy"):
            self.why = f"the schedule {self.kind.value!r} depends on the results"
        else:
            self._asked = self.make(self._optimizer, args)
            self.why = self.unasked(scheduler)

    def make(self, optimizer: Any, args: TrainingArguments) -> Any:
        """A scheduler of ``optimizer`` as it is asked for."""
        more: Any = args.lr_scheduler_kwargs
        return get_scheduler(
            self.kind, optimizer, self.warmup, self.steps,
            scheduler_specific_kwargs=dict(more or {}),
        )  # fmt: skip

    def unasked(self, scheduler: Any) -> str:
        """Why the arguments do not say what ``scheduler`` should do; empty: they do."""
        plain = not self.warmup and self.kind == SchedulerType.LINEAR
        if plain and not _alike(self._asked, scheduler):
            return "the trainer was given a scheduler, and its arguments ask for none"
        return ""

    @property
    def words(self) -> str:
        """The schedule in words."""
        warmup = f" with {self.warmup} of warmup" if self.warmup else ""
        return f"the schedule {self.kind.value!r} over {self.steps} steps{warmup}"

    def rates(self, steps: int) -> tuple[Sequence[float] | None, str]:
        """The rates of the first ``steps`` steps, and the schedule in words."""
        if self.why:
            return None, self.why
        while len(self._known) < min(steps, self.steps):
            self._known.append(float(self._optimizer.param_groups[0]["lr"]))
            self._optimizer.step()
            self._asked.step()
        return self._known, self.words


def _alike(asked: Any, scheduler: Any) -> bool:
    """Whether two schedulers are made by the same function with the same numbers."""
    if type(asked) is not type(scheduler) or not isinstance(asked, LambdaLR):
        return type(asked) is type(scheduler)
    ours, theirs = asked.lr_lambdas[0], scheduler.lr_lambdas[0]
    return all(
        getattr(ours, name, None) == getattr(theirs, name, None) for name in ("func", "keywords")
    )
