"""What each method is trained with: TRL's trainer, its arguments, the batches, the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import DataCollatorForPreference as DataCollatorForRewards

from ...errors import RecipeError
from ..checkpoint.resume import Saved
from ..data.preferences.examples import Example, Examples
from ..model.tokenizer import pad_token
from ..processes.world import World
from ..recipe.preferences import PreferenceSettings
from ..recipe.recipe import Recipe
from ..trainer.arguments import arguments_for
from ..trainer.build import SupervisedTask, make_trainer
from ..trainer.context import Context
from ..trainer.evaluation import Batches
from ..trainer.trainer import FineTuner
from .direct import LabelledTuner, PairTuner
from .odds import CPOConfig, CpoTuner, ORPOConfig, OrpoTuner
from .reference import reference_model
from .rewards import RewardTuner, StepTuner
from .rows import (
    Counted,
    JudgedStepBatches,
    MismatchedAnswers,
    SeparateAnswers,
    as_dataset,
    blank,
    mismatched,
)


@dataclass(frozen=True)
class MethodParts:
    """What a method is made of.

    Attributes:
        tuner: the trainer.
        arguments: the class of its arguments.
        collate: makes batches, given the token that fills up.
        figures: what validations measure beside the loss.
        extra: arguments that do not depend on the recipe.
    """

    tuner: type[FineTuner]
    arguments: type[Any]
    collate: Callable[[int], Any]
    figures: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


_REWARDS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
)  # fmt: skip


def _of_pairs(pad: int) -> Counted:
    return Counted(DataCollatorForPreference(pad))


def _of_labelled(pad: int) -> Counted:
    collate = MismatchedAnswers(DataCollatorForUnpairedPreference(pad))
    return Counted(collate, ("attention_mask", "KL_attention_mask"))


def _separate(pad: int) -> Counted:
    masks = "chosen_attention_mask", "rejected_attention_mask"
    return Counted(SeparateAnswers(pad), masks, masks)


def _of_steps(pad: int) -> Counted:
    return Counted(JudgedStepBatches(pad), trained=("label_mask",))


def _of_rewards(pad: int) -> Counted:
    return Counted(DataCollatorForRewards(pad), trained=("attention_mask",))


_PAIRS = MethodParts(PairTuner, DPOConfig, _of_pairs, _REWARDS, {"max_length": None})
_CPO = MethodParts(CpoTuner, CPOConfig, _separate, (*_REWARDS, "nll_loss"))
_PARTS: dict[str, MethodParts] = {
    "dpo": _PAIRS,
    "ipo": _PAIRS,
    "kto": MethodParts(
        LabelledTuner, KTOConfig, _of_labelled,
        ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"),
        {"max_length": None, "train_sampling_strategy": "sequential"},  # else it warns; unused
    ),
    "orpo": MethodParts(OrpoTuner, ORPOConfig, _separate, (*_REWARDS, "nll_loss")),
    "cpo": _CPO,
    "simpo": _CPO,
    "reward": MethodParts(
        RewardTuner, RewardConfig, _of_rewards, ("accuracy", "margin", "mean_reward"),
        {"max_length": None},
    ),
    "process_reward": MethodParts(StepTuner, TrainingArguments, _of_steps, ("accuracy",)),
}  # fmt: skip
"""What each method is made of."""


class PreferenceTask(SupervisedTask):
    """Training on preferences or rewards, by a trainer of TRL.

    Args:
        recipe: checked.
        settings: what it says of the method.
        parts: what the method is made of, if it is none of those above.
    """

    validates_first = False

    def __init__(
        self, recipe: Recipe, settings: PreferenceSettings, parts: MethodParts | None = None
    ) -> None:
        super().__init__(recipe)
        self.settings = settings
        self.parts = parts or _PARTS[settings.method]

    def sequences(self, prepared: Any) -> Any:
        """The rows of an epoch, by TRL's names for their parts."""
        return self._examples(prepared.train)

    def _examples(self, samples: Any) -> Examples:
        return Examples(samples, self.settings.rows, whole=self.settings.method == "reward")

    def arguments(self, sequences: Any, world: World) -> Any:
        """The arguments of TRL's trainer."""
        own = {**self.parts.extra, **self._asked()}
        if self.parts.tuner in (OrpoTuner, CpoTuner):
            own["max_length"] = self.recipe.sequence_len
        return arguments_for(self.recipe, sequences, world, self.parts.arguments, own)

    def _asked(self) -> dict[str, Any]:
        """What the recipe says of the method, by the names of TRL's arguments."""
        kept = self.recipe.gradient_checkpointing_kwargs
        return {
            **self.settings.arguments,
            **({"gradient_checkpointing_kwargs": kept} if kept else {}),
        }

    def require_figure(self, args: Any, names: Iterable[str]) -> None:
        """See that validations have the figure that is to judge them.

        Raises:
            RecipeError: they have not.
        """
        metric, sets = args.metric_for_best_model, list(names)
        known = [f"eval_{self.figure}", *(f"eval_{name}" for name in self.parts.figures)]
        known += [f"eval_{name}_{self.figure}" for name in sets if len(sets) > 1]
        if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in known:
            raise RecipeError(
                f"metric_for_best_model: validation has no {metric}; it has {', '.join(known)}"
            )

    def validation(self, prepared: Any, tokenizer: Any, world: World) -> dict[str, Batches]:
        """The batches to validate on, by the name of their dataset."""
        size = self.recipe.eval_batch_size or self.recipe.micro_batch_size
        collate: Any = self.parts.collate(pad_token(tokenizer))
        return {
            name: Batches(self._examples(samples), size, collate, world, blank)  # type: ignore[arg-type]  # 2026-11-27: its counts are numbers
            for name, samples in prepared.validation.items()
        }

    def trainer(
        self,
        context: Context,
        model: Any,
        sequences: Any,
        resumed: Saved | None,
        on_first_step: Callable[[], None],
    ) -> FineTuner:
        """TRL's trainer in this engine's loop; see ``make_trainer``."""
        args = self.arguments(sequences, context.world)
        own: dict[str, Any] = {
            "data_collator": self.parts.collate(pad_token(context.tokenizer)),
            "processing_class": context.tokenizer,
        }
        if self.settings.reference and not self.recipe.adapter and not _precomputes(args):
            own["ref_model"] = reference_model(self.recipe, context.tokenizer)
        sets = {name: self._dataset(b.packs) for name, b in context.validation.items()}
        if sets and self.settings.reference:  # they may compute the reference's part beforehand
            own["eval_dataset"] = sets
        elif sets:
            own["eval_dataset"] = next(iter(sets.values()))  # asked for; validation is ours
        return make_trainer(
            context, model, self._dataset(sequences), resumed, on_first_step,
            self.parts.tuner, args, own,
        )  # fmt: skip

    def _dataset(self, examples: Any) -> Any:
        """The rows as TRL wants them."""
        pairs: Callable[[Any], list[Example]] = list
        if self.settings.method == "kto" and self.recipe.precompute_ref_log_probs:
            # what is computed beforehand is that of fixed pairs
            return as_dataset(examples, mismatched, self.recipe.micro_batch_size)
        return as_dataset(examples, pairs)


def _precomputes(args: Any) -> bool:
    return bool(getattr(args, "precompute_ref_log_probs", False))
