"""A stand-in for llama.cpp's converter that knows the tests' Llama and their tokenizer.

``FAULT`` in the environment plants a fault: ``transposed``, ``dropped``, ``no-template``, ``disk``.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
PLANTED = "model.layers.1.self_attn.o_proj.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of queries and keys, in llama.cpp's order for rotary embeddings."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype")
    options = parser.parse_args()
    fault = os.environ.get("FAULT")
    if fault == "disk":
        options.outfile.write_bytes(b"GGUF")
        raise OSError(28, "No space left on device")
    config = json.loads((options.model / "config.json").read_text())
    if config["model_type"] != "llama":
        raise NotImplementedError(f"Model {config['architectures'][0]} is not supported")
    writer = gguf.GGUFWriter(options.outfile, "llama")
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    words = json.loads((options.model / "tokenizer.json").read_text())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    special = {"<|pad|>", "<|im_start|>", "<|im_end|>"}
    kind_of = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kind_of[token in special] for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in words["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    if fault != "no-template":
        writer.add_chat_template((options.model / "chat_template.jinja").read_text())
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(options.model.glob("*.safetensors")):
        tensors |= load_file(path)
    for name, tensor in tensors.items():
        if fault == "dropped" and name == PLANTED:
            continue
        stem, last = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{NAMES[rest]}"
        else:
            stem = NAMES[stem]
        if rest_is(stem, "attn_q", "attn_k"):
            tensor = permuted(tensor, heads if stem.endswith("q") else kv)
        if fault == "transposed" and name == PLANTED:
            tensor = tensor.T
        kind = gguf.GGMLQuantizationType[options.outtype.upper() if tensor.ndim == 2 else "F32"]
        data = gguf.quants.quantize(np.ascontiguousarray(tensor, np.float32), kind)
        writer.add_tensor(f"{stem}.{last}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rest_is(stem: str, *ends: str) -> bool:
    return stem.rsplit(".", 1)[-1] in ends


if __name__ == "__main__":
    main()
