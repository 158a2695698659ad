"""The keys that switch on other engines' kernels and patches. The compiler does what they do."""

from __future__ import annotations

from typing import Any, Literal

from ..base import Int, Keys, UnreadKeys, not_applicable, subsumed, unread

_RULE = "fusewright's rewrite {} (key optimize)"
_CE = _RULE.format("linear_cross_entropy")
_NORM = _RULE.format("rms_norm")
_LORA = _RULE.format("lora_linear")
_EXPERTS = _RULE.format("moe_experts")
_ATTENTION = _RULE.format("attention")
_CODEGEN = "code generation for each block (key codegen)"
_OWN_MEMORY = "fusewright's memory planner: it decides what each block keeps (key memory)"
_TUNED = "only the kernels of Axolotl read it"
_SAVED = unread("subsumed", _OWN_MEMORY)


class SelectiveCheckpointingKeys(UnreadKeys):
    """``selective_checkpointing``: what a checkpointed block keeps."""

    offload: Any = _SAVED
    recompute_layer_types: Any = _SAVED
    save: Any = _SAVED
    save_matmul_min_k: Any = _SAVED
    save_modules: Any = _SAVED
    save_sliding_window: Any = _SAVED


class SubsumedKeys(Keys):
    """Kernels and patches of other engines."""

    liger_rope: bool | None = subsumed(_RULE.format("rope"))
    """Liger's rotary embedding. Unset: no."""

    liger_rms_norm: bool | None = subsumed(_NORM)
    """Liger's RMS norm. Unset: no."""

    liger_rms_norm_gated: bool | None = subsumed(_NORM)
    """Liger's RMS norm with a gate. Unset: no."""

    liger_layer_norm: bool | None = subsumed(_RULE.format("layer_norm"))
    """Liger's layer norm. Unset: no."""

    liger_swiglu: bool | None = subsumed(_RULE.format("glu"))
    """Liger's SwiGLU, by its old name. Unset: no."""

    liger_glu_activation: bool | None = subsumed(_RULE.format("glu"))
    """Liger's gated activations. Unset: no."""

    liger_cross_entropy: bool | None = subsumed(_CE)
    """Liger's cross entropy. Unset: no."""

    liger_fused_linear_cross_entropy: bool | None = subsumed(_CE)
    """Liger's output head and cross entropy in one. Unset: no."""

    liger_kernel_impl: Literal["cutile", "cutedsl"] | None = subsumed("fusewright's own kernels")
    """In which language Liger's kernels are written. Unset: Triton."""

    cut_cross_entropy: bool | None = subsumed(_CE)
    """Apple's cross entropy without logits. Unset: no."""

    cut_cross_entropy_impl: str | None = subsumed(_CE)
    """Which implementation of it. Unset: its default."""

    cut_cross_entropy_accum_c_fp32: bool | None = subsumed(f"{_CE}, which adds up in float32")
    """Add up the gradient of the output head in float32. Unset: no."""

    cut_cross_entropy_c_grad_chunk_size: Int | Literal["auto"] | None = not_applicable(
        "tiles are chosen by size"
    )
    """Rows of that gradient that are added up at a time. Unset: all."""

    chunked_cross_entropy: bool | None = subsumed(_CE)
    """Cross entropy in chunks. Unset: no."""

    chunked_cross_entropy_num_chunks: Int | None = not_applicable("tiles are chosen by size")
    """How many chunks. Unset: 8."""

    lora_mlp_kernel: bool | None = subsumed(_LORA)
    """Axolotl's fused MLP with LoRA. Unset: no."""

    lora_qkv_kernel: bool | None = subsumed(_LORA)
    """Axolotl's fused projections with LoRA. Unset: no."""

    lora_o_kernel: bool | None = subsumed(_LORA)
    """Axolotl's fused output projection with LoRA. Unset: no."""

    lora_embedding_kernel: bool | None = subsumed(_LORA)
    """Axolotl's fused embedding with LoRA. Unset: no."""

    unsloth_cross_entropy_loss: bool | None = subsumed(_CE)
    """Unsloth's cross entropy. Unset: no."""

    unsloth_lora_mlp: bool | None = subsumed(_LORA)
    """Unsloth's MLP with LoRA. Unset: no."""

    unsloth_lora_qkv: bool | None = subsumed(_LORA)
    """Unsloth's projections with LoRA. Unset: no."""

    unsloth_lora_o: bool | None = subsumed(_LORA)
    """Unsloth's output projection with LoRA. Unset: no."""

    unsloth_rms_norm: bool | None = subsumed(_NORM)
    """Unsloth's RMS norm. Unset: no."""

    unsloth_rope: bool | None = subsumed(_RULE.format("rope"))
    """Unsloth's rotary embedding. Unset: no."""

    flash_attn_cross_entropy: bool | None = subsumed(_CE)
    """Flash attention's cross entropy. Unset: no."""

    flash_attn_rms_norm: bool | None = subsumed(_NORM)
    """Flash attention's RMS norm. Unset: no."""

    flash_attn_fuse_qkv: bool | None = subsumed(_LORA)
    """Query, key and value as one matrix product. Unset: no."""

    flash_attn_fuse_mlp: bool | None = subsumed(_RULE.format("glu"))
    """The MLP as one operation. Unset: no."""

    flash_optimum: bool | None = subsumed("torch's scaled dot-product attention")
    """BetterTransformer of the package optimum. Unset: no."""

    torch_compile: bool | Literal["auto"] | None = subsumed(_CODEGEN)
    """Compile the model with torch. Unset: no."""

    torch_compile_backend: str | None = subsumed(_CODEGEN)
    """With which backend. Unset: Inductor."""

    torch_compile_mode: str | None = subsumed(_CODEGEN)
    """In which mode. Unset: ``default``."""

    torch_compile_regional: bool | None = subsumed(_CODEGEN)
    """Compile each block by itself. Unset: no."""

    torch_compile_options: dict[str, bool | int | float | str] | None = subsumed(_CODEGEN)
    """Settings of Inductor. Unset: its own."""

    selective_checkpointing: SelectiveCheckpointingKeys | bool | None = subsumed(_OWN_MEMORY)
    """Keep some results in checkpointed blocks, e.g. of attention. Unset: none."""

    fused_attn_kernel: bool | None = subsumed(_RULE.format("qk_norm_rope"))
    """Norm and rotary embedding of queries and keys as one kernel. Unset: no."""

    sdpa_varlen: bool | None = subsumed(f"{_ATTENTION}, which skips what a pack's samples hide")
    """Attention with the boundaries of a pack in place of a mask. Unset: no."""

    fa_varlen_kwargs_in_collator: bool | None = subsumed(
        f"{_ATTENTION}, which reads boundaries once for each batch"
    )
    """Find the boundaries of a pack once for each batch. Unset: yes."""

    large_head_attention: Literal["sdpa", "auto", "triton_flash"] | None = subsumed(_ATTENTION)
    """The kernel of attention with heads of more than 256 features. Unset: ``sdpa``."""

    flash_attn_d512: bool | None = subsumed(_ATTENTION)
    """The older name of ``large_head_attention: auto``. Unset: no."""

    use_scattermoe: bool | None = subsumed(_EXPERTS)
    """The experts of ScatterMoE. Unset: no."""

    use_sonicmoe: bool | None = subsumed(_EXPERTS)
    """The experts of SonicMoE. Unset: no."""

    expert_backend: Literal["scattermoe", "sonicmoe", "eager", "builtin"] | None = subsumed(
        _EXPERTS
    )
    """Which kernels experts have. Unset: the model's own."""

    moe_grouped_backend: str | None = subsumed(_EXPERTS)
    """Who multiplies the experts' groups. Unset: chosen by the GPU."""

    moe_bnb_fast: bool | None = subsumed(_EXPERTS)
    """Experts of 4 bits in one launch. Unset: yes."""

    moe_dequant_chunk_size: Int | None = not_applicable("tiles are chosen by size")
    """Experts of 4 bits that are unpacked at a time. Unset: a fixed number."""

    use_dsv4_kernels: bool | None = subsumed("fusewright's own kernels (key optimize)")
    """Kernels for DeepSeek-V4. Unset: no."""

    use_glm_dsa_kernels: bool | None = subsumed("fusewright's own kernels (key optimize)")
    """Kernels for the sparse attention of GLM. Unset: no."""

    dsv4_fp8_lora_kernel: bool | None = subsumed(_LORA)
    """A fused LoRA kernel for weights of 8 bits. Unset: no."""

    dsv4_shared_mlp_lora_kernel: bool | None = subsumed(_LORA)
    """A fused LoRA kernel for shared experts. Unset: no."""

    dsv4_fp4_grouped_mode: Literal["nvfp4", "fp8"] | None = subsumed(
        f"{_EXPERTS}, which rounds no activations to 4 or 8 bits"
    )
    """Round the experts' inputs to 4 or 8 bits, to multiply faster. Unset: no."""

    dsv4_fp8_nonexpert_mode: Literal["float8tensor", "bf16"] | None = not_applicable(
        "weights keep the dtype that they are loaded in"
    )
    """How weights of 8 bits are stored. Unset: ``float8tensor``."""

    dsv4_bf16_all: bool | None = not_applicable(
        "no kernel needs one dtype: what a model keeps in float32 stays so"
    )
    """Give all weights the dtype of computation, for kernels that need that. Unset: no."""

    autotune_cache_path: str | None = not_applicable(_TUNED)
    """A file with tile sizes that were measured before. Unset: none."""

    autotune_profiles: list[dict[str, Any]] | None = not_applicable(_TUNED)
    """Tile sizes that are tried, by kernel. Unset: all."""

    autotune_neighborhood: Int | None = not_applicable(_TUNED)
    """How far a new size's tiles may be from those of the nearest size. Unset: any distance."""

    llama4_linearized_experts: bool | None = subsumed("adapters on experts: lora_target_parameters")
    """Experts of Llama 4 as single layers. Unset: no."""

    tiled_mlp: bool | None = subsumed("the memory planner, and smaller tiles of long sequences")
    """The MLP in pieces of the sequence. Unset: no."""

    tiled_mlp_num_shards: Int | None = not_applicable("pieces are chosen by size")
    """How many pieces. Unset: by size."""

    tiled_mlp_use_original_mlp: bool | None = not_applicable("the model keeps its own MLP")
    """Leave the model's own MLP in the pieces. Unset: yes."""
