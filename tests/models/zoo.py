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


def _family(name: str, config: type, model: type, plain: dict[str, int], lora: dict[str, int],
            targets: str | list[str] = "all-linear", **features: object) -> Family:
    settings = {**_SMALL, **features}
    return Family(name, lambda: model(config(**settings)), plain, lora, targets)


FAMILIES: tuple[Family, ...] = (
    _family("llama", tf.LlamaConfig, tf.LlamaForCausalLM, {}, {}),
    _family("mistral", tf.MistralConfig, tf.MistralForCausalLM, {}, {}, sliding_window=8),
    _family("qwen2", tf.Qwen2Config, tf.Qwen2ForCausalLM, {}, {}),
    _family("qwen3", tf.Qwen3Config, tf.Qwen3ForCausalLM, {}, {}, head_dim=16),
    _family("gemma", tf.GemmaConfig, tf.GemmaForCausalLM, {}, {}, head_dim=16),
    _family("gemma2", tf.Gemma2Config, tf.Gemma2ForCausalLM, {}, {}, head_dim=16,
            sliding_window=8, query_pre_attn_scalar=16),
    _family("phi3", tf.Phi3Config, tf.Phi3ForCausalLM, {}, {},
            partial_rotary_factor=0.5),
    _family("olmo2", tf.Olmo2Config, tf.Olmo2ForCausalLM, {}, {}),
    _family("falcon", tf.FalconConfig, tf.FalconForCausalLM, {}, {}, multi_query=True,
            parallel_attn=True, new_decoder_architecture=False, bias=False),
    _family("gpt2", tf.GPT2Config, tf.GPT2LMHeadModel, {}, {}, targets=["c_attn", "c_proj"],
            n_embd=64, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, embd_pdrop=0.0,
            resid_pdrop=0.0),
    _family("mamba", tf.MambaConfig, tf.MambaForCausalLM, {}, {},
            targets=["in_proj", "x_proj", "out_proj"], state_size=4),
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
