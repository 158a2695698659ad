"""TRL's trainers in this engine, and one of process rewards; ``table`` says what each is made with.

Each class has only what TRL does otherwise than the engine wants.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch.nn import functional as F
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from ..trainer.engine import EngineMixin
from ..trainer.objective import FloatLogits
from .objective import Metrics

with warnings.catch_warnings():  # that TRL calls these trainers experimental: recipes name them
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

__all__ = [
    "CPOConfig", "CPOTrainer", "Cpo", "Dpo", "Kto", "ORPOConfig", "ORPOTrainer", "Orpo",
    "ProcessReward", "Reward",
]  # fmt: skip


class Dpo(EngineMixin, DPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """Direct preference optimization (Rafailov et al. 2023) and IPO (Azar et al. 2023)."""

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """The log-probabilities of the reference; TRL hands all else in a batch to the model."""
        counts = ("tokens", "trained")
        theirs: Any = super().compute_ref_log_probs
        return theirs(model, {name: value for name, value in inputs.items() if name not in counts})


class Kto(EngineMixin, KTOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """KTO (Ethayarajh et al. 2024)."""


class Orpo(EngineMixin, ORPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """Odds ratio preference optimization (Hong et al. 2024)."""

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Both answers of each pair in one forward pass, and their log-probabilities."""
        theirs: Any = super().concatenated_forward
        return theirs(FloatLogits(model), batch)


class Cpo(EngineMixin, CPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """CPO (Xu et al. 2024) and SimPO (Meng et al. 2024)."""

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Both answers of each pair in one forward pass, and their log-probabilities."""
        theirs: Any = super().concatenated_forward
        return theirs(FloatLogits(model), batch)


class Reward(EngineMixin, RewardTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """Reward models for pairs (Bradley and Terry 1952)."""


class ProcessReward(EngineMixin, Trainer):
    """Reward models for steps: the cross entropy of the labels at their last tokens."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # says the same to transformers before 5.19
        self._metrics: dict[str, Metrics] = {mode: {} for mode in ("train", "eval")}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The mean over the labelled tokens of a batch, (); measures how many of them are right."""
        return self.objective.loss(self._cross_entropy, model, inputs)

    def _cross_entropy(self, model: Any, inputs: Any) -> Any:
        labels, labelled = inputs["labels"], inputs["label_mask"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = F.cross_entropy(outputs.logits[labelled], labels[labelled])
        right = (outputs.logits.detach().argmax(-1) == labels)[labelled].float()
        right = self.accelerator.gather(right) if self.world.several else right
        trained: Any = self.model
        mode = "train" if trained.training else "eval"
        self._metrics[mode].setdefault("accuracy", []).append(float(right.mean()))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, with what was measured since the last log."""
        if "loss" in logs:
            measured = self._metrics["train"]
            logs |= {name: sum(values) / len(values) for name, values in measured.items()}
            measured.clear()
        super().log(logs, start_time)
