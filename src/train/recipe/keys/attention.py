"""The keys of attention and experts, and of where things are kept in memory."""

from __future__ import annotations

from typing import Any, Literal

from .base import Float, Int, Keys, key, not_applicable, not_yet, subsumed

_OWN_MEMORY = "fusewright's memory planner: it decides what each block keeps (key memory)"

_EXPERTS = "fusewright's rewrite moe_experts (key optimize)"
_SHARED_EXPERTS = "use fsdp_config, which also shards the weights of experts"


class AttentionKeys(Keys):
    """Which implementations a model has, and what it keeps where."""

    attn_implementation: str | None = None
    """The attention of transformers, e.g. ``sdpa``, ``eager`` or ``flash_attention_2``. One whose
    package or GPU is not there is replaced by the model's own choice, with a message: the values
    are the same. Unset: the model's own choice, which is ``sdpa`` for nearly all."""

    sdp_attention: bool = False
    """The same as ``attn_implementation: sdpa``."""

    eager_attention: bool = False
    """The same as ``attn_implementation: eager``."""

    flex_attention: bool = False
    """The same as ``attn_implementation: flex_attention``."""

    flex_attn_compile_kwargs: dict[str, Any] | None = not_applicable(
        "whole blocks are compiled: see codegen"
    )
    """Arguments of ``torch.compile`` for flex attention. Unset: none."""

    flash_attention: bool | None = subsumed(
        "torch's scaled dot-product attention, which has a flash kernel on GPUs; "
        "attn_implementation: flash_attention_2 asks for the package itself"
    )
    """Flash attention, which never stores the matrix of scores. Unset: not requested."""

    xformers_attention: bool | None = subsumed("torch's scaled dot-product attention")
    """The attention of the package xFormers. Unset: not requested."""

    s2_attention: bool | None = not_yet("leave it out, and lower sequence_len if memory is short")
    """Shifted sparse attention (LongLoRA). Unset: no."""

    sage_attention: bool | None = subsumed(
        "torch's scaled dot-product attention, which rounds no products to 8 bits"
    )
    """Attention with quantized products (SageAttention). Unset: no."""

    gemma4_hybrid_attn_impl: bool | None = subsumed("torch's scaled dot-product attention")
    """Two kinds of attention in one model. Unset: no."""

    experts_implementation: str | None = key(
        values={
            "scattermoe": ("subsumed", _EXPERTS),
            "sonicmoe": ("subsumed", _EXPERTS),
            "expert_parallel": ("not yet available", _SHARED_EXPERTS),
            "deep_ep": ("not yet available", _SHARED_EXPERTS),
        }
    )
    """The experts of transformers: ``eager``, ``batched_mm`` or ``grouped_mm``. Unset: the model's
    own choice."""

    quantize_moe_experts: bool = False
    """Quantize the bare weights of experts, too, as ``load_in_4bit`` or ``load_in_8bit`` does with
    linear layers. They are unpacked whenever they are read, so ``gradient_checkpointing`` saves
    memory."""

    scaling_softmax: bool | None = not_yet("leave it out")
    """Scale the scores by the logarithm of the length (SSMax). Unset: no."""

    scaling_softmax_factor: Float | None = not_applicable("only scaling_softmax reads it")
    """The factor of that scale. Unset: 0.43."""

    scaling_softmax_bias: Float | None = not_applicable("only scaling_softmax reads it")
    """The bias of that scale. Unset: 0."""

    # --- memory and place ------------------------------------------------------------------------

    gradient_checkpointing: bool | Literal["unsloth", "offload", "offload_disk"] = key(
        False,
        values={
            "unsloth": ("subsumed", _OWN_MEMORY),
            "offload": ("subsumed", _OWN_MEMORY),
            "offload_disk": ("subsumed", _OWN_MEMORY),
        },
    )
    """Gradient checkpointing: keep only the inputs of each block, and recompute the rest in
    backward. ``unsloth`` and ``offload`` are read as true."""

    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Arguments for torch's checkpointing, e.g. ``{use_reentrant: false}``. Unset:
    ``use_reentrant: false``."""

    activation_offloading: bool | Literal["legacy", "disk"] | None = subsumed(_OWN_MEMORY)
    """Keep activations in CPU memory. Unset: no."""

    layer_offloading: bool | None = not_yet("use adapter: qlora, which needs less memory")
    """Keep frozen layers in CPU memory until they are used. Unset: no."""

    ple_cpu_offload: bool = not_yet("leave it out: all weights are on the training device", False)
    """Keep embeddings of single layers in CPU memory."""

    low_cpu_mem_usage: bool | None = subsumed("transformers, which always loads shard by shard")
    """Load the weights without a second copy in CPU memory. Unset: yes."""

    device: Any = not_applicable("the trainer uses the GPU if there is one, else the CPU")
    """The device of the model. Unset: chosen by the machine."""

    device_map: Any = not_yet(
        "leave it out: a process trains on one device; fsdp_config or deepspeed shards the model "
        "over several",
        values={"auto": ("not applicable", "the whole model is on the training device")},
    )
    """Which layers are on which device, as in transformers. Unset: all on the training device."""

    max_memory: dict[int | Literal["cpu", "disk"], int | str] | None = not_yet(
        "use memory: 8GB for the whole budget of the process"
    )
    """The maximum memory for weights, by device. Unset: all that is free."""

    gpu_memory_limit: Int | str | None = not_yet("use memory: 8GB for the process")
    """The maximum memory for weights on each GPU. Unset: all that is free."""

    embeddings_skip_upcast: bool | None = not_applicable("embeddings keep the dtype of the weights")
    """Leave the embeddings in 16 bits where weights are quantized. Unset: yes."""

    use_kernels: bool | None = subsumed("fusewright's own kernels (key optimize)")
    """Kernels from the hub's package ``kernels``. Unset: no."""

    experimental_skip_move_to_device: bool | None = not_applicable(
        "weights are loaded onto the training device"
    )
    """Do not move the model before it is sharded. Unset: yes."""
