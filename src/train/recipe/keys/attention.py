"""The keys of attention and experts, and of where things are kept in memory."""

from __future__ import annotations

from typing import Any, Literal

from .base import Keys, key, not_yet

_MEMORY_PLANNER = "fusewright's memory planner: it decides what each block keeps (key memory)"

_EXPERTS = "fusewright's rewrite moe_experts (key optimize)"
_SHARED_EXPERTS = "FSDP, which shards the weights of experts, too (key expert_parallel_size)"


class AttentionKeys(Keys):
    """Which implementations a model has, and what it keeps where."""

    attn_implementation: str | None = key(
        if_written=True,
        one_of=[
            "flash_attention",
            "xformers_attention",
            "sdp_attention",
            "flex_attention",
            "eager_attention",
            "s2_attention",
            "sage_attention",
        ],
    )
    """The attention of transformers, e.g. ``sdpa``, ``eager`` or ``flash_attention_2``. One whose
    package or GPU is not there is replaced by the model's own choice, with a message: the values
    are the same. Unset: the model's own choice, which is ``sdpa`` for nearly all."""

    sdp_attention: bool = False
    """The same as ``attn_implementation: sdpa``."""

    eager_attention: bool = False
    """The same as ``attn_implementation: eager``."""

    flex_attention: bool = False
    """The same as ``attn_implementation: flex_attention``."""

    experts_implementation: str | None = key(
        values={
            "scattermoe": ("subsumed", _EXPERTS),
            "sonicmoe": ("subsumed", _EXPERTS),
            "expert_parallel": ("subsumed", _SHARED_EXPERTS),
            "deep_ep": ("subsumed", _SHARED_EXPERTS),
        }
    )
    """The experts of transformers: ``eager``, ``batched_mm`` or ``grouped_mm``. Unset: the model's
    own choice."""

    quantize_moe_experts: bool = False
    """Quantize the bare weights of experts, too, as ``load_in_4bit`` or ``load_in_8bit`` does with
    linear layers. Where a layer is rewritten (``experts_implementation: grouped_mm``, the default
    of most models), one expert at a time is unpacked, and only if it has tokens; elsewhere all are,
    whenever they are read, and ``gradient_checkpointing`` saves memory."""

    # --- memory and place ------------------------------------------------------------------------

    gradient_checkpointing: bool | Literal["unsloth", "offload", "offload_disk"] = key(
        False,
        values={
            "unsloth": ("subsumed", _MEMORY_PLANNER),
            "offload": ("subsumed", _MEMORY_PLANNER),
            "offload_disk": ("subsumed", _MEMORY_PLANNER),
        },
    )
    """Gradient checkpointing: keep only the inputs of each block, and recompute the rest in
    backward. ``unsloth`` and ``offload`` are read as true."""

    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Arguments for torch's checkpointing, e.g. ``{use_reentrant: false}``. Unset:
    ``use_reentrant: false``."""

    device_map: Any = not_yet(
        "leave it out: a process trains on one device; fsdp_config or deepspeed shards the model "
        "over several",
        values={"auto": ("not applicable", "the whole model is on the training device")},
        resumable=True,
    )
    """Which layers are on which device, as in transformers. Unset: all on the training device."""

    max_memory: dict[int | Literal["cpu", "disk"], int | str] | None = not_yet(
        "use memory: 8GB for the whole budget of the process"
    )
    """The maximum memory for weights, by device. Unset: all that is free."""
