"""What happens between the trainer's steps."""

from __future__ import annotations

import functools
import gc
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from ...errors import RecipeError
from ..model.token_losses import causal_lm
from ..processes.signals import Interrupts
from ..recipe.recipe import Recipe
from .watchdog import LossWatchdog

if TYPE_CHECKING:
    from .trainer import FineTuner


class FlowCallback(TrainerCallback):
    """What happens between the steps: signals, checkpoints out of turn, collected garbage.

    Args:
        trainer: what it notifies.
        recipe: the recipe.
        interrupts: whose signal ends the loop.
    """

    def __init__(self, trainer: FineTuner, recipe: Recipe, interrupts: Interrupts) -> None:
        self.trainer, self.recipe, self.interrupts = trainer, recipe, interrupts

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore what a checkpoint kept."""
        self.trainer.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record that a step begins."""
        self.trainer.on_step_begin()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the loop within a step, after one of its batches, when a signal came."""
        control.should_training_stop |= self._stopping()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the loop after a validation during which a signal came, before another step."""
        control.should_training_stop |= self._stopping()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record that a step is complete; end the loop when a signal came."""
        self.trainer.on_step_end()
        control.should_training_stop |= self._stopping()
        control.should_save |= self.recipe.save_first_step and state.global_step == 1
        control.should_save |= self._file_appeared(state.global_step)
        every = self.recipe.gc_collect_steps or 0
        if (every > 0 and state.global_step % every == 0) or (
            every < 0 and control.should_evaluate
        ):
            gc.collect()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the steps that no log will; leave a checkpoint of a loop that was ended."""
        self.trainer.guard.look()
        if self.recipe.gc_collect_steps == -1:
            gc.collect()
        if self.trainer.ended() in ("interrupted", "watchdog"):
            self.trainer.save_now()

    def _file_appeared(self, step: int) -> bool:
        """Whether the file that asks for a checkpoint is there; it is removed."""
        asked = self.recipe.dynamic_checkpoint
        if asked is None or not asked.enabled or step % asked.check_interval:
            return False
        file = Path(self.recipe.output_dir) / (asked.trigger_file_path or _TRIGGER)

        def take() -> bool:
            there = file.exists()
            file.unlink(missing_ok=True)
            return there

        return self.interrupts.world.share(take)

    def _stopping(self) -> bool:
        """Whether a signal has come to any process of the run: all of them end at the same step."""
        self.interrupts.agree()
        return self.interrupts.signal is not None


class LayerSampler(TrainerCallback):
    """LISA (Pan et al. 2024): a few blocks train at a time, and others after every interval.

    What is drawn depends on the seed and the number of the interval alone, so that a run which
    resumes has the same blocks.

    Args:
        recipe: which says how many, and for how long.
        model: whose blocks are drawn; what is frozen already stays so.

    Raises:
        RecipeError: it has no such list of blocks, or too few.
    """

    def __init__(self, recipe: Recipe, model: Any) -> None:
        where, number = recipe.lisa_layers_attribute, recipe.lisa_n_layers or 0
        try:
            blocks = list(functools.reduce(getattr, where.split("."), causal_lm(model)))  # type: ignore[arg-type]  # 2026-11-27: a path of names
        except (AttributeError, TypeError):
            raise RecipeError(
                f"lisa_layers_attribute: the model has no blocks in {where}"
            ) from None
        if number > len(blocks):
            raise RecipeError(f"lisa_n_layers: the model has only {len(blocks)} blocks")
        self.number, self.interval = number, recipe.lisa_step_interval or 1
        self.seed, self.drawn = recipe.seed, -1
        self.trained = [[p for p in block.parameters() if p.requires_grad] for block in blocks]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw blocks at the beginning of an interval, or where a run resumes within one."""
        turn = state.global_step // self.interval
        if turn != self.drawn:
            self.drawn = turn
            draw = random.Random(f"{self.seed} {turn}")
            chosen = draw.sample(range(len(self.trained)), self.number)
            self._train([i in chosen for i in range(len(self.trained))])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was."""
        self._train([True] * len(self.trained))

    def _train(self, wanted: list[bool]) -> None:
        for parameters, trains in zip(self.trained, wanted, strict=True):
            for parameter in parameters:
                parameter.requires_grad_(trains)
                if not trains:
                    parameter.grad = None


_TRIGGER = "axolotl_checkpoint.save"
"""The file that asks for a checkpoint, where the recipe does not say."""

_PATIENCE = 3
"""Of the loss watchdog, where the recipe does not say."""


def watchdogs(recipe: Recipe) -> list[LossWatchdog | EarlyStoppingCallback]:
    """The watchdogs that the recipe asks for."""
    found: list[LossWatchdog | EarlyStoppingCallback] = []
    if recipe.loss_watchdog_threshold is not None:
        patience = recipe.loss_watchdog_patience or _PATIENCE
        found.append(LossWatchdog(recipe.loss_watchdog_threshold, patience))
    if recipe.early_stopping_patience is not None:
        found.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    return found


def apply_limits(kept: dict[str, Any], recipe: Recipe) -> None:
    """Give restored watchdogs the limits of the recipe: a checkpoint brings its own along.

    Args:
        kept: what a checkpoint keeps of each callback, by the name of its class; changed in place.
        recipe: which may have other limits than the checkpoint's.
    """
    for watchdog in watchdogs(recipe):
        name = type(watchdog).__name__
        if name in kept:
            kept[name] = {**kept[name], "args": watchdog.state()["args"]}


def out_of_patience(kept: dict[str, Any], recipe: Recipe) -> bool:
    """Whether early stopping had ended the run that a checkpoint is of.

    Args:
        kept: what the checkpoint keeps of each callback, by the name of its class.
        recipe: which may have more patience, or no early stopping any more.
    """
    found = kept.get(EarlyStoppingCallback.__name__, {})
    waited = found.get("attributes", {}).get("early_stopping_patience_counter", 0)
    patience = found.get("args", {}).get("early_stopping_patience")
    if patience is None or recipe.early_stopping_patience is None:
        return False
    return bool(waited >= max(patience, recipe.early_stopping_patience))
