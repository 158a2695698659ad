"""The processes of a run as accelerate's mesh: replicas, shards, context and tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import RecipeError
from ..recipe.deepspeed_config import stage
from ..recipe.strategy import Strategy
from .context_parallel import gathers
from .world import World


def uses_fsdp(strategy: Strategy, world: World) -> bool:
    """Whether FSDP has anything to shard: it has not where one group has all processes."""
    return strategy.fsdp is not None and world.size > strategy.tensor


def parallelism(strategy: Strategy, world: World) -> Any:
    """Accelerate's mesh of processes; None with DeepSpeed, or if all share one copy.

    Of tensor parallelism with FSDP, accelerate is told nothing: what it does then is for older
    versions of transformers. Its mesh has the dimension ``tp`` all the same, over which nothing is
    sharded or averaged.

    Raises:
        RecipeError: nothing would be left to shard.
    """
    if not world.several or strategy.engine == "deepspeed":
        return None
    # with ``Parts``, processes that share sequences are ordinary ones where gradients are averaged
    among = strategy.context if gathers(strategy) else 1
    group, context = strategy.group // among, strategy.context // among
    if strategy.replicate == 1 and group == 1:
        return None
    from accelerate.parallelism_config import ParallelismConfig

    groups = {"tp_size": strategy.tensor, "cp_size": context}
    if not uses_fsdp(strategy, world):
        config = ParallelismConfig(**groups) if group > 1 else None
    else:
        copies = strategy.replicate
        shard = strategy.shard * among or world.size // copies // group
        if group > 1 and copies > 1 and shard == 1:
            raise RecipeError(
                f"dp_replicate_size: {copies} copies leave each group of processes nothing to "
                "shard: lower it, or start more processes"
            )
        sizes = {"dp_replicate_size": copies, "dp_shard_size": shard}
        config = ParallelismConfig(**sizes, **groups)
        if strategy.tensor > 1:
            whole = config.get_device_mesh(device_type())
            config = ParallelismConfig(**sizes, cp_size=context)
            config.device_mesh = whole
    if config is not None:
        config.get_device_mesh(device_type())
    return config


def is_sharded(strategy: Strategy, world: World) -> bool:
    """Whether each process has only a part of the weights."""
    if not world.several:
        return False
    if strategy.engine == "deepspeed":
        return bool(stage(strategy.deepspeed or {}) == 3)
    return strategy.tensor > 1 or uses_fsdp(strategy, world)


def processes_message(strategy: Strategy, world: World) -> str | None:
    """The message about the processes of a run; None: there is nothing to say."""
    if not world.several:
        if strategy.engine == "ddp":
            return None
        alone = f"{strategy.engine}: one process has all the weights, so they are not sharded"
        return "; ".join([alone, *_unused(strategy)])
    parts = [f"processes: {world.size}"]
    if strategy.engine == "deepspeed":
        parts.append(f"DeepSpeed ZeRO-{stage(strategy.deepspeed or {})}")
    elif uses_fsdp(strategy, world):
        several = strategy.replicate > 1
        what = f"{strategy.replicate} copies of the weights, each" if several else "weights are"
        parts.append(f"{what} sharded (FSDP2)")
    elif strategy.group == 1:
        parts.append("each has all the weights (DDP)")
    if strategy.tensor > 1:
        parts.append(f"{strategy.tensor} share each layer (tensor parallelism)")
    if strategy.context > 1:
        parts.append(f"{strategy.context} share each sequence (context parallelism)")
    if not uses_fsdp(strategy, world):
        parts += _unused(strategy)
    return "; ".join(parts)


def _unused(strategy: Strategy) -> list[str]:
    """Options of FSDP without effect where it has nothing to shard."""
    fsdp = strategy.fsdp
    if fsdp is None:
        return []
    options = {
        "offload_params": fsdp.offload_params,
        "mixed_precision_policy": fsdp.mixed_precision is not None,
    }
    names = [f"fsdp_config.{name}" for name, is_set in options.items() if is_set]
    return [f"{' and '.join(names)}: not used, nothing is sharded"] if names else []


def device_type() -> str:
    """The type of device that the processes of a run compute on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_mesh(accelerator: Any, plugin: Any, mesh: Any) -> None:
    """Make an accelerator shard by FSDP, or over a mesh, as it would not by itself.

    It assumes that either needs a GPU, and that it knows all dimensions of a mesh. ``plugin`` is
    from ``fsdp_plugin`` (None: FSDP shards nothing), ``mesh`` from ``parallelism``.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    state = accelerator.state
    if plugin is not None and getattr(state, "fsdp_plugin", None) is None:
        for shared in (AcceleratorState._shared_state, PartialState._shared_state):
            shared["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
    if mesh is not None and getattr(state, "parallelism_config", None) is not mesh:
        AcceleratorState._shared_state["parallelism_config"] = mesh
        AcceleratorState._shared_state["device_mesh"] = mesh.get_device_mesh(device_type())
