"""The groups of keys of quantized training, and of what is made of a trained model."""

from __future__ import annotations

from typing import Any

from ..base import UnreadKeys, unread

QAT = "train on plain weights, or on those of 4 bits with adapter: qlora"
AFTERWARDS = "quantize the saved model with its own tool"
PRUNED = "prune or compress the saved model with LLM Compressor itself"
EXPORT = "exporting is not training: llama.cpp converts the saved model"
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
    """``quantization``: quantization after training."""

    activation_dtype: Any = _AFTERWARDS
    group_size: Any = _AFTERWARDS
    quantize_embedding: Any = _AFTERWARDS
    weight_dtype: Any = _AFTERWARDS


class CompressionKeys(UnreadKeys):
    """``llmcompressor``: sparse and quantized training by LLM Compressor."""

    recipe: Any = _PRUNED
    save_compressed: Any = _PRUNED


class ExportKeys(UnreadKeys):
    """``export``: a file for llama.cpp."""

    format: Any = _EXPORTED
    llama_cpp_dir: Any = _EXPORTED
    outfile: Any = _EXPORTED
    outtype: Any = _EXPORTED
    quantize: Any = _EXPORTED


class Fp8Keys(UnreadKeys):
    """``fp8_config``: how 8-bit products are scaled."""

    recipe: Any = _FP8
