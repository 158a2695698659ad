"""The keys of several devices and machines."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from .base import METHOD, Int, Keys, key, not_applicable, subsumed

Strategies = Literal[
    "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"
]
"""The sharding strategies of FSDP1, in the order of their numbers, which begin at 1."""

_NUMBERS = {1: "FULL_SHARD", 2: "SHARD_GRAD_OP", 3: "NO_SHARD", 4: "HYBRID_SHARD",
            5: "HYBRID_SHARD_ZERO2"}  # fmt: skip
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _strategy(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    return _NUMBERS.get(value, value) if isinstance(value, int) else _upper(value)


def _dtype(value: Any) -> Any:
    return _DTYPES.get(value, value) if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """The names of a list or of a text with commas; None where there are none."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.split(",") if name.strip()]


class FsdpKeys(Keys):
    """Settings of FSDP. Those of its first version are those that mean the same in the second."""

    older_prefix: ClassVar[str] = "fsdp_"

    version: Literal[1, 2] | None = key(
        values={1: ("subsumed", "FSDP2, which has an equivalent of each of its options")},
    )
    """Which FSDP. 1 runs as 2. Unset: 2."""

    auto_wrap_policy: Annotated[
        Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"] | None,
        BeforeValidator(_upper),
    ] = None
    """What is gathered at a time: a block, a module of ``min_num_params``, or the whole model.
    Unset: a block; modules by size if only ``min_num_params`` is set."""

    transformer_layer_cls_to_wrap: Annotated[list[str] | None, BeforeValidator(_listed)] = key(
        aliases=["transformer_cls_names_to_wrap"]
    )
    """The classes of the blocks, e.g. ``LlamaDecoderLayer``: a list, or names with commas between
    them. Unset: found by the model's structure."""

    min_num_params: Int | None = key(ge=0)
    """The number of parameters from which a module is a unit, with ``SIZE_BASED_WRAP``. Unset, or
    0: modules are not chosen by size."""

    reshard_after_forward: Annotated[bool | Strategies | None, BeforeValidator(_strategy)] = None
    """Free a block's gathered weights after its forward, and gather them again in backward; false
    needs more memory and less communication. Unset: true, or as ``sharding_strategy`` says."""

    sharding_strategy: Annotated[Strategies | None, BeforeValidator(_strategy)] = None
    """The same in FSDP1's words, or their numbers: ``FULL_SHARD`` is true, ``SHARD_GRAD_OP`` false;
    the hybrid ones are the same with ``dp_replicate_size``, and ``NO_SHARD`` is DDP. Unset: see
    ``reshard_after_forward``."""

    offload_params: bool | None = key(aliases=["cpu_offload"])
    """Keep the shards, their gradients and the optimizer's state in CPU memory. Unset: no."""

    cpu_offload_pin_memory: bool | None = None
    """Pin the CPU memory of ``offload_params``: faster copies, but memory that cannot be swapped
    out. Unset: yes."""

    activation_checkpointing: bool | None = None
    """Keep only the inputs of each block, as ``gradient_checkpointing`` does. Unset: no."""

    state_dict_type: Annotated[
        Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"] | None,
        BeforeValidator(_upper),
    ] = key(
        values={"LOCAL_STATE_DICT": ("subsumed", "SHARDED_STATE_DICT, which it runs as")},
    )
    """How checkpoints hold weights and the optimizer's state: ``FULL_STATE_DICT`` as a whole,
    gathered on one process; ``SHARDED_STATE_DICT`` in shards, of which each process writes its own.
    Any number of processes and any strategy resumes from both. Unset: ``FULL_STATE_DICT``."""

    final_state_dict_type: Annotated[
        Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT", "LOCAL_STATE_DICT"] | None,
        BeforeValidator(_upper),
    ] = subsumed("the result, which is always saved as a whole")
    """How the result is saved. Unset: as a whole."""

    mixed_precision_policy: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, BeforeValidator(_dtype)
    ] = None
    """The dtype of gathered weights, gradients and outputs: ``bf16``, ``fp16``, ``fp32``, or
    torch's names of them. Unset: the model's own."""

    backward_prefetch: Annotated[
        Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"] | None, BeforeValidator(_upper)
    ] = subsumed(
        "FSDP2, which gathers the next block while one is in backward",
    )
    """When backward gathers the next block. Unset: while one is in backward."""


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


_ALONE = {"lisa_n_layers or async_save": "set this or {key}, not both: that takes one process"}
_SHARDED = {
    **_ALONE,
    "use_dft or use_eaft": "set this or {key}, not both: {key} is a loss whose tiles need the "
    "whole output head in each process (DDP)",
}
_DIVIDED = {
    **_ALONE,
    "use_dft or use_eaft": "set this or {key}, not both",
    METHOD: "{key} is not trained with it: use fsdp_config or deepspeed",
    "kd_trainer": "kd_trainer is not trained with it: use fsdp_config or deepspeed",
}


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

    resumable = True

    fsdp: Annotated[list[Words] | bool | None, BeforeValidator(_words)] = key(excludes=_SHARDED)
    """Shard the model with FSDP2: true, or options as a list or a text, e.g. ``[full_shard,
    auto_wrap, offload]``, which mean the same as those of ``fsdp_config``. Unset: only where
    ``fsdp_config`` has a key."""

    fsdp_config: FsdpKeys | None = not_applicable(
        "what it holds has a status of its own",
        excludes=_SHARDED,
    )
    """Settings of FSDP; any key in it shards the model with FSDP2. Unset: none."""

    state_dict_type: Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"] | None = None
    """The same as ``fsdp_config.state_dict_type``. Unset: see there."""

    deepspeed: str | dict[str, Any] | None = key(excludes=_SHARDED)
    """The configuration of DeepSpeed, or its JSON file; ``auto`` values are taken from the recipe.
    ``deepspeed_configs/zero3.json`` and the like need no file. Unset: DeepSpeed is not used."""

    dp_shard_size: Int | None = key(ge=1, more_than=1, excludes=_ALONE)
    """Number of processes that share one copy of the weights, with FSDP. Unset, or 1: all of them,
    divided by ``dp_replicate_size``."""

    dp_replicate_size: Int | None = key(ge=1, more_than=1, excludes=_ALONE)
    """Number of copies of the weights: with FSDP, each is sharded (hybrid sharding). Unset: 1."""

    tensor_parallel_size: Int = key(
        1,
        ge=1,
        more_than=1,
        excludes=_DIVIDED,
    )
    """Devices that share each layer, by the plan that transformers has for the model. With FSDP
    they may be several groups; ``dp_shard_size`` and ``dp_replicate_size`` count groups then."""

    context_parallel_size: Int = key(
        1,
        aliases=["sequence_parallel_degree"],
        ge=1,
        more_than=1,
        excludes=_DIVIDED,
    )
    """Devices that share each sequence, by torch's ring attention. GPUs only."""

    context_parallel: ContextParallelKeys | None = not_applicable(
        "what it holds has a status of its own"
    )
    """The same with separate settings. Unset: see ``context_parallel_size``."""

    expert_parallel_size: Int = subsumed(
        "FSDP, which shards the weights of experts with all others: the gradients are the same",
        1,
        ge=1,
        more_than=1,
        excludes=_SHARDED,
    )
    """Devices that share the experts. The model is sharded with FSDP2, which shares the weights of
    experts like all others; ``dp_shard_size`` processes times this many share one copy."""

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

    def packs_sequences(self) -> bool:
        """Whether the keys of rows make packs of samples, for training or validation."""
        return False

    def one_process(self) -> str | None:
        """A key of another subject, as it is written, that means one process; None: none does."""
        return None
