"""The keys of the weights: their dtype, and quantization."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from ..export_formats import FORMATS
from .base import METHOD, Int, Keys, key, not_yet


def _dtype(value: Any) -> Any:
    return "float8_e4m3fn" if value in ("fp8", "float8") else value


FewBits = Annotated[
    Literal["int4", "int8", "float8_e4m3fn", "nvfp4", "mxfp4"], BeforeValidator(_dtype)
]


class QatKeys(Keys):
    """``qat``: weights and activations are rounded in training, as torchao rounds them."""

    weight_dtype: FewBits = "int8"
    """Rounding of the weights: ``int4``, ``float8_e4m3fn`` (or ``fp8``), ``mxfp4`` or ``nvfp4``.
    The default is Axolotl's, which torchao does not train with: set another one."""

    activation_dtype: FewBits | None = None
    """Rounding of the inputs of layers: ``int8`` or ``float8_e4m3fn`` for weights in ``int4``, the
    same as ``weight_dtype`` for others; those of ``nvfp4`` are not rounded. Unset: none, but
    ``mxfp4`` for ``mxfp4``."""

    group_size: Int | None = key(32, gt=0)
    """Number of weights that share a scale, for ``int4``; 16 for ``nvfp4``, 32 for ``mxfp4``."""

    quantize_embedding: bool | None = False
    """Round the embeddings, too: ``int4`` only."""

    fake_quant_after_n_steps: Int | None = key(gt=0)
    """Steps before rounding begins. Unset: from the start."""


_ROUNDING: Any = Literal[tuple(f.name for f in FORMATS.values() if f.rounds)]


class PrecisionKeys(Keys):
    """In which numbers weights are kept and computed."""

    bf16: bool | Literal["auto", "full"] = "auto"
    """Weights and computation in bfloat16 (adapters stay in float32); false: see ``fp16``, else
    float32. ``auto``: bfloat16 where the GPU or CPU has instructions for it; else as with ``fp16``
    on a GPU (T4, V100), and float32 on a CPU."""

    bfloat16: bool = False
    """The same as ``bf16: true``."""

    fp16: bool = False
    """Products in float16, with loss scaling, over frozen weights in float16 or trained ones in
    float32. Needs a GPU. A run ends where the scale falls below 1."""

    float16: bool = False
    """The same as ``fp16: true``."""

    float32: bool = False
    """Weights and computation in float32."""

    tf32: bool | Literal["auto"] = "auto"
    """TensorFloat-32 for float32 matrix products on GPUs of Ampere or later. ``auto``: torch's
    default. No effect on a CPU."""

    load_in_4bit: bool = key(
        False,
        needs={
            "adapter": "quantized weights cannot be trained: set adapter, or load_in_4bit: false"
        },
        excludes=["model_quantization_config"],
    )
    """Keep the frozen weights in 4 bits (bitsandbytes; NF4 with double quantization)."""

    load_in_8bit: bool = key(
        False,
        needs={
            "adapter": "quantized weights cannot be trained: set adapter, or load_in_8bit: false"
        },
        excludes=["load_in_4bit", "model_quantization_config"],
    )
    """Keep the frozen weights in 8 bits (bitsandbytes LLM.int8())."""

    bnb_config_kwargs: dict[str, Any] | None = None
    """Arguments of transformers' ``BitsAndBytesConfig`` that replace ours, e.g.
    ``{bnb_4bit_quant_type: fp4}``; ``bnb_4bit_quant_storage`` is the dtype of the weights where
    FSDP or ZeRO-3 shards them. Unset: none."""

    gptq: bool = key(
        False,
        needs={"adapter": "weights in few bits cannot be trained: set adapter, or gptq: false"},
        excludes=["load_in_4bit", "load_in_8bit", "model_quantization_config"],
    )
    """Require that the base model is stored by GPTQ. Such weights stay as they are stored whether
    or not this is set."""

    fp32_norms: bool = key(
        False,
        excludes={
            "fsdp or fsdp_config or deepspeed": (
                "not with {key}, whose shards have one dtype: leave it out"
            )
        },
    )
    """Keep the weights of norms in float32, train them and compute in it, where all else is in 16
    bits. Not with FSDP or DeepSpeed, whose shards have one dtype."""

    fp32_norm_classes: list[str] | None = key(min_length=1, read_with=["fp32_norms"])
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

    model_quantization_config: Literal["Mxfp4Config", "FineGrainedFP8Config"] | None = None
    """The configuration of transformers for a base model in MXFP4 or blocks of FP8, which is
    unpacked while it is loaded: it needs ``{dequantize: true}``. Unset: the model's own."""

    export_format: _ROUNDING | None = key(
        excludes={
            "relora": "set this or relora, not both: what is merged is rounded at every step",
            "peft_layer_replication": "not with {key}: leave one out",
            METHOD: "only supervised training so far: {key} compares the model with itself",
            "kd_trainer": "only supervised training so far: leave {key} out",
            "tensor_parallel_size": "not with {key}, which divides layers: use FSDP or DDP",
            "deepspeed": "not with {key}: use FSDP or DDP",
        },
    )
    """The format of ``fusewright export`` that the trained model is for, e.g. ``nvfp4``,
    ``int4-g32`` or ``q8_0``: layers multiply by weights that are merged and rounded as it will
    round them, so that what is trained survives (straight-through gradients). What is saved is
    plain. llama.cpp's mixtures (``q4_k_m``) cannot be followed; 16 bits need not be. Unset: weights
    are not rounded."""

    export_format_after_n_steps: Int | None = key(gt=0, read_with=["export_format"])
    """Steps before ``export_format`` begins to round. Unset: from the start."""

    qat: QatKeys | None = key(
        excludes={
            "adapter": "trains whole weights; with {key}, set export_format in its place",
            "export_format": "set this or {key}, not both",
            "relora": "set this or {key}, not both",
            METHOD: "only supervised training so far: leave one out",
            "kd_trainer": "only supervised training so far: leave {key} out",
            "tensor_parallel_size": "not with {key}, which divides layers: use FSDP or DDP",
        },
    )
    """Quantization-aware training of whole weights by torchao, as Axolotl's. What is saved is
    plain; ``fusewright export`` writes it in few bits. Unset: none."""

    model_quantization_config_kwargs: dict[str, Any] | None = None
    """Arguments for ``model_quantization_config``. Unset: none."""
