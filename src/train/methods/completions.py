"""Training on completions that the model writes itself, and that functions judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from trl.trainer.grpo_config import GRPOConfig

from ...errors import RecipeError
from ..checkpoint.resume import Saved
from ..data.preferences.examples import Examples
from ..processes.world import World
from ..recipe.preferences import GenerationSizes, PreferenceSettings, generation_sizes
from ..recipe.recipe import Recipe
from ..report.result import Figure
from ..requirements import has_vllm
from ..rewards.built_in import rewards_of
from ..rewards.judge import judges, require_columns
from ..trainer.arguments import arguments_for
from ..trainer.build import make_trainer
from ..trainer.context import Context
from ..trainer.trainer import FineTuner
from .build import MethodParts, PreferenceTask
from .grpo import GrpoTuner
from .reference import reference_model
from .rows import PromptDataset

_MEASURED = (
    "reward_std", "entropy", "frac_reward_zero_std", "completions/mean_length",
    "completions/min_length", "completions/max_length", "completions/clipped_ratio",
)  # fmt: skip
"""What validations measure beside the reward."""


class CompletionTask(PreferenceTask):
    """GRPO and GDPO.

    Args:
        recipe: checked.
        settings: what it says of the method.

    Raises:
        RecipeError: a reward cannot be imported.
    """

    figure: Figure = "reward"

    def __init__(self, recipe: Recipe, settings: PreferenceSettings) -> None:
        self.rewards = rewards_of(recipe)
        self.judges = judges(self.rewards)
        means = [f"rewards/{judge.__name__}/mean" for judge in self.judges]
        figures = (*_MEASURED, *means, *(["kl"] if settings.reference else []))
        parts = MethodParts(GrpoTuner, GRPOConfig, lambda pad: list, figures)
        super().__init__(recipe, settings, parts)

    def sequences(self, prepared: Any) -> Any:
        """The prompts of an epoch."""
        examples = super().sequences(prepared)
        require_columns(self.rewards, examples.columns)
        return examples

    def arguments(self, sequences: Examples, world: World) -> Any:
        """The arguments of TRL's trainer; its batches are of completions."""
        recipe, sizes = self.recipe, generation_sizes(self.recipe, world.size)
        own = {
            **self._asked(),
            "num_generations": sizes.each,
            "per_device_eval_batch_size": self._validated_at_a_time(sizes, world),
        }
        passes = range(sizes.passes(len(sequences)))
        return arguments_for(recipe, passes, world, GRPOConfig, own, self.figure)

    def _asked(self) -> dict[str, Any]:
        """What the recipe says, without vLLM where that is not installed; the run tells so."""
        asked = super()._asked()
        return {k: v for k, v in asked.items() if has_vllm() or "vllm" not in k}

    def _validated_at_a_time(self, sizes: GenerationSizes, world: World) -> int:
        """Completions that each process generates at a time to validate, those of whole prompts."""
        asked = self.recipe.eval_batch_size or sizes.batch // world.size
        return -(-asked // sizes.each) * sizes.each

    def require_figure(self, args: Any, names: Iterable[str]) -> None:
        """See that validations have the figure that is to judge them.

        Raises:
            RecipeError: they have not.
        """
        if (args.metric_for_best_model or "").removeprefix("eval_") == "loss":
            raise RecipeError(
                f"metric_for_best_model: the loss of {self.settings.method} does not say how good "
                "the model is; use eval_reward"
            )
        super().require_figure(args, names)

    def trainer(
        self,
        context: Context,
        model: Any,
        sequences: Examples,
        resumed: Saved | None,
        on_first_step: Callable[[], None],
    ) -> FineTuner:
        """TRL's trainer in this engine's loop; see ``make_trainer``."""
        args = self.arguments(sequences, context.world)
        own: dict[str, Any] = {
            "processing_class": context.tokenizer,
            "reward_funcs": list(self.judges),
        }
        if self.settings.reference and not self.recipe.adapter:
            own["ref_model"] = reference_model(self.recipe, context.tokenizer)
        return make_trainer(
            context, model, PromptDataset(sequences), resumed, on_first_step, GrpoTuner, args, own
        )
