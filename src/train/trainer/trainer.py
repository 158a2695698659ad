"""The optimizer steps: transformers' Trainer with our batches, our order and our checkpoints."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerState

from ...compiler.pipeline import planner_of
from ...memory.oom_retry import retrying
from ..checkpoint import files as checkpoint
from ..checkpoint.load import readable
from ..checkpoint.resume import Saved
from ..checkpoint.rng_state import RngState, seed_rank
from ..checkpoint.together import write_together
from ..checkpoint.write import best_checkpoint, write_checkpoint
from ..data.order import order_of
from ..report.environment import rss_mb
from ..report.progress import ProgressCallback
from .callbacks import FlowCallback, apply_limits, out_of_patience
from .context import Context
from .optimizer import make_optimizer
from .schedule import own_schedule
from .watchdog import LossWatchdog, NonFiniteGuard
from .weighted import WeighingTrainer


class FineTuner(WeighingTrainer):
    """``Trainer`` that counts and validates by token, and whose checkpoints are whole or not there.

    The loop itself is Trainer's. It makes the optimizer, the schedule and the order of the rows,
    restores a checkpoint (``start``), and then for each step calls ``on_step_begin``,
    ``training_step`` for each batch, ``_get_grad_norm``, the optimizer, ``on_step_end``, and where
    they are due ``log``, ``evaluate`` and ``_save_checkpoint``. ``FlowCallback`` calls what begins
    with ``on_``, and ``start``.

    A watchdog or a full disk ends the loop after a step; a signal also between the batches of one.
    Such a step is as if it had not begun: its gradients are dropped, and ``_saved`` writes the
    state that ``on_step_end`` has noted after the step before.

    Attributes:
        write_error: why a checkpoint could not be written, which ended the run; or None.
        saved_at: the step of the last checkpoint.

    Args:
        context: what the trainer needs besides the model and the rows.
        progress: shows how it goes.
        resumed: what the checkpoint kept that the run resumes from.
        on_first_step: called when the first step is complete; the run then takes its folder.
        kwargs: Trainer's own.
    """

    def __init__(
        self,
        context: Context,
        progress: ProgressCallback,
        resumed: Saved | None,
        on_first_step: Callable[[], None] | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(context, **kwargs)
        self.remove_callback(PrinterCallback)
        for callback in (FlowCallback(self, context.recipe, context.interrupts), progress):
            self.add_callback(callback)
        self.progress, self.guard = progress, NonFiniteGuard()
        self._folder = Path(context.recipe.output_dir)
        self._notify_first_step = on_first_step
        self.write_error: str | None = None
        self.saved_at: int | None = None
        self._resumed = resumed
        if resumed is not None:
            context.meter.load_state_dict(resumed.meter)
        self._after_step: tuple[RngState, Tensor] | None = None
        self._midway = False

    @property
    def completions(self) -> list[dict[str, Any]]:
        """Texts to look at, of methods that generate."""
        return []

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; it gives the terminal back, whatever happens."""
        with contextlib.closing(self.progress):
            return super().train(*args, **kwargs)

    # --- the optimizer, the schedule and the order of the rows -----------------------------------

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the recipe; small tensors are updated as one."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self, model or self.model, self.context.recipe)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule, where transformers has no name for it; else Trainer's own."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            scheduled: Any = optimizer or self.optimizer
            made: Any = own_schedule(self.context.recipe, scheduled, warmup, num_training_steps)
            self.lr_scheduler, self._created_lr_scheduler = made, made is not None
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        packs: Any = train_dataset or self.train_dataset
        return order_of(packs, self.context.recipe, self._train_batch_size)

    # --- before the first step -------------------------------------------------------------------

    def _load_callback_state(self) -> None:
        kept: Any = self.state.stateful_callbacks  # a mapping, once they are read
        apply_limits(kept, self.context.recipe)
        super()._load_callback_state()

    def start(self) -> None:
        """Restore what Trainer has set back to nothing: intervals, pending loss, best checkpoint.

        The meter is there already, for it also counts where no step is left to make.
        """
        if self.context.on_ready is not None:
            self.context.on_ready(self)
        seed_rank(self.args.seed, self.world)
        if self._resumed is not None:
            # the state of a checkpoint brings its own intervals along
            state: Any = self.state
            state.compute_steps(self.args, state.max_steps)
            self._note_best()
            self.saved_at = self._resumed.step
            self._tr_loss += self._resumed.pending_loss
            self._globalstep_last_logged = self._resumed.last_logged

    # --- a step, in its order --------------------------------------------------------------------

    def on_step_begin(self) -> None:
        """Record that a step has begun, which may not finish."""
        self._midway = True
        self.context.meter.start_step()

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch."""
        self.context.meter.add(inputs.pop("tokens"), inputs.pop("trained"))
        planner = planner_of(model)
        step = functools.partial(self.try_step, model, inputs, *args, **kwargs)
        if self.world.several:  # the others would not try again
            planner = None
        loss = step() if planner is None else retrying(planner, step, model.parameters())
        self.guard.add(self.state.global_step + 1, inputs, loss)
        return loss

    def try_step(self, *args: Any, **kwargs: Any) -> Any:
        """One try of ``training_step``; there are more where the first finds no memory."""
        return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        own: Any = super()._get_grad_norm
        norm = own(model, grad_norm)
        if self.accelerator.scaler is not None:  # it skips such steps by itself, at first often
            return norm
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return self.guard.judge(norm, optimizer, self._logs_at(self.state.global_step + 1))

    def on_step_end(self) -> None:
        """Record what a checkpoint would need if the next step does not finish."""
        meter = self.context.meter
        meter.end_step()
        if self.world.several:
            meter.tokens[-1], meter.trained[-1] = map(
                int, self.world.sums([meter.tokens[-1], meter.trained[-1]])
            )
        if self._after_step is None:
            self._on_first_step()
        self._after_step = RngState.now(), self._tr_loss.clone()
        self._midway = False

    def _on_first_step(self) -> None:
        if self._notify_first_step is not None:
            self._notify_first_step()
        model: Any = self.model
        planner = planner_of(model)
        if planner is not None:
            planner.on_optimizer_step()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the steps since the last entry took."""
        if "loss" in logs:
            self.guard.look()
            logs |= self.context.meter.entries(self.state.global_step - self._last_loss())
            logs["rss_mb"] = rss_mb()
            if torch.cuda.is_available():
                logs["cuda_mb"] = torch.cuda.memory_allocated() / 2**20
        super().log(logs, start_time)

    def _logs_at(self, step: int) -> bool:
        first = self.args.logging_first_step and step == 1
        return first or step % self.state.logging_steps == 0

    def _last_loss(self) -> int:
        """The step of the last entry that has a loss."""
        entries = reversed(self.state.log_history)
        return next((int(e["step"]) for e in entries if "loss" in e), 0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The figures of the validation rows."""
        metrics = self.figures()
        self.log(metrics)
        flow = self.args, self.state, self.control
        self.control = self.callback_handler.on_evaluate(*flow, metrics)
        return metrics

    # --- checkpoints -----------------------------------------------------------------------------

    def save_now(self) -> None:
        """Write a checkpoint of the last whole step, unless there is one, or was no step."""
        if self.state.global_step not in (0, self.saved_at) and self.write_error is None:
            self._save_checkpoint(self.model)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write the checkpoint, or end the run because the disk is full."""
        folder, step = self._folder, self.state.global_step
        try:
            self._note_best()
            write_together(self.world, folder, step, self._write_checkpoint)
        except checkpoint.CheckpointWriteError as error:
            self.write_error = str(error)
            self.control.should_training_stop = True
            return
        self.saved_at = step
        if not self.world.main:
            return
        self.progress.saved(step)
        new = checkpoint.place(folder, step)
        best = self.state.best_model_checkpoint
        kept = {new, Path(best)} if best else {new}
        checkpoint.rotate(folder, self.context.recipe.save_total_limit, kept)
        if self.args.push_to_hub:
            self._pushed(lambda: self._push_from_checkpoint(str(new)))

    def _write_checkpoint(self, part: Path) -> None:
        write_checkpoint(self, part, self._saved(), self._unfinished())

    def _saved(self) -> Saved:
        recipe, step = self.context.recipe, self.state.global_step
        pending = self._after_step[1] if self._midway and self._after_step else self._tr_loss
        logged = self._globalstep_last_logged == step
        return Saved(
            recipe=recipe.recorded(),
            data=self.context.data,
            step=step,
            meter=self.context.meter.state_dict(),
            pending_loss=0.0 if logged else float(pending),
            last_logged=self._globalstep_last_logged,
            carried=self.context.carried(),
            processes=self.world.batch_ranks,
        )

    def _unfinished(self) -> RngState | None:
        """The random state before a step that was begun and not finished; else None."""
        return self._after_step[0] if self._midway and self._after_step is not None else None

    def over(self, folder: Path) -> str | None:
        """Why nothing is left to train after a checkpoint; None: something is."""
        with readable(folder):
            state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if state.global_step >= self.args.max_steps:
            return "all steps are done"
        if out_of_patience(state.stateful_callbacks, self.context.recipe):
            return f"early stopping ended training at step {state.global_step}"
        return None

    def load_checkpoint(self, folder: Path) -> None:
        """Load a checkpoint after which nothing is left to train."""
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.resumed_from = folder
        self._note_best()
        self.saved_at = self.state.global_step
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()

    def _note_best(self) -> None:
        """Let rank 0 look for the best checkpoint; folders may have moved, or show up late."""
        look = functools.partial(best_checkpoint, self, self._folder, self.resumed_from)
        self.state.best_model_checkpoint = self.world.share(look)

    def _load_best_model(self) -> None:
        if self.ended() == "finished":  # else the last step's weights are what was asked for
            super()._load_best_model()

    # --- the end ---------------------------------------------------------------------------------

    def ended(self) -> Literal["finished", "interrupted", "watchdog", "disk full"]:
        """Why the loop ended."""
        if self.write_error is not None:
            return "disk full"
        if self.context.interrupts.signal is not None:
            return "interrupted"
        dogs = [c for c in self.callback_handler.callbacks if isinstance(c, LossWatchdog)]
        return "watchdog" if any(dog.tripped for dog in dogs) else "finished"

    def abandon(self) -> None:
        """End a loop that ``NonFiniteStepError`` has left; save the state before that step."""
        self.save_now()
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _finish_current_push(self) -> None:
        self._pushed(super()._finish_current_push)

    def _pushed(self, push: Callable[[], Any]) -> None:
        """Push to the hub; a failure is reported and does not end the run."""
        try:
            push()
        except Exception as error:
            self.context.say(f"  pushing to the hub failed: {type(error).__name__}: {error}")
