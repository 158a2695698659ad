"""The keys of other methods than supervised training: preferences, rewards, quantized training."""

from __future__ import annotations

from typing import Literal

from ..base import Float, Int, Keys, not_applicable, not_yet
from .compression import AFTERWARDS, QAT, QatKeys, QuantizationKeys
from .diffusion import DIFFUSION, DiffusionDecisionKeys, DiffusionKeys, DiffusionLmKeys
from .preferences import ONLY as _ONLY
from .preferences import EbftKeys, TrlKeys, VllmKeys

_SFT = "only supervised training so far; use TRL's trainer on an optimized model"
_TEACHER = "only distillation (key kd_trainer) reads it"


class MethodKeys(Keys):
    """Other methods."""

    rl: Literal["dpo", "ipo", "orpo", "kto", "simpo", "grpo", "gdpo", "cpo", "ebft"] | None = (
        not_yet(_SFT)
    )
    """The preference or reinforcement learning method. Unset: supervised training."""

    trl: TrlKeys | None = not_applicable(_ONLY)
    """Settings for TRL's trainers. Unset: none."""

    vllm: VllmKeys | None = not_applicable(_ONLY)
    """Settings for vLLM, which generates completions for GRPO. Unset: none."""

    reward_model: bool | None = not_yet(_SFT)
    """Train a reward model. Unset: no."""

    process_reward_model: bool | None = not_yet(_SFT)
    """Train a reward model that scores each reasoning step. Unset: no."""

    num_labels: Int | None = not_applicable("only a reward model has labels")
    """Number of outputs of a reward model. Unset: 1."""

    center_rewards_coefficient: Float | None = not_applicable("only a reward model reads it")
    """Coefficient of the loss term that keeps the mean reward close to 0. Unset: 0."""

    rl_beta: Float | None = not_applicable(_ONLY, aliases=["dpo_beta", "beta"])
    """Strength of the penalty for moving away from the reference model. Unset: the method's
    default."""

    dpo_use_weighting: bool | None = not_applicable(_ONLY)
    """Weight each pair by its probability under the model. Unset: no."""

    dpo_label_smoothing: Float | None = not_applicable(_ONLY)
    """Probability that the two answers of a pair are swapped. Unset: 0."""

    dpo_loss_type: list[str] | str | None = not_applicable(_ONLY)
    """The loss, or losses, of DPO. Unset: ``sigmoid``."""

    dpo_loss_weights: list[Float] | None = not_applicable(_ONLY)
    """Weights of several DPO losses. Unset: 1 each."""

    dpo_padding_free: bool | None = not_applicable(_ONLY)
    """Concatenate the sequences of a batch instead of padding them. Unset: no."""

    dpo_norm_loss: bool | None = not_applicable(_ONLY)
    """Normalize the loss by the length of the answer. Unset: no."""

    dpo_use_logits_to_keep: bool | None = not_applicable(_ONLY)
    """Compute logits for the answers only. Unset: no."""

    dpo_generate_during_eval: bool | None = not_applicable(_ONLY)
    """Generate answers during validation. Unset: no."""

    dpo_ld_alpha: Float | None = not_applicable(_ONLY)
    """Weight of the tokens that an answer has beyond the length of the shorter one (LD-DPO). Unset:
    1."""

    precompute_ref_log_probs: bool | None = not_applicable(_ONLY)
    """Compute the log probabilities of the reference model before training. Unset: no."""

    orpo_alpha: Float | None = not_applicable(_ONLY)
    """Weight of the odds-ratio term of ORPO. Unset: 0.1."""

    rpo_alpha: Float | None = not_applicable(_ONLY)
    """Weight of the log-likelihood term of RPO. Unset: none."""

    cpo_alpha: Float | None = not_applicable(_ONLY)
    """Weight of the log-likelihood term of CPO. Unset: 1."""

    simpo_gamma: Float | None = not_applicable(_ONLY)
    """Target reward margin of SimPO. Unset: 0.5."""

    kto_desirable_weight: Float | None = not_applicable(_ONLY)
    """Weight of desirable answers in KTO. Unset: 1."""

    kto_undesirable_weight: Float | None = not_applicable(_ONLY)
    """Weight of undesirable answers in KTO. Unset: 1."""

    dpo_use_liger_kernel: bool | None = not_applicable(_ONLY)
    """Use Liger's kernel for the DPO loss. Unset: no."""

    ebft: EbftKeys | None = not_applicable(_ONLY)
    """Settings for energy-based fine-tuning. Unset: none."""

    qat: QatKeys | None = not_yet(QAT)
    """Settings for quantization-aware training. Unset: none."""

    quantization: QuantizationKeys | None = not_yet(AFTERWARDS)
    """Settings for post-training quantization. Unset: none."""

    diffusion: DiffusionKeys | None = not_yet(DIFFUSION)
    """Train the model as a diffusion language model. Unset: no."""

    diffusion_lm: DiffusionLmKeys | None = not_yet(DIFFUSION)
    """Train the model as a diffusion language model, with the settings of newer releases. Unset:
    no."""

    diffusion_decision: DiffusionDecisionKeys | None = not_yet(DIFFUSION)
    """Train a diffusion model to choose between given answers. Unset: no."""

    kd_trainer: bool | None = not_yet("train on the teacher's answers")
    """Train on the output probabilities of a teacher model (knowledge distillation). Unset: no."""

    kd_ce_alpha: Float | None = not_applicable(_TEACHER)
    """Weight of the cross-entropy loss beside the distillation loss. Unset: 1."""

    kd_top_k_before_softmax: bool | None = not_applicable(_TEACHER)
    """Select the top-k logits before the softmax instead of after it. Unset: no."""

    kd_alpha: Float | None = not_applicable(_TEACHER)
    """Weight of the distillation loss. Unset: 1."""

    kd_temperature: Float | None = not_applicable(_TEACHER)
    """Temperature of the distillation. Unset: 1."""

    kd_temperature_min: Float | None = not_applicable(_TEACHER)
    """Temperature at the end of training, if it decreases. Unset: it stays the same."""

    kd_beta: Float | None = not_applicable(_TEACHER)
    """Interpolates between the forward (0) and the reverse (1) KL divergence. Unset: 0."""

    kd_normalize_topk: bool | None = not_applicable(_TEACHER)
    """Normalize the teacher's top-k probabilities to sum to 1. Unset: no."""

    kd_online_server_base_url: str | None = not_applicable(_TEACHER)
    """URL of a server that runs the teacher during training. Unset: the dataset has the teacher's
    probabilities."""

    kd_online_server: str | None = not_applicable(_TEACHER)
    """The software of that server. Unset: ``vllm``."""

    kd_online_topk: Int | None = not_applicable(_TEACHER)
    """Number of tokens whose probabilities are requested from it. Unset: none."""

    kd_online_timeout: Int | None = not_applicable(_TEACHER)
    """Timeout of such a request, in seconds. Unset: 120."""
