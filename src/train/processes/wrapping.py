"""From the strategy of a recipe to accelerate's settings."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..recipe.strategy import Fsdp, Strategy
from .world import World


def fsdp_plugin(fsdp: Fsdp, model: nn.Module) -> Any:
    """Accelerate's settings of FSDP2.

    Args:
        fsdp: those of the recipe.
        model: which is to be sharded.
    """
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    policies = {
        "transformer": "transformer_based_wrap", "size": "size_based_wrap", "none": "no_wrap",
    }  # fmt: skip
    given: dict[str, Any] = {
        "fsdp_version": 2,
        "auto_wrap_policy": policies[fsdp.wrap],
        "reshard_after_forward": fsdp.reshard_after_forward,
        "state_dict_type": fsdp.state_dict_type,
        "cpu_ram_efficient_loading": fsdp.cpu_ram_efficient_loading,
        "activation_checkpointing": False,  # blocks do that themselves: Recipe.checkpointing
    }
    if fsdp.offload_params:
        given["cpu_offload"] = CPUOffloadPolicy(pin_memory=fsdp.pin_memory)
    if fsdp.wrap == "transformer":
        given["transformer_cls_names_to_wrap"] = list(fsdp.classes) or block_classes(model)
    if fsdp.wrap == "size":
        given["min_num_params"] = fsdp.min_num_params
    if fsdp.mixed_precision is not None:
        dtype = getattr(torch, fsdp.mixed_precision)
        given["mixed_precision_policy"] = MixedPrecisionPolicy(param_dtype=dtype)
    return FullyShardedDataParallelPlugin(**given)


def block_classes(model: nn.Module) -> list[str]:
    """The classes of the model's blocks: the elements of its repeated lists of modules."""
    from ...compiler.regions import find

    return sorted({type(r.module).__name__ for r in find(model) if r.kind == "block"})


def parallelism(strategy: Strategy, world: World) -> Any:
    """Accelerate's mesh of processes for HSDP; None: all of them share one copy of the weights."""
    if strategy.replicate == 1:
        return None
    from accelerate.parallelism_config import ParallelismConfig

    shard = strategy.shard or world.size // strategy.replicate
    return ParallelismConfig(dp_replicate_size=strategy.replicate, dp_shard_size=shard)


def use_fsdp(accelerator: Any, plugin: Any, config: Any) -> None:
    """Make an accelerator shard by FSDP where it thinks that there must be a GPU for it.

    Args:
        accelerator: which has been made.
        plugin: its settings of FSDP.
        config: the mesh of processes, or None.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    state = accelerator.state
    if getattr(state, "fsdp_plugin", None) is not None:
        return
    for shared in (AcceleratorState._shared_state, PartialState._shared_state):
        shared["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if config is not None:
        state.parallelism_config = config
        state.device_mesh = config.get_device_mesh(accelerator.device.type)
        config._validate_accelerator(accelerator)


def deepspeed_state() -> dict[str, Any]:
    """Arguments of the Trainer for DeepSpeed, whose processes accelerate counts on GPUs only."""
    if torch.cuda.is_available():
        return {}
    from accelerate.state import AcceleratorState, PartialState
    from torch import distributed as dist

    name = "ACCELERATE_USE_DEEPSPEED"
    before = os.environ.get(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ[name] = "true"
    try:
        state: Any = PartialState()
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
    state.backend, state.device = "gloo", torch.device("cpu")
    state.num_processes, state.process_index = dist.get_world_size(), dist.get_rank()
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
