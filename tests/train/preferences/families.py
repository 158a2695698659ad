"""Tiny models with the classes, the special tokens and the templates of families."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ..conftest import CHATML

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 8192, "use_cache": False,
}  # fmt: skip
_LLAMA = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|finetune_right_pad_id|>",
)  # fmt: skip
_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
_FALCON = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


def _bytes(specials: Sequence[str], template: str | None, **named: str) -> Any:
    """A tokenizer with a token for each byte, and these special tokens."""
    vocabulary = {t: i for i, t in enumerate([*specials, *pre_tokenizers.ByteLevel.alphabet()])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(specials))
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template, **named)


def _pieces(*specials: str) -> Any:
    """A tokenizer of the class ``LlamaTokenizer``, which Mistral's first models have, too."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *string.ascii_letters])}
    made = tf.LlamaTokenizer(vocab=vocabulary, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(specials)})
    return made


def _llama(eos: str) -> Any:
    return _bytes(_LLAMA, None, bos_token="<|begin_of_text|>", eos_token=eos)


def _qwen(eos: str) -> Any:
    return _bytes(_QWEN, CHATML, eos_token=eos, pad_token="<|endoftext|>")


_FALCON_TOKENS = {
    "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>",
}  # fmt: skip
_GEMMA_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}

FAMILIES: dict[str, tuple[type[Any], type[Any], Callable[[], Any]]] = {
    "axolotl-ai-co/Falcon-E-1.2-3B-Exp-prequantized": (
        tf.LlamaConfig, tf.LlamaForCausalLM, lambda: _bytes(_FALCON, CHATML, **_FALCON_TOKENS),
    ),
    "google/gemma-2-2b": (
        tf.Gemma2Config, tf.Gemma2ForCausalLM, lambda: _bytes(_GEMMA, None, **_GEMMA_TOKENS),
    ),
    "meta-llama/Meta-Llama-3-8B-Instruct": (
        tf.LlamaConfig, tf.LlamaForCausalLM, lambda: _llama("<|eot_id|>"),
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        tf.LlamaConfig, tf.LlamaForCausalLM, lambda: _llama("<|eot_id|>"),
    ),
    "meta-llama/Llama-3.2-1B": (
        tf.LlamaConfig, tf.LlamaForCausalLM, lambda: _llama("<|end_of_text|>"),
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": (tf.MistralConfig, tf.MistralForCausalLM, _pieces),
    # a recipe writes ChatML for it: in a model without its tokens, the end of a turn would be text
    "mistralai/Mistral-7B-v0.1": (
        tf.MistralConfig, tf.MistralForCausalLM, lambda: _pieces("<|im_start|>", "<|im_end|>"),
    ),
    "Qwen/Qwen2.5-0.5B": (tf.Qwen2Config, tf.Qwen2ForCausalLM, lambda: _qwen("<|endoftext|>")),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        tf.Qwen2Config, tf.Qwen2ForCausalLM, lambda: _qwen("<|im_end|>"),
    ),
    "Qwen/Qwen2.5-3B": (tf.Qwen2Config, tf.Qwen2ForCausalLM, lambda: _qwen("<|endoftext|>")),
    "Skywork/Skywork-Reward-V2-Qwen3-8B": (
        tf.Qwen3Config, tf.Qwen3ForSequenceClassification, lambda: _qwen("<|im_end|>"),
    ),
}  # fmt: skip
"""The configuration, the class and the tokenizer of each model that a recipe names."""


def save(name: str, folder: Path) -> None:
    """Save a tiny model in the place of the one of this name.

    Args:
        name: one of ``FAMILIES``.
        folder: where to.
    """
    configuration, kind, tokenizer_of = FAMILIES[name]
    tokenizer = tokenizer_of()
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    own = {"num_labels": 1} if kind is tf.Qwen3ForSequenceClassification else {}
    config = configuration(vocab_size=len(tokenizer), **_SIZES, **ids, **own)
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
