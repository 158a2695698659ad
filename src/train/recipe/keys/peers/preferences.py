"""The groups of keys that only preference methods read."""

from __future__ import annotations

from typing import Any

from ..base import UnreadKeys, unread

ONLY = "only a preference method (key rl) reads it"
_KEY = unread("not applicable", ONLY)


class TrlKeys(UnreadKeys):
    """``trl``: settings for TRL's trainers."""

    async_prefetch: Any = _KEY
    beta: Any = _KEY
    chat_template_kwargs: Any = _KEY
    entropy_coef: Any = _KEY
    entropy_coef_delta: Any = _KEY
    entropy_coef_max: Any = _KEY
    entropy_coef_min: Any = _KEY
    entropy_target: Any = _KEY
    epsilon: Any = _KEY
    epsilon_high: Any = _KEY
    generation_batch_size: Any = _KEY
    generation_kwargs: Any = _KEY
    importance_sampling_level: Any = _KEY
    log_completions: Any = _KEY
    log_multimodal: Any = _KEY
    loss_type: Any = _KEY
    mask_truncated_completions: Any = _KEY
    max_completion_length: Any = _KEY
    min_p: Any = _KEY
    multi_objective_aggregation: Any = _KEY
    num_completions_to_print: Any = _KEY
    num_generations: Any = _KEY
    num_iterations: Any = _KEY
    off_policy_mask_threshold: Any = _KEY
    prefetch_depth: Any = _KEY
    ref_model_mixup_alpha: Any = _KEY
    ref_model_sync_steps: Any = _KEY
    repetition_penalty: Any = _KEY
    replay_buffer_size: Any = _KEY
    replay_recompute_logps: Any = _KEY
    reroll_max_groups: Any = _KEY
    reroll_start_fraction: Any = _KEY
    reward_funcs: Any = _KEY
    reward_num_workers: Any = _KEY
    reward_weights: Any = _KEY
    rollout_func: Any = _KEY
    scale_rewards: Any = _KEY
    skip_zero_advantage_batches: Any = _KEY
    streaming_min_groups: Any = _KEY
    streaming_partial_batch: Any = _KEY
    sync_ref_model: Any = _KEY
    temperature: Any = _KEY
    top_k: Any = _KEY
    top_p: Any = _KEY
    use_adaptive_entropy: Any = _KEY
    use_bias_correction_kl: Any = _KEY
    use_data_producer: Any = _KEY
    use_liger_loss: Any = _KEY
    use_vllm: Any = _KEY
    vllm_enable_sleep_mode: Any = _KEY
    vllm_guided_decoding_regex: Any = _KEY
    vllm_importance_sampling_cap: Any = _KEY
    vllm_importance_sampling_clip_max: Any = _KEY
    vllm_importance_sampling_clip_min: Any = _KEY
    vllm_importance_sampling_correction: Any = _KEY
    vllm_importance_sampling_mode: Any = _KEY
    vllm_lora_sync: Any = _KEY
    vllm_mode: Any = _KEY
    vllm_server_host: Any = _KEY
    vllm_server_port: Any = _KEY
    vllm_server_timeout: Any = _KEY
    vllm_sync_interval: Any = _KEY


class VllmKeys(UnreadKeys):
    """``vllm``: settings for vLLM, which generates completions for GRPO."""

    data_parallel_size: Any = _KEY
    device: Any = _KEY
    dtype: Any = _KEY
    enable_prefix_caching: Any = _KEY
    enable_reasoning: Any = _KEY
    enforce_eager: Any = _KEY
    gpu_memory_utilization: Any = _KEY
    host: Any = _KEY
    max_model_len: Any = _KEY
    port: Any = _KEY
    reasoning_parser: Any = _KEY
    serve_module: Any = _KEY
    tensor_parallel_size: Any = _KEY
    worker_extension_cls: Any = _KEY


class EbftKeys(UnreadKeys):
    """``ebft``: settings for energy-based fine-tuning."""

    adaptive_max_tokens: Any = _KEY
    advantage_estimator: Any = _KEY
    alignment_coef: Any = _KEY
    ce_coef: Any = _KEY
    context_length: Any = _KEY
    diversity_coef: Any = _KEY
    embed_method: Any = _KEY
    feature_layers: Any = _KEY
    generate_max_len: Any = _KEY
    gt_length_multiplier: Any = _KEY
    min_completion_prefix: Any = _KEY
    mode: Any = _KEY
    n_samples_per_prompt: Any = _KEY
    rl_coef: Any = _KEY
    stride: Any = _KEY
    temperature: Any = _KEY
    top_p: Any = _KEY
    use_whitening: Any = _KEY
