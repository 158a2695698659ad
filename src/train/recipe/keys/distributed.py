"""The keys of several devices and machines."""

from __future__ import annotations

from typing import Any, Literal

from .base import Int, Keys, not_applicable, not_yet

_ONE = (
    "remove the key: training uses one device; adapter: qlora and a smaller micro_batch_size need "
    "the least memory"
)
_LAUNCHER = "there is one process"


class DistributedKeys(Keys):
    """Several processes. One does all the work so far."""

    fsdp: list[str] | str | None = not_yet(_ONE)
    """Options of FSDP, e.g. ``[full_shard, auto_wrap]``. Unset: no sharding."""

    fsdp_config: dict[str, Any] | None = not_yet(_ONE)
    """Settings of FSDP. Unset: none."""

    fsdp_version: Int | None = not_applicable("only fsdp_config reads it")
    """Which FSDP: 1 or 2. Unset: 1."""

    fsdp_final_state_dict_type: str | None = not_applicable("only fsdp_config reads it")
    """How FSDP saves the result. Unset: as a whole."""

    deepspeed: str | dict[str, Any] | None = not_yet(_ONE)
    """The configuration of DeepSpeed, or its file. Unset: none."""

    deepcompile: bool | None = not_applicable("only deepspeed reads it")
    """Let DeepSpeed compile the model. Unset: no."""

    tensor_parallel_size: Int = not_yet(_ONE, 1)
    """Devices that share each layer."""

    context_parallel_size: Int = not_yet(_ONE, 1)
    """Devices that share each sequence."""

    sequence_parallel_degree: Int = not_yet(_ONE, 1)
    """The same by its old name."""

    dp_shard_size: Int = not_yet(_ONE, 1)
    """Devices that share the weights."""

    dp_replicate_size: Int = not_yet(_ONE, 1)
    """Copies of the weights."""

    expert_parallel_size: Int = not_yet(_ONE, 1)
    """Devices that share the experts."""

    heads_k_stride: Int | None = not_applicable("only context_parallel_size reads it")
    """Heads per exchange of ring attention. Unset: 1."""

    ring_attn_func: str | None = not_applicable("only context_parallel_size reads it")
    """Which ring attention. Unset: by ``sample_packing``."""

    ddp: bool | None = not_applicable(_LAUNCHER)
    """Gradients are averaged over processes. Unset: seen from the launcher."""

    ddp_timeout: Int | None = not_applicable(_LAUNCHER)
    """Longest wait for another process, in seconds. Unset: 1800."""

    ddp_bucket_cap_mb: Int | None = not_applicable(_LAUNCHER)
    """Size of a bucket of gradients, in MB. Unset: torch's default."""

    ddp_broadcast_buffers: bool | None = not_applicable(_LAUNCHER)
    """Send buffers to all processes at each step. Unset: torch's default."""

    ddp_find_unused_parameters: bool | None = not_applicable(_LAUNCHER)
    """Look for parameters without a gradient. Unset: no."""

    world_size: Int | None = not_applicable(_LAUNCHER)
    """Number of processes. Unset: seen from the launcher."""

    local_rank: Int | None = not_applicable(_LAUNCHER)
    """The number of this process on its machine. Unset: seen from the launcher."""

    use_ray: bool = not_yet("run fusewright train on the machine itself", False)
    """Run by Ray."""

    ray_run_name: str | None = not_applicable("Ray is not used")
    """Name of the run in Ray. Unset: none."""

    ray_num_workers: Int = not_applicable("Ray is not used", 1)
    """Processes that Ray starts."""

    resources_per_worker: dict[str, Any] | None = not_applicable("Ray is not used")
    """What Ray gives to each process. Unset: one GPU."""

    dynamic_checkpoint: dict[str, Any] | None = not_yet("Ctrl-C saves and ends")
    """Save when a file appears. Unset: no."""

    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None = not_applicable(
        _LAUNCHER
    )
    """How shards are saved. Unset: as a whole."""
