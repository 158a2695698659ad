"""The groups of keys for quantized training, and for compressing or exporting a trained model."""

from __future__ import annotations

from typing import Any

from ..base import UnreadKeys, unread

QAT = "train unquantized weights, or an adapter on 4-bit weights with adapter: qlora"
AFTERWARDS = "quantize the saved model with its own tool"
PRUNED = "prune or compress the saved model with LLM Compressor itself"
EXPORT = "convert the saved model with llama.cpp's own tools"
_TRAINED = unread("not yet available", QAT)
_AFTERWARDS = unread("not yet available", AFTERWARDS)
_PRUNED = unread("not yet available", PRUNED)
_EXPORTED = unread("not applicable", EXPORT)
_FP8 = unread("not applicable", "only fp8 reads it")


class QatKeys(UnreadKeys):
    """``qat``: quantization-aware training."""

    activation_dtype: Any = _TRAINED
    fake_quant_after_n_steps: Any = _TRAINED
    group_size: Any = _TRAINED
    quantize_embedding: Any = _TRAINED
    weight_dtype: Any = _TRAINED


class QuantizationKeys(UnreadKeys):
    """``quantization``: post-training quantization."""

    activation_dtype: Any = _AFTERWARDS
    group_size: Any = _AFTERWARDS
    quantize_embedding: Any = _AFTERWARDS
    weight_dtype: Any = _AFTERWARDS


class CompressionKeys(UnreadKeys):
    """``llmcompressor``: sparse and quantized training with LLM Compressor."""

    recipe: Any = _PRUNED
    save_compressed: Any = _PRUNED


class ExportKeys(UnreadKeys):
    """``export``: exporting the model to llama.cpp."""

    format: Any = _EXPORTED
    llama_cpp_dir: Any = _EXPORTED
    outfile: Any = _EXPORTED
    outtype: Any = _EXPORTED
    quantize: Any = _EXPORTED


class Fp8Keys(UnreadKeys):
    """``fp8_config``: the scaling of 8-bit matrix products."""

    recipe: Any = _FP8
