"""Tiny random models of the families that the tests cover, with their real features on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

_SMALL = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """One architecture: how to build a tiny one, and what fusewright must find in it.

    ``plain`` and ``lora`` are the exact counts of rewritten sites (``Report.by_rule``).
    """

    name: str
    build: Callable[[], nn.Module]
    plain: dict[str, int]
    lora: dict[str, int] = field(default_factory=dict)
    targets: str | list[str] = "all-linear"


_LLAMA = {
    "rms_norm": 5, "rope": 2, "glu": 2, "mlp_block": 2, "add_rms_norm": 2,
    "linear_cross_entropy": 1,
}  # fmt: skip
# attention without a softcap is left to PyTorch in fp32; test_precision.py counts it in bf16
_FUSED = {"rms_norm_linear": 2}  # the input norms; those after the residual add are add_rms_norm
_FOUR_NORMS = {**_LLAMA, "rms_norm": 9}  # qk norms, or norms before and after each part


def _family(
    name: str,
    config: type,
    model: type,
    common: dict[str, int],
    plain: dict[str, int],
    lora_linear: int,
    targets: str | list[str] = "all-linear",
    joined: int = 2,
    **features: object,
) -> Family:
    """``joined``: how many times adapted linears read one input beside each other."""
    settings = {**_SMALL, **features}
    lora = {**common, "lora_linear": lora_linear} if lora_linear else common
    lora = {**lora, "qkv_block": joined} if joined else lora
    return Family(name, lambda: model(config(**settings)), {**common, **plain}, lora, targets)


def _without(counts: dict[str, int], *rules: str) -> dict[str, int]:
    return {k: v for k, v in counts.items() if k not in rules}


FAMILIES: tuple[Family, ...] = (
    _family("llama", tf.LlamaConfig, tf.LlamaForCausalLM, _LLAMA, _FUSED, 14),
    _family(
        "mistral", tf.MistralConfig, tf.MistralForCausalLM, _LLAMA, _FUSED, 14, sliding_window=8
    ),
    _family("qwen2", tf.Qwen2Config, tf.Qwen2ForCausalLM, _LLAMA, _FUSED, 14),
    _family("qwen3", tf.Qwen3Config, tf.Qwen3ForCausalLM, _FOUR_NORMS, _FUSED, 14, head_dim=16),
    _family("gemma", tf.GemmaConfig, tf.GemmaForCausalLM, _LLAMA, _FUSED, 14, head_dim=16),
    _family(
        "gemma2",
        tf.Gemma2Config,
        tf.Gemma2ForCausalLM,
        {**_FOUR_NORMS, "attention": 2},  # PyTorch has no softcap
        _FUSED,
        14,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        attn_implementation="eager",  # before 5.24 transformers takes SDPA, and leaves softcap out
    ),
    _family(
        "phi3",
        tf.Phi3Config,
        tf.Phi3ForCausalLM,
        _LLAMA,
        _FUSED,
        8,
        joined=0,
        partial_rotary_factor=0.5,
    ),
    # norms stand after the parts, so that none follows a residual add
    _family(
        "olmo2", tf.Olmo2Config, tf.Olmo2ForCausalLM, _without(_FOUR_NORMS, "add_rms_norm"), {}, 14
    ),
    _family(
        "falcon",
        tf.FalconConfig,
        tf.FalconForCausalLM,
        {"rope": 2, "layer_norm": 3, "linear_cross_entropy": 1},
        {},
        8,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        bias=False,
    ),
    _family(
        "gpt2",
        tf.GPT2Config,
        tf.GPT2LMHeadModel,
        {"layer_norm": 5, "linear_cross_entropy": 1},
        {},
        6,
        ["c_attn", "c_proj"],
        joined=0,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    ),
    # the gate of a Mamba block is part of the scan's call
    _family(
        "mamba",
        tf.MambaConfig,
        tf.MambaForCausalLM,
        {"rms_norm": 3, "selective_scan": 2, "linear_cross_entropy": 1},
        {"rms_norm_linear": 2},
        4,
        ["in_proj", "x_proj"],
        joined=0,
        state_size=4,
    ),
)


def build(family: Family, lora: bool, seed: int = 0, **lora_options: object) -> nn.Module:
    """A tiny model in training mode; with LoRA, both adapter matrices are random, not zero."""
    torch.manual_seed(seed)
    model = family.build().train()
    if not lora:
        return model
    options: dict[str, object] = {"r": 4, "lora_alpha": 8, "target_modules": family.targets}
    fan = {"fan_in_fan_out": True} if family.name == "gpt2" else {}
    model = get_peft_model(model, LoraConfig(**{**options, **fan, **lora_options}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
