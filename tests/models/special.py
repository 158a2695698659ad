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
        "mamba_dt_rank linear_num_value_heads linear_num_heads"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads o_groups num_experts_per_tok "
        "num_experts_per_token moe_topk moe_top_k moe_k n_group num_expert_group "
        "zero_expert_num linear_num_key_heads index_n_heads"
    ),
    16: (
        "head_dim attention_head_dim kv_channels swa_head_dim d_head dim_head d_kv kv_lora_rank "
        "q_lora_rank o_lora_rank loop_gate_rank hc_lowrank qk_nope_head_dim local_attention "
        "mamba_d_head mamba_head_dim index_head_dim linear_head_dim"
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
    "layers",
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
    "embed_dim": HIDDEN,
    "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN,
    "output_dim": HIDDEN,
    "num_position_embeddings": 64,
    "patch_embed_hidden_size": HIDDEN,
    "projection_dim": HIDDEN,
    "num_mel_bins": 16,
    "projector_hidden_size": HIDDEN,
    "projection_hidden_dim": HIDDEN,
    "vision_hidden_size": HIDDEN,
    "encoder_hidden_size": HIDDEN,
    "adapter_hidden_size": HIDDEN,
}

# Lists that are none of layers.
LISTS: dict[str, Any] = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]}

# Placeholders of pictures and sound: ids that no text has.
TOKENS: dict[str, int] = {
    f"{medium}_token_{suffix}": 201 + place
    for place, medium in enumerate(
        ("image", "video", "audio", "vision_start", "vision_end", "image_start", "image_end",
         "audio_start", "audio_end", "boi")
    )
    for suffix in ("id", "index")
}  # fmt: skip
TOKENS |= {"eoi_token_id": 210, "eoi_token_index": 210}

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


def _sections(time: int, height: int, width: int, **more: Any) -> dict[str, Any]:
    """Rotary frequencies of which each axis of a picture has some."""
    sections = [time, height, width]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, **more}


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

# The same for whole models with their encoders: what their parts want of each other.
WHOLE: dict[str, dict[str, Any]] = {
    "apertus1p5": {"image_token_offset": 180, "audio_token_offset": 188},
    "apertus1p5_vision_tokenizer": {"codebook_size": 8, "base_channels": 32},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "chameleon": {"vocabulary_map": {"<image>": 201, "IMGIMGAA": 190, "IMGIMGBA": 191}},
    "chameleon_vqgan": {"base_channels": 32, "num_embeddings": 2, "resolution": 32},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [64, 64]},
    "deepseek_ocr2_text": {
        "mlp_layer_types": _MOE,
        "num_experts_per_tok": 2,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "diffusion_gemma_text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "emu3": {
        "vocabulary_map": {
            "<image>": 201,
            "<|extra_200|>": 202,
            "<|visual token 000000|>": 190,
            "<|visual token 000001|>": 191,
        }
    },
    "emu3_vqgan": {"base_channels": 32, "codebook_size": 2, "hidden_size": 128},
    "ernie4_5_vl_moe_text": {"rope_parameters": _sections(3, 3, 2)},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 0, "mask_token_id": 205},
    "esmc": {"num_key_value_heads": 4},
    "evolla": {"hidden_act": "silu"},
    "exaone4_5_vision": {"window_size": 32},
    "florence_vision": {
        "embed_dim": [16, 32, 64, 64],
        "num_heads": [1, 2, 4, 4],
        "num_groups": [1, 2, 4, 4],
        "depths": [1, 1, 1, 1],
        "projection_dim": HIDDEN,
    },
    "fun_asr_nano_encoder": {"num_timestamp_prediction_layers": 1},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16, "projector_hidden_size": HIDDEN},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4_audio": {"subsampling_conv_channels": [16, 8], "output_proj_dims": HIDDEN},
    "glm4v_moe_text": {"rope_parameters": _sections(2, 1, 1, partial_rotary_factor=0.5)},
    "glm4v_text": {"rope_parameters": _sections(3, 3, 2)},
    "glm5_next_text": {"index_kpool": 4},
    "glm_ocr_text": {"rope_parameters": _sections(3, 3, 2)},
    "glmasr_encoder": {"intermediate_size": 4 * HIDDEN},
    "granite4_vision": {
        "deepstack_layer_map": [(1, 0)],
        "spatial_target_layers": [0, 1, 1, 1],
        "downsample_rate": "1/2",
    },
    "granite_speech": {"window_size": 15},
    "granite_speech_encoder": {"hidden_dim": HIDDEN, "context_size": 16},
    "granite_speech_plus": {"window_size": 15},
    "granite_speech_plus_encoder": {"hidden_dim": HIDDEN, "context_size": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": _sections(3, 3, 2)},
    "idefics": {
        "cross_layer_interval": 1,
        "freeze_text_layers": False,
        "freeze_vision_layers": False,
    },
    "internvl_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "janus_vision_model": {"use_qk_norm": False},
    "janus_vqgan": {"base_channels": 32, "num_embeddings": 16},
    "kimi_k25": {"projection_hidden_size": HIDDEN},
    "kosmos-2": {"latent_query_num": 6},
    "kosmos-2.5": {"latent_query_num": 6},
    "kosmos_2_text_model": {"embed_dim": HIDDEN, "max_position_embeddings": 128},
    "kyutai_speech_to_text": {
        "audio_bos_token_id": 64,
        "audio_pad_token_id": 70,
        "codebook_vocab_size": 65,
        "num_codebooks": 2,
    },
    "layoutlmv3": {"coordinate_size": 10, "shape_size": 12},
    "lilt": {"hidden_size": 96},
    "llama4_vision_model": {
        "projector_input_dim": HIDDEN,
        "projector_output_dim": HIDDEN,
        "vision_output_dim": HIDDEN,
        "intermediate_size": 256,
    },
    "luke": {"entity_vocab_size": 32, "entity_emb_size": 16},
    "mimi": {"upsample_groups": HIDDEN},
    "mllama": {"vision_output_dim": 128},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "mllama_vision_model": {"vision_output_dim": 128},
    "molmo2": {"image_patch_id": 201, "low_res_image_start_token_id": 208},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2_vision": {"num_position_embeddings": 16, "image_size": [32, 32]},
    "muse_glimmer": {"out_hidden_size": 4 * HIDDEN},
    "muse_spark": {"out_hidden_size": 4 * HIDDEN},
    "muse_spark_audio": {"out_hidden_size": HIDDEN, "hidden_sizes": [16, 32, 64, 64]},
    "muse_spark_text": {"moe_hidden_size": 32},
    "nemotron3_5_transcribe_word_timestamp": {"blank_token_id": 205},
    "Nemotron3DiarizationHeadConfig": {"audio_hidden_size": HIDDEN},
    "paddleocr_vl_text": {"rope_parameters": _sections(3, 3, 2)},
    "paligemma": {"projection_dim": HIDDEN},
    "perceiver": {"d_latents": HIDDEN, "num_latents": 8, "num_self_attends_per_block": 2},
    "pp_formulanet_vision": {
        "post_conv_in_channels": 32,
        "post_conv_mid_channels": 32,
        "post_conv_out_channels": 64,
        "decoder_hidden_size": HIDDEN,
    },
    "qianfan_ocr_vision": {"image_size": [32, 32], "patch_size": [8, 8]},
    "qwen2_5_omni_text": {"rope_parameters": _sections(3, 3, 2)},
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "qwen2_5_vl_text": {"rope_parameters": _sections(3, 3, 2)},
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen2_vl_text": {"rope_parameters": _sections(3, 3, 2)},
    "radio": {"video_temporal_patch_size": 2},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "step3p5": {"sliding_window": 8},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [64, 64]},
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 4,
        "depths": [1, 1, 1],
        "downsampling_ratios": [2, 4],
    },
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "vision-encoder-decoder": {"pad_token_id": 0},
    "voxtral_encoder": {"intermediate_size": 4 * HIDDEN},
    "wavtokenizer_encoder": {"codebook_dim": HIDDEN, "codebook_size": 8},
}

