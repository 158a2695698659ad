"""The preference and reward methods: one record each, by their names in recipes.

Above the records are their trainers: TRL's, and one of process rewards, each with only what differs
from ``EngineMixin``. GRPO's is in ``grpo.py``. What a recipe says of a method (its rows, its keys,
whether it needs a reference model) is in ``recipe/methods_table.py``.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference as DataCollatorForRewards
from trl.trainer.reward_trainer import RewardTrainer

from ..data.images.features import Featurizer
from ..recipe.recipe import Recipe
from ..trainer.engine import EngineMixin
from ..trainer.objective import FloatLogits
from .build import Method
from .grpo import Completions, CompletionTask, Grpo
from .objective import Metrics, Odds, Preferences
from .rows import (
    Counted,
    JudgedStepBatches,
    MismatchedAnswers,
    SeparateAnswers,
    WithImages,
    features_in,
    mismatched,
)

with warnings.catch_warnings():  # that TRL calls these trainers experimental: recipes name them
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

__all__ = ["METHODS", "CPOConfig", "CPOTrainer", "Dpo", "ORPOConfig", "ORPOTrainer"]


class Dpo(EngineMixin, DPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """Direct preference optimization (Rafailov et al. 2023) and IPO (Azar et al. 2023)."""

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """The log-probabilities of the reference; TRL passes all else in a batch to the model."""
        counts = ("tokens", "trained")
        compute: Any = super().compute_ref_log_probs
        return compute(model, {name: value for name, value in inputs.items() if name not in counts})


class Kto(EngineMixin, KTOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """KTO (Ethayarajh et al. 2024)."""


class Orpo(EngineMixin, ORPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """Odds ratio preference optimization (Hong et al. 2024)."""

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Both answers of each pair in one forward pass, and their log-probabilities."""
        forward: Any = super().concatenated_forward
        return forward(FloatLogits(model), batch)


class Cpo(EngineMixin, CPOTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """CPO (Xu et al. 2024) and SimPO (Meng et al. 2024)."""

    def concatenated_forward(self, model: Any, batch: Any) -> Any:
        """Both answers of each pair in one forward pass, and their log-probabilities."""
        forward: Any = super().concatenated_forward
        called = functools.partial(model, **features_in(batch))
        return forward(FloatLogits(called), batch)


class RewardModel(EngineMixin, RewardTrainer):  # type: ignore[misc]  # 2026-11-27: TRL has no types
    """Reward models for pairs (Bradley and Terry 1952)."""


class ProcessRewardModel(EngineMixin, Trainer):
    """Reward models for steps: the cross entropy of the labels at their last tokens."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # says the same to transformers before 5.19
        self._metrics: dict[str, Metrics] = {mode: {} for mode in ("train", "eval")}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The mean loss over the labelled tokens of a batch, (); also measures the accuracy."""
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
        """As Trainer's, with what was measured since the last log."""
        if "loss" in logs:
            measured = self._metrics["train"]
            logs |= {name: sum(values) / len(values) for name, values in measured.items()}
            measured.clear()
        super().log(logs, start_time)


_REWARDS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip


def _pairs(pad: int, featurizer: Featurizer | None) -> Counted:
    return Counted(WithImages(DataCollatorForPreference(pad), featurizer))


def _labelled(pad: int, featurizer: Featurizer | None) -> Counted:
    collate = WithImages(DataCollatorForUnpairedPreference(pad), featurizer)
    return Counted(MismatchedAnswers(collate), ("attention_mask", "KL_attention_mask"))


def _separate(pad: int, featurizer: Featurizer | None) -> Counted:
    masks = "chosen_attention_mask", "rejected_attention_mask"
    return Counted(SeparateAnswers(pad, featurizer), masks, masks)


def _whole_texts(pad: int, featurizer: Featurizer | None) -> Counted:
    return Counted(DataCollatorForRewards(pad), trained=("attention_mask",))


def _steps(pad: int, featurizer: Featurizer | None) -> Counted:
    return Counted(JudgedStepBatches(pad), trained=("label_mask",))


def _uncut(recipe: Recipe) -> dict[str, object]:
    return {"max_length": None}  # rows that are too long are gone by now


def _of_the_recipe(recipe: Recipe) -> dict[str, object]:
    return {"max_length": recipe.sequence_len}


_DPO = Method(Dpo, DPOConfig, _pairs, _REWARDS, _uncut)
_CPO = Method(Cpo, CPOConfig, _separate, (*_REWARDS, "nll_loss"), _of_the_recipe, Odds)
_GRPO = Method(
    Grpo, GRPOConfig, lambda pad, featurizer: list,
    (
        "reward_std", "entropy", "frac_reward_zero_std", "completions/mean_length",
        "completions/min_length", "completions/max_length", "completions/clipped_ratio",
    ),
    objective=Completions, task=CompletionTask,
)  # fmt: skip

METHODS: dict[str, Method] = {
    "dpo": _DPO,
    "ipo": _DPO,
    "kto": Method(
        Kto, KTOConfig, _labelled,
        ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"),
        # the order is fixed here; without "sequential" TRL warns
        lambda recipe: {"max_length": None, "train_sampling_strategy": "sequential"},
        before_precomputing=mismatched,
    ),
    "orpo": Method(Orpo, ORPOConfig, _separate, (*_REWARDS, "nll_loss"), _of_the_recipe, Odds),
    "cpo": _CPO,
    "simpo": _CPO,
    "grpo": _GRPO,
    "gdpo": _GRPO,
    "reward": Method(
        RewardModel, RewardConfig, _whole_texts, ("accuracy", "margin", "mean_reward"), _uncut,
        lambda: Preferences(float_logits=True), whole_texts=True,
    ),
    "process_reward": Method(
        ProcessRewardModel, TrainingArguments, _steps, ("accuracy",),
        objective=lambda: Preferences(float_logits=True),
    ),
}  # fmt: skip
