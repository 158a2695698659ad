"""The keys that enable other engines' kernels and patches, whose work the compiler does."""

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
_TUNED = "only Axolotl's kernels use it"
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
    """Use Liger's kernel for rotary embeddings. Unset: no."""

    liger_rms_norm: bool | None = subsumed(_NORM)
    """Use Liger's RMSNorm kernel. Unset: no."""

    liger_rms_norm_gated: bool | None = subsumed(_NORM)
    """Use Liger's gated RMSNorm kernel. Unset: no."""

    liger_layer_norm: bool | None = subsumed(_RULE.format("layer_norm"))
    """Use Liger's LayerNorm kernel. Unset: no."""

    liger_swiglu: bool | None = subsumed(_RULE.format("glu"))
    """The older name of ``liger_glu_activation``. Unset: no."""

    liger_glu_activation: bool | None = subsumed(_RULE.format("glu"))
    """Use Liger's kernels for SwiGLU and GeGLU. Unset: no."""

    liger_cross_entropy: bool | None = subsumed(_CE)
    """Use Liger's cross-entropy kernel. Unset: no."""

    liger_fused_linear_cross_entropy: bool | None = subsumed(_CE)
    """Use Liger's kernel that fuses the output head and the cross entropy. Unset: no."""

    liger_kernel_impl: Literal["cutile", "cutedsl"] | None = subsumed("fusewright's own kernels")
    """The language that Liger's kernels are written in. Unset: Triton."""

    cut_cross_entropy: bool | None = subsumed(_CE)
    """Use Apple's Cut Cross-Entropy, which never materializes the logits. Unset: no."""

    cut_cross_entropy_impl: str | None = subsumed(_CE)
    """The implementation of Cut Cross-Entropy. Unset: its default."""

    cut_cross_entropy_accum_c_fp32: bool | None = subsumed(f"{_CE}, which accumulates in float32")
    """Accumulate the gradient of the output head in float32. Unset: no."""

    cut_cross_entropy_c_grad_chunk_size: Int | Literal["auto"] | None = not_applicable(
        "tile sizes are chosen automatically"
    )
    """Number of vocabulary rows of that gradient that are accumulated at a time. Unset: all."""

    chunked_cross_entropy: bool | None = subsumed(_CE)
    """Compute the cross entropy in chunks. Unset: no."""

    chunked_cross_entropy_num_chunks: Int | None = not_applicable(
        "tile sizes are chosen automatically"
    )
    """Number of chunks of the cross entropy. Unset: 8."""

    lora_mlp_kernel: bool | None = subsumed(_LORA)
    """Use Axolotl's fused LoRA kernel for MLPs. Unset: no."""

    lora_qkv_kernel: bool | None = subsumed(_LORA)
    """Use Axolotl's fused LoRA kernel for the query, key and value projections. Unset: no."""

    lora_o_kernel: bool | None = subsumed(_LORA)
    """Use Axolotl's fused LoRA kernel for the output projection of attention. Unset: no."""

    lora_embedding_kernel: bool | None = subsumed(_LORA)
    """Use Axolotl's fused LoRA kernel for embeddings. Unset: no."""

    unsloth_cross_entropy_loss: bool | None = subsumed(_CE)
    """Use Unsloth's cross-entropy kernel. Unset: no."""

    unsloth_lora_mlp: bool | None = subsumed(_LORA)
    """Use Unsloth's LoRA kernel for MLPs. Unset: no."""

    unsloth_lora_qkv: bool | None = subsumed(_LORA)
    """Use Unsloth's LoRA kernel for the query, key and value projections. Unset: no."""

    unsloth_lora_o: bool | None = subsumed(_LORA)
    """Use Unsloth's LoRA kernel for the output projection of attention. Unset: no."""

    unsloth_rms_norm: bool | None = subsumed(_NORM)
    """Use Unsloth's RMSNorm kernel. Unset: no."""

    unsloth_rope: bool | None = subsumed(_RULE.format("rope"))
    """Use Unsloth's kernel for rotary embeddings. Unset: no."""

    flash_attn_cross_entropy: bool | None = subsumed(_CE)
    """Use the cross-entropy kernel of the package flash-attn. Unset: no."""

    flash_attn_rms_norm: bool | None = subsumed(_NORM)
    """Use the RMSNorm kernel of the package flash-attn. Unset: no."""

    flash_attn_fuse_qkv: bool | None = subsumed(_LORA)
    """Compute queries, keys and values with one matrix product. Unset: no."""

    flash_attn_fuse_mlp: bool | None = subsumed(_RULE.format("glu"))
    """Compute the MLP with one fused operation. Unset: no."""

    flash_optimum: bool | None = subsumed("torch's scaled dot-product attention")
    """Use BetterTransformer from the package optimum. Unset: no."""

    torch_compile: bool | Literal["auto"] | None = subsumed(_CODEGEN)
    """Compile the model with ``torch.compile``. Unset: no."""

    torch_compile_backend: str | None = subsumed(_CODEGEN)
    """The backend of ``torch.compile``. Unset: ``inductor``."""

    torch_compile_mode: str | None = subsumed(_CODEGEN)
    """The mode of ``torch.compile``. Unset: ``default``."""

    torch_compile_regional: bool | None = subsumed(_CODEGEN)
    """Compile each block separately. Unset: no."""

    torch_compile_options: dict[str, bool | int | float | str] | None = subsumed(_CODEGEN)
    """Options for Inductor. Unset: its defaults."""

    selective_checkpointing: SelectiveCheckpointingKeys | bool | None = subsumed(_OWN_MEMORY)
    """Keep selected activations of checkpointed blocks, e.g. the output of attention, instead of
    recomputing them. Unset: none."""

    fused_attn_kernel: bool | None = subsumed(_RULE.format("qk_norm_rope"))
    """Fuse the norm and the rotary embedding of queries and keys into one kernel. Unset: no."""

    sdpa_varlen: bool | None = subsumed(
        f"{_ATTENTION}, which skips what the mask of a packed sequence hides"
    )
    """In packed sequences, use variable-length attention instead of a mask. Unset: no."""

    fa_varlen_kwargs_in_collator: bool | None = subsumed(
        f"{_ATTENTION}, which reads the boundaries once per batch"
    )
    """Compute the sample boundaries of packed sequences once per batch instead of once per layer.
    Unset: yes."""

    large_head_attention: Literal["sdpa", "auto", "triton_flash"] | None = subsumed(_ATTENTION)
    """The attention kernel for head sizes above 256. Unset: ``sdpa``."""

    flash_attn_d512: bool | None = subsumed(_ATTENTION)
    """The older name of ``large_head_attention: auto``. Unset: no."""

    use_scattermoe: bool | None = subsumed(_EXPERTS)
    """Use ScatterMoE's kernels for mixture-of-experts layers. Unset: no."""

    use_sonicmoe: bool | None = subsumed(_EXPERTS)
    """Use SonicMoE's kernels for mixture-of-experts layers. Unset: no."""

    expert_backend: Literal["scattermoe", "sonicmoe", "eager", "builtin"] | None = subsumed(
        _EXPERTS
    )
    """The kernels of mixture-of-experts layers. Unset: the model's own code."""

    moe_grouped_backend: str | None = subsumed(_EXPERTS)
    """The backend of the experts' grouped matrix multiplication. Unset: chosen according to the
    GPU."""

    moe_bnb_fast: bool | None = subsumed(_EXPERTS)
    """Run 4-bit experts with a single kernel launch. Unset: yes."""

    moe_dequant_chunk_size: Int | None = not_applicable("tile sizes are chosen automatically")
    """Number of 4-bit experts that are dequantized at a time. Unset: a fixed number."""

    use_dsv4_kernels: bool | None = subsumed("fusewright's own kernels (key optimize)")
    """Use Axolotl's kernels for DeepSeek-V4. Unset: no."""

    use_glm_dsa_kernels: bool | None = subsumed("fusewright's own kernels (key optimize)")
    """Use Axolotl's kernels for the sparse attention of GLM. Unset: no."""

    dsv4_fp8_lora_kernel: bool | None = subsumed(_LORA)
    """Use a fused LoRA kernel for 8-bit weights. Unset: no."""

    dsv4_shared_mlp_lora_kernel: bool | None = subsumed(_LORA)
    """Use a fused LoRA kernel for shared experts. Unset: no."""

    dsv4_fp4_grouped_mode: Literal["nvfp4", "fp8"] | None = subsumed(
        f"{_EXPERTS}, which does not round activations to 4 or 8 bits"
    )
    """Round the inputs of the experts to 4 or 8 bits, for faster matrix products. Unset: no."""

    dsv4_fp8_nonexpert_mode: Literal["float8tensor", "bf16"] | None = not_applicable(
        "weights keep the dtype that they are loaded with"
    )
    """How 8-bit weights outside the experts are stored. Unset: ``float8tensor``."""

    dsv4_bf16_all: bool | None = not_applicable(
        "no kernel needs a single dtype: what a model keeps in float32 stays in float32"
    )
    """Convert all weights to bfloat16, for kernels that need a single dtype. Unset: no."""

    autotune_cache_path: str | None = not_applicable(_TUNED)
    """A file with tuned tile sizes, which is read before training and updated afterwards. Unset:
    none."""

    autotune_profiles: list[dict[str, Any]] | None = not_applicable(_TUNED)
    """The tile sizes to try, for each kernel. Unset: all."""

    autotune_neighborhood: Int | None = not_applicable(_TUNED)
    """For a new input size, only try tile sizes that differ from the best known ones in at most
    this many parameters. Unset: try all."""

    llama4_linearized_experts: bool | None = subsumed(
        "lora_target_parameters, which adapts experts as they are stored"
    )
    """Store each expert of Llama 4 as separate linear layers. Unset: no."""

    tiled_mlp: bool | None = subsumed(
        "fusewright's memory planner, which uses smaller tiles for long sequences"
    )
    """Compute the MLP in tiles along the sequence. Unset: no."""

    tiled_mlp_num_shards: Int | None = not_applicable("tile sizes are chosen automatically")
    """Number of tiles. Unset: depends on the sequence length."""

    tiled_mlp_use_original_mlp: bool | None = not_applicable("the model keeps its own MLP")
    """Use the model's own MLP code in the tiles, instead of Llama's. Unset: yes."""
