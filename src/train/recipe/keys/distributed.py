"""The keys of several devices and machines."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from .base import METHOD, Int, Keys, key, not_applicable, not_yet
from .fsdp import FsdpKeys

Words = Literal[
    "full_shard", "shard_grad_op", "no_shard", "hybrid_shard", "hybrid_shard_zero2", "offload",
    "auto_wrap",
]  # fmt: skip
"""The options of ``fsdp`` that transformers has, too."""

_LAUNCHER = (
    "the launcher sets it: torchrun, accelerate launch, deepspeed, SLURM, or fusewright train "
    "--nproc"
)
_SHARED_EXPERTS = "only expert_parallel_size reads it"
_RING = "torch's own ring attention"


_LISA = "set this or lisa_n_layers, not both: LISA trains with one process"
_WHOLE_HEAD = (
    "set this or {key}, not both: {key} is a loss whose tiles need the whole output head in each "
    "process (DDP)"
)


def _words(value: Any) -> Any:
    """The options of a text or a list, in lower case."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    if isinstance(value, list):
        return [word.lower() if isinstance(word, str) else word for word in value]
    return value


class ContextParallelKeys(Keys):
    """Settings of context parallelism."""

    size: Int | None = key(ge=1)
    """The same as ``context_parallel_size``. Unset: see there."""


class DistributedKeys(Keys):
    """Several processes: which engine shares the work, and how. Without any of them it is DDP."""

    fsdp: Annotated[list[Words] | bool | None, BeforeValidator(_words)] = key(
        excludes={"lisa_n_layers": _LISA, "use_dft or use_eaft": _WHOLE_HEAD}
    )
    """Shard the model with FSDP2: true, or options as a list or a text, e.g. ``[full_shard,
    auto_wrap, offload]``, which mean the same as those of ``fsdp_config``. Unset: only where
    ``fsdp_config`` has a key."""

    fsdp_config: FsdpKeys | None = not_applicable(
        "what it holds has a status of its own",
        excludes={"lisa_n_layers": _LISA, "use_dft or use_eaft": _WHOLE_HEAD},
    )
    """Settings of FSDP; any key in it shards the model with FSDP2. Unset: none."""

    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None = None
    """The same as ``fsdp_config.state_dict_type``. Unset: see there."""

    deepspeed: str | dict[str, Any] | None = key(
        excludes={"lisa_n_layers": _LISA, "use_dft or use_eaft": _WHOLE_HEAD}
    )
    """The configuration of DeepSpeed, or its JSON file; ``auto`` values are taken from the recipe.
    ``deepspeed_configs/zero3.json`` and the like need no file. Unset: DeepSpeed is not used."""

    dp_shard_size: Int | None = key(ge=1, more_than=1, excludes={"lisa_n_layers": _LISA})
    """Number of processes that share one copy of the weights, with FSDP. Unset, or 1: all of them,
    divided by ``dp_replicate_size``."""

    dp_replicate_size: Int | None = key(ge=1, more_than=1, excludes={"lisa_n_layers": _LISA})
    """Number of copies of the weights: with FSDP, each is sharded (hybrid sharding). Unset: 1."""

    tensor_parallel_size: Int = key(
        1,
        ge=1,
        more_than=1,
        excludes={
            "lisa_n_layers": _LISA,
            "use_dft or use_eaft": "set this or {key}, not both",
            METHOD: "{key} is not trained with it: use fsdp_config or deepspeed",
            "kd_trainer": "kd_trainer is not trained with it: use fsdp_config or deepspeed",
        },
    )
    """Devices that share each layer, by the plan that transformers has for the model. With FSDP
    they may be several groups; ``dp_shard_size`` and ``dp_replicate_size`` count groups then."""

    context_parallel_size: Int = key(
        1,
        aliases=["sequence_parallel_degree"],
        ge=1,
        more_than=1,
        excludes={
            "lisa_n_layers": _LISA,
            "use_dft or use_eaft": "set this or {key}, not both",
            METHOD: "{key} is not trained with it: use fsdp_config or deepspeed",
            "kd_trainer": "kd_trainer is not trained with it: use fsdp_config or deepspeed",
        },
    )
    """Devices that share each sequence, by torch's ring attention. GPUs only."""

    context_parallel: ContextParallelKeys | None = not_applicable(
        "what it holds has a status of its own"
    )
    """The same with settings of its own. Unset: see ``context_parallel_size``."""

    expert_parallel_size: Int = not_yet(
        "leave it out, and use fsdp_config (with dp_shard_size), which shares the weights of the "
        "experts between devices, too: transformers can only place experts while it loads a model, "
        "before adapters and new tokens are there",
        1,
        ge=1,
    )
    """Devices that share the experts."""

    ddp: bool | None = None
    """Gradients are averaged over processes, which all have the whole model; false: one process is
    meant, and several are an error. Unset: with several processes, unless the model is sharded."""

    ddp_timeout: Int | None = key(gt=0)
    """Longest wait for another process, in seconds. Unset: 1800."""

    ddp_bucket_cap_mb: Int | None = key(gt=0)
    """Size of a bucket of gradients, in MB. Unset: torch's default."""

    ddp_broadcast_buffers: bool | None = None
    """Send buffers to all processes at each step. Unset: torch's default."""

    ddp_find_unused_parameters: bool | None = None
    """Look for parameters without a gradient. Unset: yes, unless blocks are checkpointed."""
