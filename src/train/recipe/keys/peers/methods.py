"""The keys of other methods: energy-based fine-tuning, quantized training, diffusion, teachers."""

from __future__ import annotations

from ..base import Float, Int, Keys, not_applicable, not_yet
from .compression import AFTERWARDS, QAT, QatKeys, QuantizationKeys
from .diffusion import DIFFUSION, DiffusionDecisionKeys, DiffusionKeys, DiffusionLmKeys
from .energy import EBFT, EbftKeys

_TEACHER = "only distillation (key kd_trainer) reads it"


class MethodKeys(Keys):
    """Other methods."""

    ebft: EbftKeys | None = not_applicable(EBFT)
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
