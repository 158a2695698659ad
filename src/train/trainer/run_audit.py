"""The audit of a run of ours: after its first step and at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...auditing.callback import AuditCallback, Schedule
from ...auditing.findings import Audit
from ...auditing.watch import StepWatch
from ..recipe.recipe import Recipe
from .schedule import custom_schedule


class RunAudit(AuditCallback):
    """Audits what ``trainer``, an ``EngineMixin``, trains."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(report=self._show)
        self.trainer, self.recipe = trainer, trainer.context.recipe
        self._compute: Callable[..., Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        super().on_train_begin(args, state, control, **kwargs)
        resumed = self.trainer.resumed
        if resumed is not None:  # its first log may be of steps that another run has made
            self._logged = resumed.last_logged

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit the model after the first step, which can take as long as that step."""
        context = self.trainer.context
        if self.watch is None or not self.watch.is_due:
            return
        context.say("auditing the first step")
        with context.timed("audit"):
            super().on_step_end(args, state, control, **kwargs)

    def make_watch(self, args: Any, state: Any, **kwargs: Any) -> StepWatch:
        """As of any trainer, with what the recipe asks for."""
        trainer, recipe = self.trainer, self.recipe
        kwargs["processing_class"] = trainer.context.tokenizer
        watch = super().make_watch(args, state, **kwargs)
        if ends := _ends_that_are_meant(recipe):
            watch.unasked = {"end-of-turn": ends, "row-ends": ends}
        watch.checkpointing = recipe.checkpointing()
        watch.has_gradients &= not trainer.sharding.zero_stage
        if recipe.relora:
            watch.exempt = "ReLoRA adds its adapters to the base while it trains"
        return watch

    def settings(self) -> dict[str, Any]:
        """What is trained, and how the loss of a batch is computed where the model does not."""
        trainer = self.trainer
        objective = trainer.objective.not_plain
        several = trainer.world.several and not objective
        if trainer.sharding.parts is not None or trainer.sharding.divides:
            objective, several = "processes share the tokens or the weights of a batch", False
        return {"objective": objective, "loss_of": self._loss_of if several else None}

    def schedule(self, args: Any, steps: int, optimizer: Any, scheduler: Any) -> Schedule:
        """That of the recipe."""
        return _RecipeSchedule(self.recipe, args, steps, optimizer, scheduler)

    def loss(
        self, compute: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of a batch by ``compute``; in the first step it is noted.

        Of several processes, the loss is computed outside of the model, which is not told labels.
        """
        watch = self.watch
        batches = None if watch is None or watch.steps else watch.batches
        if batches is None or batches.loss_of is None:
            return compute(model, batch, *args, **kwargs)
        self._compute = compute
        batches.begin({**batch, "num_items_in_batch": kwargs.get("num_items_in_batch")})
        loss = compute(model, batch, *args, **kwargs)
        batches.returned(loss)
        return loss

    def _loss_of(self, arguments: dict[str, Any]) -> Tensor:
        """The mean loss of a batch that ``loss`` has noted."""
        assert self._compute is not None
        batch = dict(arguments)
        number = batch.pop("num_items_in_batch")
        loss: Tensor = self._compute(self.trainer.model, batch, num_items_in_batch=number)
        processes: int = self.trainer.accelerator.num_processes
        return loss / processes  # by which Trainer has multiplied it

    def _show(self, audit: Audit) -> None:
        say = self.trainer.context.say
        say(audit.headline)
        if not audit.passed:
            say(str(audit))


def _ends_that_are_meant(recipe: Recipe) -> str:
    """Why answers may end without an end that is trained; empty: they may not."""
    if recipe.excess_length_strategy == "truncate":
        return "excess_length_strategy: truncate cuts the ends of long rows"
    if recipe.pretraining_dataset:
        return "texts are cut into sequences"
    for source in recipe.datasets:
        if "completion" in str(source.type):
            return "rows of type completion are texts, which are cut"
        if not {source.train_on_eos, source.train_on_eot} <= {"turn", "all", None}:
            return "train_on_eos or train_on_eot leaves ends out"
    return ""


class _RecipeSchedule(Schedule):
    def __init__(self, recipe: Recipe, *args: Any) -> None:
        self._recipe = recipe
        super().__init__(*args)

    def make(self, optimizer: Any, args: Any) -> Any:
        own = custom_schedule(self._recipe, optimizer, self.warmup, self.steps)
        return own or super().make(optimizer, args)

    def unasked(self, scheduler: Any) -> str:
        return ""
