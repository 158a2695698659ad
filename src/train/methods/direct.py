"""DPO, IPO and KTO: answers compared with what another model thinks of them."""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from .tuner import MethodTuner


class PairTuner(MethodTuner, DPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of direct preference optimization (Rafailov et al. 2023) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """The log-probabilities of the reference; TRL hands all else in a batch to the model."""
        counts = ("tokens", "trained")
        own: Any = super()
        return own.compute_ref_log_probs(
            model, {name: value for name, value in inputs.items() if name not in counts}
        )


class LabelledTuner(MethodTuner, KTOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of KTO (Ethayarajh et al. 2024) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """
