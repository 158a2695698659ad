"""What the trainer is told between its steps."""

from __future__ import annotations

import gc
from typing import Any, Protocol

from transformers import EarlyStoppingCallback, TrainerCallback

from .recipe import Recipe
from .signals import Interrupts
from .watchdog import LossWatchdog


class Steered(Protocol):
    """What ``Flow`` needs of a trainer."""

    def began(self) -> None:
        """The loop begins."""

    def stepped(self) -> None:
        """A step is whole."""

    def stepping(self) -> None:
        """A step begins."""

    def ended(self) -> str:
        """Why the loop ends."""

    def save_now(self) -> None:
        """Write a checkpoint."""


class Flow(TrainerCallback):
    """What happens between the steps: signals, checkpoints out of turn, collected garbage.

    Attributes:
        trainer: what it steers; set once there is one.
    """

    trainer: Steered

    def __init__(self, recipe: Recipe, interrupts: Interrupts) -> None:
        self.recipe, self.interrupts = recipe, interrupts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what a checkpoint kept."""
        self.trainer.began()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that a step begins."""
        self.trainer.stepping()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the loop within a step when a signal came."""
        control.should_training_stop |= self.interrupts.signal is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that a step is whole; end the loop when a signal came."""
        self.trainer.stepped()
        control.should_training_stop |= self.interrupts.signal is not None
        control.should_save |= self.recipe.save_first_step and state.global_step == 1
        if self.recipe.gc_steps and state.global_step % self.recipe.gc_steps == 0:
            gc.collect()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a checkpoint of a loop that was ended."""
        if self.trainer.ended() in ("interrupted", "watchdog"):
            self.trainer.save_now()


def watchers(recipe: Recipe) -> list[TrainerCallback]:
    """The watchdogs that the recipe asks for."""
    found: list[TrainerCallback] = []
    if recipe.loss_watchdog_threshold is not None:
        patience = recipe.loss_watchdog_patience or 1
        found.append(LossWatchdog(recipe.loss_watchdog_threshold, patience))
    if recipe.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    return found
