"""transformers' Trainer in several processes: whose batches, how the model is wrapped."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset
from transformers.trainer_utils import seed_worker

from ..checkpoint import sharded
from ..checkpoint.load import ResumableTrainer, load_trained, readable, trained_weights
from ..checkpoint.rng_state import share_in_groups
from ..data.ranks import Fillable, RankBatches, RankStream
from ..model.files import in_shards
from ..model.token_losses import causal_loss
from ..processes import tensor_parallel, zero
from ..processes.context_parallel import require_causal
from ..processes.gather import (
    in_parts,
    load_optimizer,
    load_weights,
    names_by_group,
    whole_optimizer,
    whole_weights,
)
from ..processes.mesh import is_sharded, parallelism, use_mesh, uses_fsdp
from ..processes.world import World
from ..processes.wrapping import fsdp_plugin
from ..recipe.strategy import Strategy
from .optimizer import step_one_by_one


class ParallelTrainer(ResumableTrainer):
    """``Trainer`` whose processes train what one would, batch by batch.

    accelerate wraps the model (DDP, FSDP2, DeepSpeed) as ``Strategy`` says. With one process it is
    Trainer as it is.

    Args:
        world: the processes of the run.
        strategy: how they share the work.
        kwargs: Trainer's own.
    """

    _weighs_tokens = True
    """Whether the loss of a step is the mean over its trained tokens, whatever their batches."""

    def __init__(self, world: World, strategy: Strategy, **kwargs: Any) -> None:
        # before Trainer's own, which makes the accelerator
        self.world, self.strategy = world, strategy
        self._plugin: Any = None
        self._mesh: Any = parallelism(strategy, world)
        self._names: list[list[str]] = []
        self._kernels: list[dict[str, Any]] = []
        self._loaded = False
        if world.several and strategy.context > 1:
            require_causal(kwargs["model"])
        if self.divides:
            tensor_parallel.divide(kwargs["model"], self._mesh.device_mesh["tp"])
        super().__init__(**kwargs)
        if world.several and self._weighs_tokens and not self.model_accepts_loss_kwargs:
            # its own is a mean over the process's tokens
            self.compute_loss_func = functools.partial(causal_loss, smoother=self.label_smoother)

    @property
    def _module(self) -> Any:
        return self.model

    @property
    def _schedule(self) -> Any:
        return self.lr_scheduler

    @property
    def _stepped(self) -> Any:
        """The optimizer inside accelerate's."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def shards(self) -> bool:
        """Whether each process has only a part of the weights."""
        return is_sharded(self.strategy, self.world)

    @property
    def writes_shards(self) -> bool:
        """Whether each process writes its part of a checkpoint."""
        fsdp = self.strategy.fsdp
        asked = fsdp is not None and fsdp.state_dict_type == "SHARDED_STATE_DICT"
        return asked and self.shards and not self.divides

    @property
    def divides(self) -> bool:
        """Whether layers are divided between processes (tensor parallelism)."""
        return self.world.several and self.strategy.tensor > 1

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return int(plugin.zero_stage) if plugin is not None else 0

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        args: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        fsdp = self.strategy.fsdp
        if fsdp is not None and uses_fsdp(self.strategy, self.world):
            self._plugin = args["fsdp_plugin"] = fsdp_plugin(fsdp, self._module)
        known = torch.cuda.is_available() and not (self._plugin is not None and self.divides)
        if self._mesh is not None and known:
            args["parallelism_config"] = self._mesh
        return args

    def _has_mixed_mesh_grads(self, model: Any) -> bool:
        own: Any = super()._has_mixed_mesh_grads
        return self.divides or bool(own(model))

    def create_optimizer(self, model: Any = None) -> Any:
        """Trainer's own; notes whose parameters the optimizer has, before they are sharded."""
        zero.require_one_dtype(self._module, self.args)
        optimizer = super().create_optimizer(model)
        if self.divides:
            self._kernels = step_one_by_one(optimizer)
        if self.world.several:
            self._names = names_by_group(self._module, optimizer)
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._loaded:  # before FSDP has sharded the weights: the files have whole ones
            return
        if not self.divides:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with readable(resume_from_checkpoint):
            state = trained_weights(Path(resume_from_checkpoint), self._module)
        load_weights(self._module, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        from_shards = checkpoint is not None and in_shards(Path(checkpoint))
        if checkpoint is None or not (self.shards or self.zero_stage or from_shards):
            super()._load_optimizer_and_scheduler(checkpoint)
            zero.drop_masters(self._stepped.state)
            return
        folder = Path(checkpoint)
        with readable(folder):
            optimizer, names = self.optimizer_and_names()
            if from_shards and in_parts(self._module) and not (self.zero_stage or self.divides):
                sharded.load_optimizer(folder, self._module, optimizer, names)
            else:
                self._load_state(sharded.read_optimizer(folder, names))
            if self.divides:
                step_one_by_one(self._stepped)
            schedule = torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)
            if self.zero_stage:
                schedule = zero.own_schedule(schedule, self._names)
            self._schedule.load_state_dict(schedule)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        share_in_groups(self.world)

    def _load_state(self, state: dict[str, Any]) -> None:
        """Give the optimizer a whole state, as every process has read it."""
        optimizer, names = self.optimizer_and_names()
        if self.zero_stage:
            zero.load_optimizer(self.deepspeed, state, names)
            return
        zero.drop_masters(state["state"])
        if self.shards:
            load_optimizer(self._module, optimizer, state, names)
        else:
            optimizer.load_state_dict(state)

    def optimizer_and_names(self) -> tuple[Any, list[list[str]]]:
        """The optimizer inside accelerate's, and the names of its parameters by group."""
        return self._stepped, self._names or names_by_group(self._module, self._stepped)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own; whole weights to resume from are loaded before they are sharded."""
        start = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        puts_together = self.zero_stage or self.divides
        if start is not None and (puts_together or (self.shards and not in_shards(start))):
            self._load_whole(str(start))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_whole(self, folder: str) -> None:
        with self._of_whole_weights():
            self._load_from_checkpoint(folder)
        self._loaded = True

    @contextlib.contextmanager
    def _of_whole_weights(self) -> Iterator[None]:
        """Let Trainer look for checkpoints of the form that they have without sharding."""
        enabled = self.is_fsdp_enabled, self.is_deepspeed_enabled
        self.is_fsdp_enabled = self.is_deepspeed_enabled = False
        try:
            yield
        finally:
            self.is_fsdp_enabled, self.is_deepspeed_enabled = enabled

    def _load_best_model(self) -> None:
        """Trainer's own; it would look for checkpoints of FSDP's or DeepSpeed's own forms."""
        model = self._module
        folder = Path(str(self.state.best_model_checkpoint))
        if in_shards(folder) and not (self.zero_stage and in_parts(model)):
            with readable(folder):
                sharded.load_weights(folder, model)
            return
        if not (self.shards and in_parts(model)):
            if hasattr(model, "peft_config"):
                with self._of_whole_weights():
                    super()._load_best_model()
            else:
                with readable(folder):
                    load_trained(folder, model)
            return
        with readable(folder):
            state = trained_weights(folder, model)
        if self.zero_stage:
            self._end_prefetch()
            zero.load_weights(model, state)
        else:
            load_weights(model, state)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not (self.writes_shards and self.args.hub_strategy == "every_save"):  # of whole weights
            super()._push_from_checkpoint(checkpoint_folder)

    def _end_prefetch(self) -> None:
        """Let ZeRO-3 finish what a forward pass has begun to gather for the next one."""
        if self.deepspeed is not None:  # there is none where no step was left to train
            self.deepspeed.empty_partition_cache()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resumed: Any) -> Any:
        """Trainer's own; it would ask DeepSpeed for a checkpoint of DeepSpeed's own form."""
        prepare: Any = super()._prepare_for_training
        if not self.zero_stage:
            return prepare(max_steps, train_dataloader, resumed)
        made = prepare(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resumed)
        return made

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; on a CPU it would replace FSDP by DDP without a word."""
        super().create_accelerator_and_postprocess()
        if self._plugin is not None or self._mesh is not None:
            use_mesh(self.accelerator, self._plugin, self._mesh)
        if self._plugin is not None:
            self.is_fsdp_enabled = True
        elif self.divides:
            # what accelerate asks for, so as not to wrap the model for DDP
            tensor_parallel.base_model(self._module)._tp_size = self.strategy.tensor

    def whole_state(self) -> dict[str, Any] | None:
        """The trained weights by their names, on rank 0, where each process has a part of them.

        None: every process has all of them in the model. A collective.
        """
        if not self.shards:
            return None
        adapters = hasattr(self.model, "peft_config")
        if self.zero_stage:
            self._end_prefetch()
            return zero.whole_weights(self._module, adapters, self.world.main)
        return whole_weights(self._module, adapters)

    def optimizer_state(self) -> dict[str, Any] | None:
        """The optimizer's whole state as it is with one process, on rank 0; a collective."""
        if self.zero_stage:
            return zero.whole_optimizer(self.deepspeed, self._names, self.world.main)
        if not self.shards:
            return self._stepped.state_dict() if self.world.main else None
        state = whole_optimizer(self._module, self._stepped, self._names)
        if state is not None and self.divides:
            for group, asked in zip(state["param_groups"], self._kernels, strict=True):
                group.update(asked)
        return state

    def schedule_state(self) -> dict[str, Any]:
        """The schedule's state as it is with one process."""
        state: dict[str, Any] = self._schedule.state_dict()
        return zero.whole_schedule(state, self._names) if self.zero_stage else state

    @property
    def _rows_per_batch(self) -> int:
        return int(self._train_batch_size)

    def _fillable(self, packs: Any) -> Any:
        """The sequences, where those with an inverted index train nothing."""
        return Fillable(packs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The batches of this process."""
        if not self.world.several:
            return super().get_train_dataloader()
        args, packs = self.args, self.train_dataset
        place = self._rows_per_batch, self.world.batch_rank, self.world.batch_ranks
        options: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        if isinstance(packs, IterableDataset):
            loader = DataLoader(RankStream(packs, *place), batch_size=place[0], **options)
        else:
            order: Any = self._get_train_sampler(packs)
            batches = RankBatches(order, *place, args.dataloader_drop_last)
            options["worker_init_fn"] = functools.partial(
                seed_worker, num_workers=args.dataloader_num_workers, rank=self.world.batch_rank
            )
            loader = DataLoader(self._fillable(packs), batch_sampler=batches, **options)  # type: ignore[arg-type]  # 2026-11-27: a sequence is a dataset
        # for the device, and for the number of the epoch; each process has its own batches already
        prepared: DataLoader[Any] = prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        return prepared
