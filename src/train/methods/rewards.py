"""Reward models: a number for an answer, or for each step of it."""

from __future__ import annotations

from typing import Any

from trl.trainer.reward_trainer import RewardTrainer

from .tuner import MethodTuner


class RewardTuner(MethodTuner, RewardTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of reward models for pairs (Bradley and Terry 1952) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # its rows are tokenized
