"""KTO: answers that are each good or bad."""

from __future__ import annotations

from typing import Any

from trl.trainer.kto_trainer import KTOTrainer

from .reference import drop_idle_copy
from .tuner import MethodTuner


class LabelledTuner(MethodTuner, KTOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of KTO (Ethayarajh et al. 2024) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        drop_idle_copy(self.model)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # its rows are tokenized
