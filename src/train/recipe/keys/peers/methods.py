"""The keys of other methods than supervised training: preferences, rewards, quantized training."""

from __future__ import annotations

from typing import Literal

from ..base import Float, Int, Keys, not_applicable, not_yet
from .compression import AFTERWARDS, QAT, QatKeys, QuantizationKeys
from .diffusion import DIFFUSION, DiffusionDecisionKeys, DiffusionKeys, DiffusionLmKeys
from .preferences import ONLY as _ONLY
from .preferences import EbftKeys, TrlKeys, VllmKeys

_SFT = "only supervised training so far; use TRL's trainer on an optimized model"
_TEACHER = "only distillation reads it"


class MethodKeys(Keys):
    """Other methods."""

    rl: Literal["dpo", "ipo", "orpo", "kto", "simpo", "grpo", "gdpo", "cpo", "ebft"] | None = (
        not_yet(_SFT)
    )
    """A method that learns from preferences or rewards. Unset: supervised training."""

    trl: TrlKeys | None = not_applicable(_ONLY)
    """Settings of TRL's trainers. Unset: none."""

    vllm: VllmKeys | None = not_applicable(_ONLY)
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

    dpo_ld_alpha: Float | None = not_applicable(_ONLY)
    """Weight of what the longer answer has more than the shorter one (LD-DPO). Unset: 1."""

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

    ebft: EbftKeys | None = not_applicable(_ONLY)
    """Settings of energy-based tuning. Unset: none."""

    qat: QatKeys | None = not_yet(QAT)
    """Quantization-aware training. Unset: no."""

    quantization: QuantizationKeys | None = not_yet(AFTERWARDS)
    """Quantization after training. Unset: none."""

    diffusion: DiffusionKeys | None = not_yet(DIFFUSION)
    """Train a language model by diffusion. Unset: no."""

    diffusion_lm: DiffusionLmKeys | None = not_yet(DIFFUSION)
    """The same with the settings of newer releases. Unset: no."""

    diffusion_decision: DiffusionDecisionKeys | None = not_yet(DIFFUSION)
    """Train a diffusion model to decide between answers. Unset: no."""

    kd_trainer: bool | None = not_yet("train on the teacher's answers")
    """Learn from a teacher's probabilities. Unset: no."""

    kd_ce_alpha: Float | None = not_applicable(_TEACHER)
    """Weight of the labels beside the teacher. Unset: 1."""

    kd_top_k_before_softmax: bool | None = not_applicable(_TEACHER)
    """Cut the logits before the softmax. Unset: no."""

    kd_alpha: Float | None = not_applicable(_TEACHER)
    """Weight of the teacher. Unset: 1."""

    kd_temperature: Float | None = not_applicable(_TEACHER)
    """Temperature of the teacher. Unset: 1."""

    kd_temperature_min: Float | None = not_applicable(_TEACHER)
    """The temperature that it falls to. Unset: it stays."""

    kd_beta: Float | None = not_applicable(_TEACHER)
    """0 for the teacher's divergence, 1 for the model's, between: both. Unset: 0."""

    kd_normalize_topk: bool | None = not_applicable(_TEACHER)
    """Let the teacher's probabilities add up to 1. Unset: no."""

    kd_online_server_base_url: str | None = not_applicable(_TEACHER)
    """The address of a teacher that is asked during training. Unset: rows have its answers."""

    kd_online_server: str | None = not_applicable(_TEACHER)
    """Who serves that teacher. Unset: ``vllm``."""

    kd_online_topk: Int | None = not_applicable(_TEACHER)
    """Tokens whose probabilities it is asked for. Unset: none."""

    kd_online_timeout: Int | None = not_applicable(_TEACHER)
    """Longest wait for it, in seconds. Unset: 120."""
