"""Which part of the weights and optimizer states each process has.

``Sharding`` covers DDP, FSDP2, DeepSpeed's ZeRO and tensor parallelism: it tells accelerate how to
wrap the model, loads a checkpoint into the parts of each process, and gathers them for one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...optim import blockwise
from ...sharding import has_shards
from ..checkpoint import sharded
from ..checkpoint.load import load_trained, readable, trained_weights
from ..model.files import in_shards
from ..model.relora import relora_of
from ..processes import gather, tensor_parallel, zero
from ..processes.context_parallel import Parts, gathers, require_causal
from ..processes.mesh import is_sharded, parallelism, use_mesh, uses_fsdp
from ..processes.world import World
from ..processes.wrapping import fsdp_plugin
from ..recipe.strategy import Strategy
from .optimizer import step_one_by_one


class Sharding:
    """How the processes of a run share the model of a trainer.

    Model, optimizer and accelerator are the trainer's at the time of each call. accelerate wraps
    the model (DDP, FSDP2, DeepSpeed) by ``strategy``; with one process nothing is shared.
    """

    def __init__(self, trainer: Any, world: World, strategy: Strategy) -> None:
        self.trainer, self.world, self.strategy = trainer, world, strategy
        self._plugin: Any = None
        self._mesh: Any = parallelism(strategy, world)
        self.parts = Parts(world, strategy) if world.several and gathers(strategy) else None
        # as with one process: names by group, and the kernels that each group used
        self._names: list[list[str]] = []
        self._kernels: list[dict[str, Any]] = []
        self._loaded = False

    @property
    def model(self) -> Any:
        """The trained model; with FSDP, once it is wrapped, the wrapped one."""
        return self.trainer.model

    @property
    def optimizer(self) -> Any:
        """The optimizer inside accelerate's."""
        return getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)

    @property
    def shards(self) -> bool:
        """Whether each process has only a part of the weights."""
        return is_sharded(self.strategy, self.world)

    @property
    def writes_shards(self) -> bool:
        """Whether each process writes its part of a checkpoint."""
        fsdp = self.strategy.fsdp
        sharded_files = fsdp is not None and fsdp.state_dict_type == "SHARDED_STATE_DICT"
        return sharded_files and self.shards and not self.divides

    @property
    def divides(self) -> bool:
        """Whether layers are divided between processes (tensor parallelism)."""
        return self.world.several and self.strategy.tensor > 1

    @property
    def zero_stage(self) -> int:
        """The stage of DeepSpeed's ZeRO; 0 without it."""
        plugin = getattr(self.trainer.accelerator.state, "deepspeed_plugin", None)
        return int(plugin.zero_stage) if plugin is not None else 0

    # --- how the model is wrapped ----------------------------------------------------------------

    def divide(self, model: Any) -> None:
        """Divide the layers, before the accelerator is made.

        Raises:
            RecipeError: the processes cannot share sequences of this model.
        """
        if self.world.several and self.strategy.context > 1:
            require_causal(model)
        if self.divides:
            tensor_parallel.divide(model, self._mesh.device_mesh["tp"])

    def accelerator_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Add what accelerate needs: FSDP's plugin, and the mesh."""
        fsdp = self.strategy.fsdp
        if fsdp is not None and uses_fsdp(self.strategy, self.world):
            self._plugin = arguments["fsdp_plugin"] = fsdp_plugin(fsdp, self.model)
        known = torch.cuda.is_available() and not (self._plugin is not None and self.divides)
        if self._mesh is not None and known:
            arguments["parallelism_config"] = self._mesh
        return arguments

    def adjust_accelerator(self) -> None:
        """Make the accelerator shard as requested; on a CPU it would not."""
        if self._plugin is not None or self._mesh is not None:
            use_mesh(self.trainer.accelerator, self._plugin, self._mesh)
        if self._plugin is not None:
            self.trainer.is_fsdp_enabled = True
        elif self.divides:
            # what accelerate asks for, so as not to wrap the model for DDP
            tensor_parallel.base_model(self.model)._tp_size = self.strategy.tensor

    def note_parameters(self, optimizer: Any) -> None:
        """Record the optimizer's parameters, before they are sharded."""
        if self.divides:
            self._kernels = step_one_by_one(optimizer)
        if self.world.several:
            self._names = gather.names_by_group(self.model, optimizer)

    # --- from a checkpoint -----------------------------------------------------------------------

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Let Trainer look for checkpoints of the form that they have without sharding."""
        trainer = self.trainer
        enabled = trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled
        trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
        try:
            yield
        finally:
            trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = enabled

    def load_before_sharding(self, folder: Path) -> None:
        """Load whole weights before they are sharded, where they cannot be read into shards."""
        if self.zero_stage or self.divides or (self.shards and not in_shards(folder)):
            with self.unsharded():
                self.trainer._load_from_checkpoint(str(folder))
            self._loaded = True

    def load_weights(self, folder: Path) -> bool:
        """Load the weights of a checkpoint; False for an adapter's, which Trainer loads as well."""
        if self._loaded:  # before they were sharded
            return True
        model = self.model
        if self._load_adapters(folder):
            return True
        if self.divides:
            gather.load_weights(model, trained_weights(folder, model))
        elif in_shards(folder):
            sharded.load_weights(folder, model)
        elif not hasattr(model, "peft_config"):
            load_trained(folder, model)
        else:
            return False
        return True

    def load_best(self, folder: Path) -> bool:
        """Load the best checkpoint's weights; False for an adapter's, which Trainer loads too."""
        model = self.model
        if self._load_adapters(folder):
            return True
        parts = self.shards and has_shards(model)
        with readable(folder):
            if in_shards(folder) and not (self.zero_stage and has_shards(model)):
                sharded.load_weights(folder, model)
                return True
            if not parts:
                if hasattr(model, "peft_config"):
                    return False
                load_trained(folder, model)
                return True
            weights = trained_weights(folder, model)
        if self.zero_stage:
            self._end_prefetch()
            zero.load_weights(model, weights)
        else:
            gather.load_weights(model, weights)
        return True

    def _load_adapters(self, folder: Path) -> bool:
        """Load the adapters that the base has taken in, and the last one; False without any."""
        relora = relora_of(self.model)
        if relora is None:
            return False
        relora.load(trained_weights(folder, self.model))
        return True

    def load_optimizer(self, folder: Path) -> bool:
        """Load the optimizer and the schedule; False where nothing is sharded, and Trainer can."""
        from_shards = in_shards(folder)
        in_blocks = blockwise.of_bitsandbytes(self.optimizer)
        if not (self.shards or self.zero_stage or from_shards or in_blocks):
            return False
        optimizer, names = self.optimizer_and_names()
        whole = self.zero_stage or self.divides or not has_shards(self.model)
        if from_shards and not whole:
            sharded.load_optimizer(folder, self.model, optimizer, names)
        else:
            self._load_whole_optimizer(sharded.read_optimizer(folder, names), names)
        if self.divides:
            step_one_by_one(self.optimizer)
        schedule = torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)
        if self.zero_stage:
            schedule = zero.schedule_of_groups(schedule, self._names)
        self.trainer.lr_scheduler.load_state_dict(schedule)
        return True

    def _load_whole_optimizer(self, state: dict[str, Any], names: list[list[str]]) -> None:
        state = blockwise.expanded(state)
        if self.zero_stage:
            zero.load_optimizer(self.trainer.deepspeed, state, names)
            return
        zero.drop_masters(state["state"])
        if self.shards and not blockwise.of_bitsandbytes(self.optimizer):
            gather.load_optimizer(self.model, self.optimizer, state, names)
        elif self.shards:
            self.optimizer.load_state_dict(state)
        else:
            self.optimizer.load_state_dict(blockwise.stored(state, requantize=True))

    # --- into a checkpoint -----------------------------------------------------------------------

    def optimizer_and_names(self) -> tuple[Any, list[list[str]]]:
        """The optimizer inside accelerate's, and the names of its parameters by group."""
        return self.optimizer, self._names or gather.names_by_group(self.model, self.optimizer)

    def whole_state(self) -> dict[str, Any] | None:
        """The trained weights by name, on rank 0; None if all processes have all. A collective."""
        if not self.shards:
            return None
        adapters = hasattr(self.model, "peft_config")
        if self.zero_stage:
            self._end_prefetch()
            return zero.whole_weights(self.model, adapters, self.world.main)
        return gather.whole_weights(self.model, adapters)

    def optimizer_state(self) -> dict[str, Any] | None:
        """The optimizer's state on rank 0, in the form of one process; a collective."""
        if self.zero_stage:
            return zero.whole_optimizer(self.trainer.deepspeed, self._names, self.world.main)
        if not self.shards:
            return self.optimizer.state_dict() if self.world.main else None
        state = gather.whole_optimizer(self.model, self.optimizer, self._names)
        if state is not None and blockwise.of_bitsandbytes(self.optimizer):
            state = blockwise.stored(state)
        if state is not None and self.divides:
            for group, kernels in zip(state["param_groups"], self._kernels, strict=True):
                group.update(kernels)
        return state

    def schedule_state(self) -> dict[str, Any]:
        """The schedule's state in the form of one process."""
        state: dict[str, Any] = self.trainer.lr_scheduler.state_dict()
        return zero.whole_schedule(state, self._names) if self.zero_stage else state

    def _end_prefetch(self) -> None:
        """Let ZeRO-3 finish what a forward pass has begun to gather for the next one."""
        if self.trainer.deepspeed is not None:  # there is none where no step was left to train
            self.trainer.deepspeed.empty_partition_cache()
