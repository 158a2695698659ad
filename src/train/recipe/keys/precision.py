"""The keys of the weights: their dtype, and quantization."""

from __future__ import annotations

from typing import Any, Literal

from .base import Float, Int, Keys, key, not_applicable, not_yet
from .peers.compression import Fp8Keys


class PrecisionKeys(Keys):
    """In which numbers weights are kept and computed."""

    bf16: bool | Literal["auto", "full"] = "auto"
    """Weights and computation in bfloat16 (adapters stay in float32); false: see ``fp16``, else
    float32. ``auto``: bfloat16 where the GPU or CPU has instructions for it, else float32."""

    bfloat16: bool = False
    """The same as ``bf16: true``."""

    fp16: bool = False
    """Weights in float16, with loss scaling. Needs a GPU."""

    float16: bool = False
    """The same as ``fp16: true``."""

    float32: bool = False
    """Weights and computation in float32."""

    tf32: bool | Literal["auto"] = "auto"
    """TensorFloat-32 for float32 matrix products on GPUs of Ampere or later. ``auto``: torch's
    default. No effect on a CPU."""

    fp8: bool | None = not_yet("set bf16: true")
    """Matrix products in 8-bit floating point. Unset: no."""

    fp8_config: Fp8Keys | None = not_applicable("only fp8 reads it")
    """How 8-bit products are scaled. Unset: one scale for each tensor."""

    load_in_4bit: bool = False
    """Keep the frozen weights in 4 bits (bitsandbytes; NF4 with double quantization)."""

    load_in_8bit: bool = False
    """Keep the frozen weights in 8 bits (bitsandbytes LLM.int8())."""

    bnb_config_kwargs: dict[str, Any] | None = None
    """Arguments of transformers' ``BitsAndBytesConfig`` that replace ours, e.g.
    ``{bnb_4bit_quant_type: fp4}``; ``bnb_4bit_quant_storage`` is the dtype of the weights where
    FSDP or ZeRO-3 shards them. Unset: none."""

    gptq: bool | None = not_yet("use a base model that is not quantized, with adapter: qlora")
    """The base model is quantized by GPTQ. Unset: no."""

    gptq_groupsize: Int | None = not_applicable("only gptq reads it")
    """Weights of a GPTQ model that share a scale. Unset: the model's own."""

    gptq_model_v1: bool | None = not_applicable("only gptq reads it")
    """The GPTQ model is in the old format. Unset: no."""

    fp8_enable_fsdp_float8_all_gather: bool | None = not_applicable("only fp8 with FSDP reads it")
    """Send 8-bit weights between devices. Unset: no."""

    fp32_norms: bool = False
    """Keep the weights of norms in float32, train them and compute in it, where all else is in 16
    bits. Not with FSDP or DeepSpeed, whose shards have one dtype."""

    fp32_norm_classes: list[str] | None = key(min_length=1)
    """Which modules are norms: ends of the names of their classes, or names with their modules and
    dots. Unset: ``RMSNorm`` and ``LayerNorm``."""

    nonexpert_quantization: Literal["none", "bf16", "fp8_blockwise", "nf4"] | None = not_yet(
        "use load_in_4bit or load_in_8bit",
        values={
            "none": ("not applicable", "weights keep the dtype of the recipe"),
            "bf16": ("not applicable", "weights keep the dtype of the recipe"),
        },
    )
    """Quantize all but the experts. Unset: no."""

    gemma4_fp8_nonexpert: bool | None = not_yet("use load_in_8bit")
    """The same in 8 bits. Unset: no."""

    gemma4_nf4_nonexpert: bool | None = not_yet("use load_in_4bit")
    """The same in 4 bits. Unset: no."""

    nvfp4_merge_aware: bool | None = not_applicable(
        "an adapter is merged into weights of 16 bits, which keep its whole update"
    )
    """Train an adapter for weights that are rounded to 4 bits again when it is merged. Unset:
    no."""

    nvfp4_merge_aware_start_step: Int | Float | None = not_applicable(
        "only nvfp4_merge_aware reads it"
    )
    """The step from which it does so, or a fraction of the steps. Unset: 0."""

    use_onebitllms: bool | None = not_yet("use a base model with plain weights")
    """Train a BitNet model with weights of 1.58 bits. Unset: no."""

    reinit_weights: bool | None = not_yet("save a model with random weights, and name its folder")
    """Initialize the weights randomly. Unset: no."""

    model_quantization_config: Literal["Mxfp4Config", "FineGrainedFP8Config"] | None = None
    """The configuration of transformers for a base model in MXFP4 or blocks of FP8, which is
    unpacked while it is loaded: it needs ``{dequantize: true}``. Unset: the model's own."""

    model_quantization_config_kwargs: dict[str, Any] | None = None
    """Arguments for ``model_quantization_config``. Unset: none."""
