"""The keys of other methods: energy-based fine-tuning, quantized training, diffusion."""

from __future__ import annotations

from ..base import Keys, not_applicable, not_yet
from .compression import AFTERWARDS, QAT, QatKeys, QuantizationKeys
from .diffusion import DIFFUSION, DiffusionDecisionKeys, DiffusionKeys, DiffusionLmKeys
from .energy import EBFT, EbftKeys


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
