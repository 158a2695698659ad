"""``fsdp_config``: what FSDP shards, what it keeps, and how checkpoints of shards are written."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from .base import Int, Keys, key, subsumed

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
