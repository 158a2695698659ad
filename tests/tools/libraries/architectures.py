"""Transformers' common tests for tiny decoders; copied beside ``test_modeling_common.py``.

The source distribution of transformers holds the common tests, but not the small files that apply
them to each architecture. This one does it for those that decoder-only models are mostly made of.
"""

from __future__ import annotations

import unittest
from typing import Any

import transformers as tf

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask

_SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "pad_token_id": 0}
_KINDS = ("Model", "ForCausalLM", "LMHeadModel", "ForSequenceClassification")
_DROPOUTS = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}


class Tester:
    """What the common tests ask a model for."""

    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, num_attention_heads, hidden_size, vocab_size = 2, 4, 32, 99

    def __init__(self, config: Any) -> None:
        self.get_config = config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """A configuration, and token ids with a mask."""
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


def _tests(name: str, **features: Any) -> type:
    """The common tests for the model classes of ``name``, tiny and with ``features`` of its own."""
    settings = features.pop("all", None) or {**_SIZES, **features}
    config = getattr(tf, f"{name}Config")
    names = (f"{name}{kind}" for kind in _KINDS)

    def set_up(self: Any) -> None:
        self.model_tester = Tester(lambda: config(**settings))

    classes = tuple(getattr(tf, n) for n in names if hasattr(tf, n))
    body = {"all_model_classes": classes, "setUp": set_up, "__module__": __name__}
    return type(f"{name}Test", (ModelTesterMixin, unittest.TestCase), body)


LlamaTest = _tests("Llama")
MistralTest = _tests("Mistral")
Qwen2Test = _tests("Qwen2")
Qwen3Test = _tests("Qwen3", head_dim=8)
GemmaTest = _tests("Gemma", head_dim=8)
Gemma2Test = _tests("Gemma2", head_dim=8)
Phi3Test = _tests("Phi3")
Olmo2Test = _tests("Olmo2")
CohereTest = _tests("Cohere")
GraniteTest = _tests("Granite")
StableLmTest = _tests("StableLm")
Starcoder2Test = _tests("Starcoder2")
GPTNeoXTest = _tests("GPTNeoX")
OPTTest = _tests("OPT", ffn_dim=37, word_embed_proj_dim=32)
GPT2Test = _tests("GPT2", all={**_GPT2, **_DROPOUTS})
MixtralTest = _tests("Mixtral", num_local_experts=4, intermediate_size=48)  # rows of 16 bytes
Qwen2MoeTest = _tests(
    "Qwen2Moe", num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24
)
MambaTest = _tests("Mamba", state_size=4)
