"""ORPO, CPO and SimPO: pairs of answers, and no reference model."""

from __future__ import annotations

import warnings
from typing import Any

from .float_logits import FloatLogits
from .tuner import MethodTuner

with warnings.catch_warnings():  # that TRL calls these trainers experimental: recipes name them
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

__all__ = ["CPOConfig", "CPOTrainer", "CpoTuner", "ORPOConfig", "ORPOTrainer", "OrpoTuner"]


class _OddsTuner(MethodTuner):
    """What TRL's trainers of these methods have in common."""

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Both answers of each pair in one forward pass, and their log-probabilities."""
        own: Any = super()
        return own.concatenated_forward(FloatLogits(model), batch)

    def evaluated_loss(self, batch: Any) -> Any:
        """The loss; these trainers measure everything as training unless told otherwise."""
        own: Any = self
        loss, measured = own.get_batch_loss_metrics(self.model, batch, train_eval="eval")
        own.store_metrics(measured, train_eval="eval")
        return loss


class OrpoTuner(_OddsTuner, ORPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of odds ratio preference optimization (Hong et al. 2024) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """


class CpoTuner(_OddsTuner, CPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of CPO (Xu et al. 2024) and SimPO (Meng et al. 2024) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """
