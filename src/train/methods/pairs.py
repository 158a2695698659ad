"""DPO and IPO: two answers to a prompt, and a model that learns which one is better."""

from __future__ import annotations

from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer

from .reference import drop_idle_copy
from .tuner import MethodTuner


class PairTuner(MethodTuner, DPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of direct preference optimization (Rafailov et al. 2023) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        drop_idle_copy(self.model)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # its rows are tokenized

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """The log-probabilities of the reference; TRL hands all else in a batch to the model."""
        counts = ("tokens", "trained")
        own: Any = super()
        return own.compute_ref_log_probs(
            model, {name: value for name, value in inputs.items() if name not in counts}
        )
