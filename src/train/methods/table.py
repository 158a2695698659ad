"""The methods of preferences and rewards: one record each, by the name that recipes have for it.

What a recipe says of a method (its rows, its keys, whether it needs a reference model) is in
``recipe/methods_table.py``.
"""

from __future__ import annotations

from transformers import TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference as DataCollatorForRewards

from ..recipe.recipe import Recipe
from .build import Method
from .grpo import Completions, CompletionTask, Grpo
from .objective import Odds, Preferences
from .rows import Counted, JudgedStepBatches, MismatchedAnswers, SeparateAnswers, mismatched
from .trainers import Cpo, CPOConfig, Dpo, Kto, Orpo, ORPOConfig, ProcessReward, Reward

_REWARDS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip


def _pairs(pad: int) -> Counted:
    return Counted(DataCollatorForPreference(pad))


def _labelled(pad: int) -> Counted:
    collate = MismatchedAnswers(DataCollatorForUnpairedPreference(pad))
    return Counted(collate, ("attention_mask", "KL_attention_mask"))


def _separate(pad: int) -> Counted:
    masks = "chosen_attention_mask", "rejected_attention_mask"
    return Counted(SeparateAnswers(pad), masks, masks)


def _whole_texts(pad: int) -> Counted:
    return Counted(DataCollatorForRewards(pad), trained=("attention_mask",))


def _steps(pad: int) -> Counted:
    return Counted(JudgedStepBatches(pad), trained=("label_mask",))


def _uncut(recipe: Recipe) -> dict[str, object]:
    return {"max_length": None}  # rows that are too long are gone by now


def _of_the_recipe(recipe: Recipe) -> dict[str, object]:
    return {"max_length": recipe.sequence_len}


_DPO = Method(Dpo, DPOConfig, _pairs, _REWARDS, _uncut)
_CPO = Method(Cpo, CPOConfig, _separate, (*_REWARDS, "nll_loss"), _of_the_recipe, Odds)
_GRPO = Method(
    Grpo, GRPOConfig, lambda pad: list,
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
        # the order is ours; without "sequential" it warns
        lambda recipe: {"max_length": None, "train_sampling_strategy": "sequential"},
        before_precomputing=mismatched,
    ),
    "orpo": Method(Orpo, ORPOConfig, _separate, (*_REWARDS, "nll_loss"), _of_the_recipe, Odds),
    "cpo": _CPO,
    "simpo": _CPO,
    "grpo": _GRPO,
    "gdpo": _GRPO,
    "reward": Method(
        Reward, RewardConfig, _whole_texts, ("accuracy", "margin", "mean_reward"), _uncut,
        lambda: Preferences(float_logits=True), whole_texts=True,
    ),
    "process_reward": Method(
        ProcessReward, TrainingArguments, _steps, ("accuracy",),
        objective=lambda: Preferences(float_logits=True),
    ),
}  # fmt: skip
