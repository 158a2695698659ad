"""The tables of sizes and features that `architectures` builds tiny models from."""

from __future__ import annotations

from typing import Any

HIDDEN = 64
VOCAB = 211
POSITIONS = 128

# A whole-number field of a configuration gets the size in front of its name.
_SIZE_NAMES: dict[int, str] = {
    VOCAB: (
        "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input "
        "pronunciation_vocab_size shape_vocab_size output_vocab_size"
    ),
    POSITIONS: (
        "max_position_embeddings n_positions n_ctx model_max_length max_seq_len "
        "max_target_positions max_source_positions context_length rel_extent"
    ),
    HIDDEN: (
        "hidden_size d_model n_embd emb_dim embedding_size dim word_embed_proj_dim lru_width "
        "input_embedding_size output_embedding_size embedding_dim hidden_size_global "
        "pronunciation_embed_dim shape_embed_dim backbone_hidden_size"
    ),
    112: (
        "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim d_ff dff "
        "dim_ff n_inner d_inner intermediate_size_mlp dense_intermediate_size feed_forward_size"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads "
        "swa_num_attention_heads attention_heads num_attention_heads_per_layer time_step_rank "
        "mamba_dt_rank linear_num_value_heads"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads o_groups num_experts_per_tok "
        "num_experts_per_token moe_topk moe_top_k moe_k n_group num_expert_group "
        "zero_expert_num linear_num_key_heads index_n_heads"
    ),
    16: (
        "head_dim attention_head_dim kv_channels swa_head_dim d_head dim_head d_kv kv_lora_rank "
        "q_lora_rank o_lora_rank loop_gate_rank hc_lowrank qk_nope_head_dim local_attention "
        "mamba_d_head mamba_head_dim index_head_dim"
    ),
    8: (
        "qk_rope_head_dim rotary_dim n_routed_experts num_experts num_local_experts "
        "moe_num_experts sliding_window sliding_window_size attention_window_size window_size "
        "attention_chunk_size keep_window_size local_attention_window_len mamba_d_state "
        "state_size ssm_state_size mamba_n_heads mamba_num_heads mamba_chunk_size chunk_size "
        "linear_key_head_dim linear_value_head_dim index_topk index_block_size "
        "hidden_size_per_layer_input laurel_rank"
    ),
    12: "v_head_dim",
    24: "query_pre_attn_scalar",
    32: (
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size expert_ffn_hidden_size "
        "shared_experts_intermediate_size router_hidden_size"
    ),
    1: "topk_group first_k_dense_replace num_dense_layers max_window_layers",
}
SIZES = {name: size for size, names in _SIZE_NAMES.items() for name in names.split()}

# The names under which configurations hold the number of their layers.
DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
    "depth",
    "num_layers_per_stack",
)

# Sizes of the encoders of pictures and sound that hang on a decoder.
ENCODER_SIZES: dict[str, int] = {
    "image_size": 32,
    "patch_size": 8,
    "crop_size": 32,
    "mlp_dim": 112,
    "output_channels": 32,
    "ext_pw_out_channel": 64,
    "depthwise_separable_out_channel": 64,
    "nemo_conv_channels": 64,
    "input_size": 64,
    "audio_vocab_size": VOCAB,
}

# Features that most released models of a family have and that default to off.
FEATURES: dict[str, Any] = {
    "use_qk_norm": True,
    "qk_layernorm": True,
    "clip_qkv": 8.0,
    "mup_enabled": True,
    "embedding_multiplier": 6.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.25,
    "attention_multiplier": 0.125,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_CONV = ["conv", "full_attention"]
_FULL = ["full_attention", "sliding_attention"]
_SLIDING = ["sliding_attention", "full_attention"]
_MOE = ["dense", "sparse"]

# What single families insist on, by `model_type`; it overrides everything above.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "cohere2_moe": {
        "num_hidden_layers": 2,
        "num_shared_experts": 1,
        "layer_types": _SLIDING,
        "mlp_layer_types": _MOE,
    },
    "cohere_compass_text": {
        "num_hidden_layers": 2,
        "logit_scale": 0.25,
        "layer_types": _SLIDING,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
            for kind in _SLIDING
        },
    },
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 500000.0}},
    "deepseek_v2": {
        "n_group": 2,
        "num_experts_per_tok": 2,
        "topk_group": 1,
        "topk_method": "group_limited_greedy",
        "first_k_dense_replace": 1,
    },
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "index_topk": 2,
    },
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": _SLIDING * 2,
    },
    "dots1": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 24,
        "swa_v_head_dim": 12,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": _SLIDING * 2,
        "intermediate_size": [112] * 4,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "global_head_dim": 32,
        "layer_types": _SLIDING * 2,
    },
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "position_embedding_type": "rope",
    },
    "granitemoe_swa": {"shared_intermediate_size": 32},
    "granitemoeshared": {"shared_intermediate_size": 32},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2},
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "n_layers_per_attn_res_block": 1,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 1},
    "inkling_text": {"mlp_layer_types": _MOE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "laguna": {
        "num_hidden_layers": 3,
        "layer_types": [*_FULL, "full_attention"],
        "mlp_layer_types": [*_MOE, "sparse"],
        "num_attention_heads_per_layer": [4, 8, 4],
    },
    "lfm2": {"num_hidden_layers": 2, "layer_types": _CONV},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": [*_CONV, "conv"]},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mellum": {"num_hidden_layers": 2, "layer_types": _FULL},
    "minimax": {"block_size": 8},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": _MOE,
        "index_topk_blocks": 2,
    },
    "ministral": {"num_hidden_layers": 2, "head_dim": 16, "layer_types": _SLIDING},
    "nemotron": {"num_key_value_heads": 2},
    "phi3": {"sliding_window": 8},
    "phimoe": {"sliding_window": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": VOCAB,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [4, 6],
        "attention_head_size": 16,
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "starcoder2": {"sliding_window": 8},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zaya": {
        "num_hidden_layers": 2,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "sliding_window": 8,
    },
}

# Why a registered name has no trainable tiny model.
IMPOSSIBLE: dict[str, str] = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "a drafter: it needs the embeddings and the keys and values of its backbone, and has no loss",
)

# Decoders of sound: every codebook has its own row of ids, the labels have one more dimension.
CODEBOOKS = frozenset({"musicgen_decoder", "musicgen_melody_decoder"})

# Decoders whose loss insists on a picture in front of the text.
PICTURES = frozenset({"git"})

# Families whose kernels read these projections' weights past the module; PEFT refuses them.
UNTARGETABLE: dict[str, frozenset[str]] = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), frozenset({"out_proj"})
)
