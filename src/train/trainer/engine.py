"""One optimizer step from its batches to its checkpoint, in the order in which it happens.

The loop is that of transformers' Trainer. For each step it calls the methods under "a step" below,
from top to bottom: ``get_batch_samples``; ``on_step_begin``; for each batch ``training_step``, in
which ``compute_loss``; ``_get_grad_norm`` on the clipped gradients; the optimizer; ``on_step_end``;
and where they are due ``log``, ``evaluate`` and ``_save_checkpoint``.

What differs from run to run are objects that the trainer has:

- ``objective``: the loss and the figures of validation (``objective.py``, ``methods/``);
- ``sharding``: which part of the weights each process has, and how they are read and brought
  together (``sharding.py``);
- ``checkpoints``: what is written, which is the best, and whether the disk was full
  (``checkpoint/write.py``);
- ``guard``: looks at losses and gradients that are not finite (``watchdog.py``);
- ``audit``: judges the first step, and what moved by the end (``run_audit.py``);
- ``context``: the recipe, the rows to validate on, the processes, the meter.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import seed_worker

from ...compiler.pipeline import planner_of
from ...kernels import choice
from ...memory.oom_retry import retrying
from ...sharding import whole
from ..checkpoint.load import readable
from ..checkpoint.resume import Saved
from ..checkpoint.rng_state import RngState, seed_rank, share_in_groups
from ..checkpoint.write import Checkpoints
from ..data.ranks import RankBatches, RankStream
from ..model.multimodal import tower_parameters
from ..model.relora import relora_of
from ..model.token_losses import causal_loss
from ..processes import zero
from ..processes.signals import Interrupts
from ..processes.world import World
from ..recipe.recipe import Recipe
from ..recipe.strategy import strategy_of
from ..report.environment import rss_mb
from ..report.progress import ProgressCallback
from .batches import errors_as_raised
from .context import Context
from .objective import Objective
from .optimizer import make_optimizer
from .run_audit import RunAudit
from .schedule import custom_schedule, follow
from .sharding import Sharding
from .watchdog import LossWatchdog, NonFiniteGuard, apply_limits, out_of_patience

if TYPE_CHECKING:
    _Trainer = Trainer
else:  # a mixin, so that it stands before any trainer: transformers' own, or one of TRL's
    _Trainer = object


class EngineMixin(_Trainer):
    """Overrides of a ``Trainer`` of transformers or TRL: batches, step order, checkpoints.

    Checkpoints are complete or absent. A watchdog or a full disk ends the loop after a step; a
    signal also between the batches of one. Such a step is as if it had not begun: its gradients are
    dropped, and a checkpoint has the state that ``on_step_end`` recorded after the step before.

    Args:
        resumed: what the checkpoint kept that the run resumes from.
        on_first_step: called when the first step is complete; the run then takes its folder.
        kwargs: those of the trainer of transformers or TRL.

    Raises:
        RecipeError: the objective does not go with the model.
    """

    def __init__(
        self,
        context: Context,
        objective: Objective,
        progress: ProgressCallback,
        resumed: Saved | None,
        on_first_step: Callable[[], None] | None,
        **kwargs: Any,
    ) -> None:
        recipe = context.recipe
        self.context: Context = context
        self.objective: Objective = objective
        self.world: World = context.world
        # before Trainer's own __init__, which makes the accelerator
        self.sharding = Sharding(self, self.world, strategy_of(recipe))
        self.sharding.divide(kwargs["model"])
        with objective.dtypes_left(kwargs["model"]):
            super().__init__(**kwargs)
        if self.world.several and objective.weighs_tokens and not self.model_accepts_loss_kwargs:
            # Trainer's is a mean over the tokens of one process
            self.compute_loss_func = functools.partial(causal_loss, smoother=self.label_smoother)
        self.progress, self.guard, self.resumed = progress, NonFiniteGuard(), resumed
        self.checkpoints = Checkpoints(self, Path(recipe.output_dir))
        self._notify_first_step = on_first_step
        self._after_step: tuple[RngState, Tensor] | None = None
        self._midway = self._has_images = False
        objective.attach(self)
        self.remove_callback(PrinterCallback)
        self.audit = RunAudit(self) if recipe.audit else None
        flow = FlowCallback(self, recipe, context.interrupts)
        for callback in (flow, progress, *filter(None, [self.audit])):
            self.add_callback(callback)
        if resumed is not None:
            context.meter.load_state_dict(resumed.meter)

    def _send_telemetry(self) -> None:
        """Nothing: TRL would tell the hub what is trained."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # its rows are tokenized; TRL would do that, too

    # --- before the first step: processes, batches, optimizer, schedule -------------------------

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        return self.sharding.accelerator_arguments(super()._build_accelerator_args(**kwargs))

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; on a CPU it would silently replace FSDP by DDP."""
        super().create_accelerator_and_postprocess()
        self.sharding.adjust_accelerator()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, but restore the terminal in any case."""
        with contextlib.closing(self.progress), errors_as_raised():
            if resume_from_checkpoint:
                self.sharding.load_before_sharding(Path(resume_from_checkpoint))
                self.checkpoints.resume_from(Path(resume_from_checkpoint))
            try:
                return super().train(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.checkpoints.settle(wait=True)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this process."""
        if not self.world.several:
            return super().get_train_dataloader()
        args, rows = self.args, self.train_dataset
        place = self.objective.rows_per_batch, self.world.batch_rank, self.world.batch_ranks
        options: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        if isinstance(rows, IterableDataset):
            loader = DataLoader(RankStream(rows, *place), batch_size=place[0], **options)
        else:
            order: Any = self._get_train_sampler(rows)
            batches = RankBatches(order, *place, args.dataloader_drop_last)
            options["worker_init_fn"] = functools.partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=self.world.batch_rank
            )
            loader = DataLoader(self.objective.fillable(rows), batch_sampler=batches, **options)
        # for the device, and for the number of the epoch; each process has its own batches already
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.objective.order(train_dataset or self.train_dataset)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resumed: Any) -> Any:
        """As Trainer's, which would ask DeepSpeed for a checkpoint of DeepSpeed's own form."""
        prepare: Any = super()._prepare_for_training
        if not self.sharding.zero_stage:
            return prepare(max_steps, train_dataloader, resumed)
        prepared = prepare(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resumed)
        return prepared

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimizer of the recipe; small tensors are updated as one."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self, model or self.model, self.context.recipe)
        zero.require_one_dtype(self.sharding.model, self.args)
        optimizer = super().create_optimizer(model)
        self.sharding.note_parameters(optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's schedule, where transformers has no name for it; else Trainer's own."""
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            target: Any = optimizer or self.optimizer
            schedule: Any = custom_schedule(self.context.recipe, target, warmup, num_training_steps)
            self.lr_scheduler, self._created_lr_scheduler = schedule, schedule is not None
        return super().create_scheduler(num_training_steps, optimizer)

    # --- before the first step: what a checkpoint has --------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: Any, model: Any = None) -> None:
        with readable(resume_from_checkpoint):
            if not self.sharding.load_weights(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        if self.args.device.type == "cpu":
            # transformers 5.17 loads to the device, and PyTorch has no location "cpu:0"
            vars(self.args)["_setup_devices"] = torch.device("cpu")
        with readable(checkpoint):
            if checkpoint is None or not self.sharding.load_optimizer(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)
                zero.drop_masters(self.sharding.optimizer.state)
        if self.resumed is not None and self.resumed.longer_keys(self.context.recipe):
            follow(self.lr_scheduler)

    def _load_rng_state(self, checkpoint: Any) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)
        share_in_groups(self.world)

    def _load_callback_state(self) -> None:
        saved: Any = self.state.stateful_callbacks  # a mapping, once they are read
        apply_limits(saved, self.context.recipe)
        super()._load_callback_state()

    def start(self) -> None:
        """Restore what Trainer has reset: intervals, pending loss, best checkpoint.

        The meter is restored earlier, because it also counts where no step is left.
        """
        self.objective.load_reference()
        if self.context.on_ready is not None:
            self.context.on_ready(self)
        seed_rank(self.args.seed, self.world)
        if self.resumed is not None:
            # the state of a checkpoint brings its own intervals along
            state: Any = self.state
            state.compute_steps(self.args, state.max_steps)
            self.checkpoints.note_best()
            self.checkpoints.saved_at = self.resumed.step
            self._tr_loss += self.resumed.pending_loss
            self._globalstep_last_logged = self.resumed.last_logged
        self.objective.restore(self.resumed)

    # --- a step, in its order --------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The batches of a step, and the number of tokens that they train."""
        samples = super().get_batch_samples(*args, **kwargs)
        self.objective.weigh_batches(samples[0])
        return samples

    def on_step_begin(self) -> None:
        """Record that a step has begun, which may not finish."""
        self._midway = True
        self.context.meter.start_step()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of one batch; retried with less kept if memory runs out."""
        self.objective.begin_batch(inputs)
        self.context.meter.add(inputs.pop("tokens"), inputs.pop("trained"))
        self._has_images |= not inputs.pop("blank", False)
        forward_backward = super().training_step

        def attempt() -> Any:
            with self.objective.measured_once():
                return forward_backward(model, inputs, *args, **kwargs)

        planner = planner_of(model)
        if planner is None or self.world.several:  # the other processes would not try again
            loss = attempt()
        else:
            loss = retrying(planner, attempt, model.parameters())
        self.guard.add(self.state.global_step + 1, inputs, loss)
        return loss

    # Trainer's own divide by what accelerate's mesh says, or by ``get_cp_size``: each version by
    # another. Of ``Parts``, neither says anything.
    def get_total_train_batch_size(self, args: Any) -> int:
        """The rows of a step, each of them once."""
        parts, size = self.sharding.parts, int(super().get_total_train_batch_size(args))
        return size if parts is None else size // parts.size

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        """The trained tokens of a step, each of them once; None where nothing says which."""
        parts, count = self.sharding.parts, super()._get_num_items_in_batch(batch_samples, device)
        return count if parts is None or count is None else count / parts.size

    def _prepare_context_parallel_inputs(self, model: Any, inputs: Any) -> Any:
        """A context for forward and backward, and this process's part of the batch."""
        if self.sharding.parts is None:
            return super()._prepare_context_parallel_inputs(model, inputs)
        part, attention = self.sharding.parts.divide(inputs)
        return attention, part

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch: the objective's, around that of Trainer or TRL."""
        compute = functools.partial(self.objective.loss, super().compute_loss)
        if self.audit is not None and model.training:
            compute = functools.partial(self.audit.loss, compute)
        return compute(model, inputs, *args, **kwargs)

    def _has_mixed_mesh_grads(self, model: Any) -> bool:
        return self.sharding.divides or bool(super()._has_mixed_mesh_grads(model))

    def _mixed_mesh_grad_norm(self, model: Any, max_norm: float) -> Any:
        """The norm of gradients of several meshes, which are clipped to ``max_norm``."""
        # transformers 5.17 adds up what a mesh has copies of, and knows one dimension of it
        meshes: dict[Any, list[Any]] = {}
        for p in model.parameters():
            if p.grad is not None:
                meshes.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
        norms = [whole(get_total_norm([p.grad for p in ps])) for ps in meshes.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if not math.isinf(max_norm):
            for ps in meshes.values():
                clip_grads_with_norm_(ps, max_norm, norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the gradients, which Trainer has clipped; checked before the update."""
        clipped: Any = super()._get_grad_norm
        norm = clipped(model, grad_norm)
        self._leave_towers()
        logs = self._logs_at(self.state.global_step + 1)
        if (scaler := self.accelerator.scaler) is not None:
            return self.guard.judge_scaled(norm, scaler, logs)
        return self.guard.judge(norm, self.sharding.optimizer, logs)

    def _leave_towers(self) -> None:
        """Drop gradients of towers after a step in which no process has had an image.

        They are zeros, of blank images; in one process there are none, and no optimizer moves such
        weights.
        """
        featurizer = self.context.featurizer
        if featurizer is not None and featurizer.completes:
            if not self.world.sums([self._has_images])[0]:
                for parameter in tower_parameters(self.sharding.model):
                    parameter.grad = None
            self._has_images = False

    def _logs_at(self, step: int) -> bool:
        first = self.args.logging_first_step and step == 1
        return first or step % self.state.logging_steps == 0

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
        self.objective.end_step()
        self.checkpoints.settle()

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
            logs |= self.context.meter.entries(self.state.global_step - self._last_logged_loss())
            logs["rss_mb"] = rss_mb()
            if torch.cuda.is_available():
                logs["cuda_mb"] = torch.cuda.memory_allocated() / 2**20
        super().log(logs, start_time)

    def _last_logged_loss(self) -> int:
        """The step of the last entry that has a loss."""
        entries = reversed(self.state.log_history)
        return next((int(e["step"]) for e in entries if "loss" in e), 0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The figures of the validation rows."""
        with self.objective.evaluating():
            metrics = self.figures()
            self.log(metrics)
            flow = self.args, self.state, self.control
            self.control = self.callback_handler.on_evaluate(*flow, metrics)
        self.objective.require_judged(metrics)
        return metrics

    def figures(self) -> dict[str, float]:
        """What validation measures now; with several processes, a collective."""
        return self.objective.figures()

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self.checkpoints.save()

    def saved(self) -> Saved:
        """What a checkpoint keeps of the run, besides what ``Trainer`` does."""
        context, step = self.context, self.state.global_step
        pending = self._after_step[1] if self._midway and self._after_step else self._tr_loss
        logged = self._globalstep_last_logged == step
        return Saved(
            recipe=context.recipe.recorded(),
            data=context.data,
            step=step,
            meter=context.meter.state_dict(),
            pending_loss=0.0 if logged else float(pending),
            last_logged=self._globalstep_last_logged,
            carried={**context.carried(), **self.objective.carried()},
            processes=self.world.batch_ranks,
            choices=choice.records(),
        )

    def unfinished(self) -> RngState | None:
        """The random state before a step that was begun and not finished; else None."""
        return self._after_step[0] if self._midway and self._after_step is not None else None

    # --- the end ---------------------------------------------------------------------------------

    def ended(self) -> Literal["finished", "interrupted", "watchdog", "disk full"]:
        """Why the loop ended."""
        if self.checkpoints.write_error is not None:
            return "disk full"
        if self.context.interrupts.signal is not None:
            return "interrupted"
        dogs = [c for c in self.callback_handler.callbacks if isinstance(c, LossWatchdog)]
        return "watchdog" if any(dog.tripped for dog in dogs) else "finished"

    def reason(self) -> str | None:
        """Why the loop ended early, where neither a signal nor the watchdog has ended it."""
        if self.checkpoints.write_error is not None:
            return self.checkpoints.write_error
        patience = self.context.recipe.early_stopping_patience
        whole = self.state.global_step >= self.args.max_steps
        if self.ended() != "finished" or whole or patience is None:
            return None
        validations = f"for {patience} validations" if patience != 1 else "at the last validation"
        metric = self.args.metric_for_best_model
        return f"early stopping, as {metric} did not improve {validations}"

    def _load_best_model(self) -> None:
        self.checkpoints.settle(wait=True)
        if self.ended() != "finished":  # the last step's weights are what was asked for
            return
        if not self.sharding.load_best(Path(str(self.state.best_model_checkpoint))):
            with self.sharding.unsharded():
                super()._load_best_model()

    def load_checkpoint(self, folder: Path) -> None:
        """Load a checkpoint after which nothing is left to train."""
        self._load_from_checkpoint(str(folder))
        self.checkpoints.resume_at_end(folder)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        if (relora := relora_of(self.model)) is not None:
            relora.finish()
        self.objective.load_reference()

    def nothing_left(self, folder: Path) -> str | None:
        """Why nothing is left to train after a checkpoint; None: something is."""
        state = self.checkpoints.state_of(folder)
        if state.global_step >= self.args.max_steps:
            longer = "" if self.resumed is None or self.resumed.has_fixed_length else _LONGER
            return f"all steps are done{longer}"
        callbacks: Any = state.stateful_callbacks  # a mapping, once they are read
        if out_of_patience(callbacks, self.context.recipe):
            return f"early stopping ended training at step {state.global_step}{_MORE_PATIENT}"
        return None

    def abandon(self) -> None:
        """End a loop that ``NonFiniteStepError`` has left; save the state before that step."""
        self.checkpoints.save_now()
        self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # only whole weights are pushed
        if not (self.sharding.writes_shards and self.args.hub_strategy == "every_save"):
            super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        self.push_or_say(super()._finish_current_push)

    def push_or_say(self, push: Callable[[], Any]) -> None:
        """Push to the hub; a failure is reported and does not end the run."""
        try:
            push()
        except Exception as error:
            self.context.say(f"  pushing to the hub failed: {type(error).__name__}: {error}")


_LONGER = " (more max_steps or num_epochs would train further)"
_MORE_PATIENT = " (a higher early_stopping_patience would train further)"


class FineTuner(EngineMixin, Trainer):
    """The trainer of supervised training and other methods with labels and no trainer of TRL."""


class FlowCallback(TrainerCallback):
    """Between the steps: signals, extra checkpoints, garbage collection."""

    def __init__(self, trainer: EngineMixin, recipe: Recipe, interrupts: Interrupts) -> None:
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
        """Check the steps that no log will; save a checkpoint if the loop was ended."""
        self.trainer.guard.look()
        if self.recipe.gc_collect_steps == -1:
            gc.collect()
        if self.trainer.ended() in ("interrupted", "watchdog"):
            self.trainer.checkpoints.save_now()

    def _file_appeared(self, step: int) -> bool:
        """Whether the file that asks for a checkpoint exists; it is removed."""
        settings = self.recipe.dynamic_checkpoint
        if settings is None or not settings.enabled or step % settings.check_interval:
            return False
        file = Path(self.recipe.output_dir) / (settings.trigger_file_path or _TRIGGER)

        def take() -> bool:
            exists = file.exists()
            file.unlink(missing_ok=True)
            return exists

        return self.interrupts.world.share(take)

    def _stopping(self) -> bool:
        """Whether any process got a signal: all of them end at the same step."""
        self.interrupts.agree()
        return self.interrupts.signal is not None


_TRIGGER = "axolotl_checkpoint.save"
"""The default file whose presence asks for a checkpoint."""
