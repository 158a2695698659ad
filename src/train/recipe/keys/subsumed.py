"""The keys that switch on other engines' speed-ups. The compiler does what they do."""

from __future__ import annotations

from typing import Any, Literal

from .base import Float, Int, Keys, not_applicable, not_yet, subsumed

_RULE = "fusewright's rewrite {} (key optimize)"
_CE = _RULE.format("linear_cross_entropy")
_NORM = _RULE.format("rms_norm")
_LORA = _RULE.format("lora_linear")
_CODEGEN = "code generation for each block (key codegen)"
_LABEL = "the model is read as a graph, whatever it derives from"


KERNEL_PLUGINS = (
    "axolotl.integrations.liger.LigerPlugin",
    "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "axolotl.integrations.kernels.KernelsPlugin",
)
"""The plugins that change no result."""


class SubsumedKeys(Keys):
    """Kernels and patches of other engines, and plugins."""

    liger_rope: bool | None = subsumed(_RULE.format("rope"))
    """Liger's rotary embedding. Unset: no."""

    liger_rms_norm: bool | None = subsumed(_NORM)
    """Liger's RMS norm. Unset: no."""

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

    liger_use_token_scaling: bool | None = not_yet(
        "leave it out: each trained token weighs the same"
    )
    """Weigh tokens by how sure the model is of them. Unset: no."""

    cut_cross_entropy: bool | None = subsumed(_CE)
    """Apple's cross entropy without logits. Unset: no."""

    cut_cross_entropy_impl: str | None = subsumed(_CE)
    """Which implementation of it. Unset: its default."""

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

    llama4_linearized_experts: bool | None = subsumed("adapters on experts: lora_target_parameters")
    """Experts of Llama 4 as single layers. Unset: no."""

    tiled_mlp: bool | None = subsumed("the memory planner, and smaller tiles of long sequences")
    """The MLP in pieces of the sequence. Unset: no."""

    tiled_mlp_num_shards: Int | None = not_applicable("pieces are chosen by size")
    """How many pieces. Unset: by size."""

    tiled_mlp_use_original_mlp: bool | None = not_applicable("the model keeps its own MLP")
    """Leave the model's own MLP in the pieces. Unset: yes."""

    plugins: list[str] | None = not_yet(
        "plugins are not loaded: remove it",
        values={
            name: ("subsumed", "fusewright's rewrites (key optimize)") for name in KERNEL_PLUGINS
        },
    )
    """Python classes that extend Axolotl. Those that only bring kernels are subsumed. Unset:
    none."""

    spectrum_top_fraction: Float | None = not_yet("use unfrozen_parameters")
    """Share of the layers that are trained, by signal and noise. Unset: all."""

    spectrum_model_name: str | None = not_applicable("only spectrum_top_fraction reads it")
    """The model that the layers are chosen for. Unset: ``base_model``."""

    lm_eval_tasks: list[str] | None = not_yet("use a benchmark harness on the saved model")
    """Benchmarks to run at the end. Unset: none."""

    lm_eval_batch_size: Int | None = not_applicable("only lm_eval_tasks reads it")
    """Batch size of these benchmarks. Unset: 8."""

    is_llama_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Llama. Unset: seen by itself."""

    is_mistral_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Mistral. Unset: seen by itself."""

    is_falcon_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Falcon. Unset: seen by itself."""

    is_qwen_derived_model: bool | None = not_applicable(_LABEL)
    """The model is built like Qwen. Unset: seen by itself."""

    freeze_mm_modules: bool | None = not_applicable("only the language model is loaded")
    """Do not train the parts for images and sound. Unset: train them."""

    is_multimodal: bool | None = not_yet("train the language model by itself")
    """The model takes images, too. Unset: no."""

    processor_type: str | None = not_yet("train the language model by itself")
    """The class of transformers that prepares images. Unset: none."""

    image_size: Int | list[Int] | None = not_applicable("only is_multimodal reads it")
    """The size that images are brought to, in pixels. Unset: as they are."""

    image_resize_algorithm: str | None = not_applicable("only is_multimodal reads it")
    """How images are resized. Unset: bilinear."""

    axolotl_config_path: Any = not_applicable("Axolotl's own note")
    """The path of an Axolotl recipe. Unset: none."""

    total_num_tokens: Int | None = not_applicable("counted when the rows are prepared")
    """Tokens of the rows, as counted before. Unset: counted."""

    total_supervised_tokens: Int | None = not_applicable("counted when the rows are prepared")
    """Trained tokens of the rows, as counted before. Unset: counted."""

    sample_packing_eff_est: Float | None = not_applicable("sequences are packed before training")
    """Estimate of how full packs are. Unset: known exactly."""