_BERT_DECODER = {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}

# What a whole model has by default only when it is named.
PARTS: dict[str, dict[str, Any]] = {
    "diffusion_gemma": {"vision_config": {}},
    "gemma4": {"vision_config": {}, "audio_config": {}},
    "gemma4_unified": {"vision_config": {}, "audio_config": {}},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": _BERT_DECODER},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": _BERT_DECODER},
}

# Why a registered name has no trainable tiny model of a kind.
IMPOSSIBLE: dict[tuple[str, str], str] = {
    **dict.fromkeys(
        (("causal", "gemma4_assistant"), ("causal", "gemma4_unified_assistant")),
        "a drafter: it needs the embeddings and the keys and values of its backbone, and has no "
        "loss",
    ),
    ("embedding", "perceiver"): "it reads bytes of any kind through a preprocessor, no tokens",
    ("embedding", "t5gemma"): "its encoder alone is not the encoder-decoder that its default "
    "configuration is",
    ("encoder-decoder", "musicflamingo"): "the features of a sound need the positions of its own "
    "placeholders, whose number they are",
    ("multimodal", "diffusion_gemma"): "its forward has no loss: it denoises blocks of text",
    ("multimodal", "llama4"): "eager transformers 5.24 fails in training: "
    "'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'",
    **dict.fromkeys(
        (("multimodal", "qwen2_5_omni"), ("multimodal", "qwen3_omni_moe")),
        "it generates only: a talker around the model that is here as its `_thinker`",
    ),
}

# Decoders of sound: every codebook has its own row of ids, the labels have one more dimension.
CODEBOOKS = frozenset({"musicgen_decoder", "musicgen_melody_decoder"})

# Encoder-decoders that are given no inputs of the decoder: it reads what the encoder reads.
SAME_LENGTH = frozenset({"fsmt"})

# Decoders whose loss insists on a picture in front of the text.
PICTURES = frozenset({"git"})

# Families whose kernels read these projections' weights past the module; PEFT refuses them.
UNTARGETABLE: dict[str, frozenset[str]] = dict.fromkeys(
    ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), frozenset({"out_proj"})
)
