"""The groups of keys for training diffusion language models."""

from __future__ import annotations

from typing import Any

from ..base import UnreadKeys, unread

DIFFUSION = "only causal language models can be trained so far"
_KEY = unread("not yet available", DIFFUSION)


class DiffusionKeys(UnreadKeys):
    """``diffusion``: the settings of older releases."""

    eps: Any = _KEY
    generate_samples: Any = _KEY
    generation_interval: Any = _KEY
    generation_max_length: Any = _KEY
    generation_steps: Any = _KEY
    generation_temperature: Any = _KEY
    importance_weighting: Any = _KEY
    mask_token_id: Any = _KEY
    mask_token_str: Any = _KEY
    max_mask_ratio: Any = _KEY
    min_mask_ratio: Any = _KEY
    noise_schedule: Any = _KEY
    num_diffusion_steps: Any = _KEY
    num_generation_samples: Any = _KEY


class SelfConditioningKeys(UnreadKeys):
    """``diffusion_lm.self_conditioning``."""

    p: Any = _KEY
    train_module: Any = _KEY


class UnrollKeys(UnreadKeys):
    """``diffusion_lm.unroll``."""

    eval_steps: Any = _KEY
    grad_through_steps: Any = _KEY
    k_max: Any = _KEY


class DiffusionLmKeys(UnreadKeys):
    """``diffusion_lm``: the settings of newer releases."""

    allow_native_vocab_resize: Any = _KEY
    alpha: Any = _KEY
    canvas_width: Any = _KEY
    cart_p: Any = _KEY
    encoder_ar_weight: Any = _KEY
    eos_tail: Any = _KEY
    eps: Any = _KEY
    from_causal_lm: Any = _KEY
    gamma: Any = _KEY
    generate_samples: Any = _KEY
    generation_interval: Any = _KEY
    generation_max_length: Any = _KEY
    generation_steps: Any = _KEY
    generation_temperature: Any = _KEY
    importance_weighting: Any = _KEY
    mask_token_id: Any = _KEY
    mask_token_str: Any = _KEY
    max_mask_ratio: Any = _KEY
    min_mask_ratio: Any = _KEY
    noise_schedule: Any = _KEY
    num_diffusion_steps: Any = _KEY
    num_generation_samples: Any = _KEY
    objective_reduction: Any = _KEY
    overflow_policy: Any = _KEY
    rhine_weight_clip: Any = _KEY
    self_conditioning: SelfConditioningKeys | None = _KEY
    t_eps: Any = _KEY
    time_weighting: Any = _KEY
    token_reweighting: Any = _KEY
    treat_eos_as_one: Any = _KEY
    unroll: UnrollKeys | None = _KEY


class DecisionMixtureKeys(UnreadKeys):
    """``diffusion_decision.mixture``."""

    loss_weight: Any = _KEY
    max_examples_per_source: Any = _KEY
    per_batch_stratified: Any = _KEY
    premixed: Any = _KEY
    temperature: Any = _KEY
    weights: Any = _KEY


class DecisionLabelKeys(UnreadKeys):
    """``diffusion_decision.labels``."""

    brier_weight: Any = _KEY
    codebook: Any = _KEY
    full_ce_weighting: Any = _KEY
    hard_label_smoothing: Any = _KEY
    label_shuffle_prob: Any = _KEY
    label_softmax: Any = _KEY


class DecisionLatentKeys(UnreadKeys):
    """``diffusion_decision.latent``."""

    free_update_policy: Any = _KEY
    mode: Any = _KEY
    num_slots: Any = _KEY
    sample_num_slots: Any = _KEY
    token_ids: Any = _KEY


class DecisionCarryKeys(UnreadKeys):
    """``diffusion_decision.carry``."""

    enabled: Any = _KEY


class DiffusionDecisionKeys(UnreadKeys):
    """``diffusion_decision``: models that choose between given answers."""

    allow_manifest_mismatch: Any = _KEY
    answer_format: Any = _KEY
    canvas_prefix_ids: Any = _KEY
    carry: DecisionCarryKeys | None = _KEY
    decontaminate: Any = _KEY
    image_cache_size: Any = _KEY
    labels: DecisionLabelKeys | None = _KEY
    latent: DecisionLatentKeys | None = _KEY
    layout: Any = _KEY
    max_image_size: Any = _KEY
    max_questions_per_canvas: Any = _KEY
    mixture: DecisionMixtureKeys | None = _KEY
    prepared_cache_verify: Any = _KEY
    read_fraction: Any = _KEY
    read_overflow_canvas_width: Any = _KEY
