"""Reward models: a number for an answer, or for each step of it."""

from __future__ import annotations

from typing import Any

from torch.nn import functional as F
from trl.trainer.reward_trainer import RewardTrainer

from .float_logits import FloatLogits
from .tuner import MethodTuner, Metrics


class RewardTuner(MethodTuner, RewardTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """TRL's trainer of reward models for pairs (Bradley and Terry 1952) in this engine's loop.

    Args:
        kwargs: those of ``MethodTuner``.
    """

    def _called(self, model: Any) -> Any:
        return FloatLogits(model)


class StepTuner(MethodTuner):
    """Trainer of reward models for steps: the cross entropy of the labels at their last tokens.

    Args:
        kwargs: those of ``MethodTuner``, and of transformers' ``Trainer``.
    """

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # says the same to transformers before 5.19
        self._metrics: dict[str, Metrics] = {mode: {} for mode in ("train", "eval")}

    def _called(self, model: Any) -> Any:
        return FloatLogits(model)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The mean over the labelled tokens of a batch, (); measures how many of them are right."""
        labels, kept = inputs["labels"], inputs["label_mask"]
        outputs = self._called(model)(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )
        loss = F.cross_entropy(outputs.logits[kept], labels[kept])
        right = (outputs.logits.detach().argmax(-1) == labels)[kept].float()
        right = self.accelerator.gather(right) if self.world.several else right
        mode = "train" if model.training else "eval"
        self._metrics[mode].setdefault("accuracy", []).append(float(right.mean()))
        return self._weighed(model, loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's own, with what was measured since the last log."""
        if "loss" in logs:
            measured = self.pending("train")
            logs |= {name: sum(values) / len(values) for name, values in measured.items()}
            measured.clear()
        super().log(logs, start_time)
