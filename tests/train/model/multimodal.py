"""Tiny checkpoints of multimodal types: a language model with a tower, and a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from ..conftest import make_tokenizer

_TEXT: dict[str, Any] = {
    "vocab_size": 262, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_CLIP: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 8,
    "spatial_merge_size": 1, "temporal_patch_size": 1, "out_hidden_size": 32,
}  # fmt: skip
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "partial_rotary_factor": 1.0,
}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE, "head_dim": 8},
        "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [0], "window_size": 16},
    },
    "qwen3_5": {
        "text_config": {**_TEXT, **_HYBRID, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "num_position_embeddings": 16},
    },
    "gemma3": {
        "text_config": {**_TEXT, "query_pre_attn_scalar": 8, "sliding_window": 64},
        "vision_config": _CLIP,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_CLIP, "model_type": "clip_vision_model", "projection_dim": 16},
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_CLIP, "model_type": "pixtral", "head_dim": 8},
    },
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {
            **_CLIP, "image_size": [16, 16], "patch_size": [8, 8], "model_type": "internvl_vision",
        },
    },
}  # fmt: skip

MTP = "mtp.layers.0.weight"
"""A tensor that no class loads, as that of the layers for several tokens at a time."""


def make_multimodal(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint of random weights, among them one that its class does not load."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **CONFIGS[kind])
    model = AutoModelForImageTextToText.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # zeros and ones would hide what is lost
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {**load_file(path), MTP: torch.randn(3, 5).to(torch.bfloat16)}
    save_file(tensors, path, metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": True}) + "\n")
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder's files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(file)
    return tensors
