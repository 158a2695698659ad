"""The keys of other methods than supervised training: preferences, rewards, quantized training."""

from __future__ import annotations

from typing import Any, Literal

from .base import Float, Int, Keys, not_applicable, not_yet

_SFT = "only supervised training so far; use TRL's trainer on an optimized model"
_ONLY = "only a preference method (key rl) reads it"


class MethodKeys(Keys):
    """Other methods."""

    rl: Literal["dpo", "ipo", "orpo", "kto", "simpo", "grpo", "gdpo", "cpo", "ebft"] | None = (
        not_yet(_SFT)
    )
    """A method that learns from preferences or rewards. Unset: supervised training."""

    trl: dict[str, Any] | None = not_applicable(_ONLY)
    """Settings of TRL's trainers. Unset: none."""

    vllm: dict[str, Any] | None = not_applicable(_ONLY)
    """Settings of vLLM, which generates for GRPO. Unset: none."""

    reward_model: bool | None = not_yet(_SFT)
    """Train a reward model. Unset: no."""

    process_reward_model: bool | None = not_yet(_SFT)
    """Train a reward model for steps of reasoning. Unset: no."""

    num_labels: Int | None = not_applicable("only a reward model has labels")
    """Outputs of a reward model. Unset: 1."""

    center_rewards_coefficient: Float | None = not_applicable("only a reward model reads it")
    """Weight of the rewards' mean in the loss. Unset: 0."""

    rl_beta: Float | None = not_applicable(_ONLY, aliases=["dpo_beta", "beta"])
    """How far a policy may move from its reference. Unset: the method's default."""

    dpo_use_weighting: bool | None = not_applicable(_ONLY)
    """Weigh pairs by their probability. Unset: no."""

    dpo_label_smoothing: Float | None = not_applicable(_ONLY)
    """Fraction of pairs assumed to be swapped. Unset: 0."""

    dpo_loss_type: list[str] | str | None = not_applicable(_ONLY)
    """Which loss of DPO. Unset: ``sigmoid``."""

    dpo_loss_weights: list[Float] | None = not_applicable(_ONLY)
    """Weights of several losses. Unset: 1 each."""

    dpo_padding_free: bool | None = not_applicable(_ONLY)
    """Put the pairs of a batch into one sequence. Unset: no."""

    dpo_norm_loss: bool | None = not_applicable(_ONLY)
    """Divide the loss by the length. Unset: no."""

    dpo_use_logits_to_keep: bool | None = not_applicable(_ONLY)
    """Compute logits of answers only. Unset: no."""

    dpo_generate_during_eval: bool | None = not_applicable(_ONLY)
    """Generate at validation. Unset: no."""

    precompute_ref_log_probs: bool | None = not_applicable(_ONLY)
    """Compute the reference's probabilities before training. Unset: no."""

    orpo_alpha: Float | None = not_applicable(_ONLY)
    """Weight of ORPO's odds ratio. Unset: 0.1."""

    rpo_alpha: Float | None = not_applicable(_ONLY)
    """Weight of the likelihood in RPO. Unset: none."""

    cpo_alpha: Float | None = not_applicable(_ONLY)
    """Weight of the likelihood in CPO. Unset: 1."""

    simpo_gamma: Float | None = not_applicable(_ONLY)
    """Margin of SimPO. Unset: 0.5."""

    kto_desirable_weight: Float | None = not_applicable(_ONLY)
    """Weight of wanted answers in KTO. Unset: 1."""

    kto_undesirable_weight: Float | None = not_applicable(_ONLY)
    """Weight of unwanted answers in KTO. Unset: 1."""

    dpo_use_liger_kernel: bool | None = not_applicable(_ONLY)
    """Liger's loss for DPO. Unset: no."""

    ebft: dict[str, Any] | None = not_applicable(_ONLY)
    """Settings of energy-based tuning. Unset: none."""

    qat: dict[str, Any] | None = not_yet("use adapter: qlora")
    """Quantization-aware training. Unset: no."""

    quantization: dict[str, Any] | None = not_yet("quantize the saved model with its own tool")
    """Quantization after training. Unset: none."""

    diffusion: dict[str, Any] | None = not_yet(_SFT)
    """Train a language model by diffusion. Unset: no."""

    kd_trainer: bool | None = not_yet("train on the teacher's answers")
    """Learn from a teacher's probabilities. Unset: no."""

    kd_ce_alpha: Float | None = not_applicable("only distillation reads it")
    """Weight of the labels beside the teacher. Unset: 1."""

    kd_top_k_before_softmax: bool | None = not_applicable("only distillation reads it")
    """Cut the logits before the softmax. Unset: no."""

    kd_alpha: Float | None = not_applicable("only distillation reads it")
    """Weight of the teacher. Unset: 1."""

    kd_temperature: Float | None = not_applicable("only distillation reads it")
    """Temperature of the teacher. Unset: 1."""
