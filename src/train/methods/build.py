"""The trainer of a preference method: arguments, batches, figures, the reference model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import RecipeError
from ..checkpoint.resume import Saved
from ..data.images.features import Featurizer
from ..data.preferences.examples import Example, Examples
from ..model.tokenizer import pad_token
from ..processes.world import World
from ..recipe.preferences import PreferenceSettings
from ..recipe.recipe import Recipe
from ..trainer.arguments import arguments_for
from ..trainer.build import SupervisedTask, make_trainer
from ..trainer.context import Context
from ..trainer.engine import EngineMixin
from ..trainer.evaluation import Batches
from .objective import Preferences
from .reference import reference_model
from .rows import as_dataset, blank


@dataclass(frozen=True)
class Method:
    """The components of a training method.

    Attributes:
        collate: makes batches, given the padding token and what makes features of images.
        figures: what validations measure besides the figure that judges them.
        fixed: arguments that are not keys of the method.
        whole_texts: whether a row's texts are prompt and answer in one.
        before_precomputing: changes fixed batches of rows before the reference's part of the loss
            is computed for them.
    """

    trainer: type[EngineMixin]
    arguments: type[Any]
    collate: Callable[[int, Featurizer | None], Any]
    figures: tuple[str, ...] = ()
    fixed: Callable[[Recipe], Mapping[str, Any]] = lambda recipe: {}
    objective: Callable[[], Preferences] = Preferences
    task: Callable[[Recipe, PreferenceSettings, Method], PreferenceTask] | None = None
    whole_texts: bool = False
    before_precomputing: Callable[[Sequence[Example]], list[Example]] | None = None


class PreferenceTask(SupervisedTask):
    """Training on preferences or rewards, by a trainer of TRL."""

    validates_first = False

    def __init__(self, recipe: Recipe, settings: PreferenceSettings, method: Method) -> None:
        super().__init__(recipe)
        self.settings, self.method = settings, method

    def objective(self) -> Preferences:
        """What the trainer trains."""
        return self.method.objective()

    def sequences(self, prepared: Any) -> Any:
        """The rows of an epoch, by TRL's names for their parts."""
        return self._examples(prepared.train)

    def _examples(self, samples: Any) -> Examples:
        pictures = samples.has_extra() and not self.settings.no_images
        return Examples(samples, self.settings.rows, self.method.whole_texts, pictures)

    def arguments(self, sequences: Any, world: World) -> Any:
        """The arguments of TRL's trainer."""
        kwargs = {**self.method.fixed(self.recipe), **self._requested()}
        return arguments_for(self.recipe, sequences, world, self.method.arguments, kwargs)

    def _requested(self) -> dict[str, Any]:
        """What the recipe says of the method, by the names of TRL's arguments."""
        checkpointing = self.recipe.gradient_checkpointing_kwargs
        return {
            **self.settings.arguments,
            **({"gradient_checkpointing_kwargs": checkpointing} if checkpointing else {}),
        }

    @property
    def figures(self) -> tuple[str, ...]:
        """What validations measure besides the figure that judges them."""
        return self.method.figures

    def require_figure(self, args: Any, names: Iterable[str]) -> None:
        """Raise RecipeError unless validations have the figure that judges them."""
        metric, sets = args.metric_for_best_model, list(names)
        known = [f"eval_{self.figure}", *(f"eval_{name}" for name in self.figures)]
        known += [f"eval_{name}_{self.figure}" for name in sets if len(sets) > 1]
        if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in known:
            raise RecipeError(
                f"metric_for_best_model: validation has no {metric}; it has {', '.join(known)}"
            )

    def validation(
        self, prepared: Any, tokenizer: Any, world: World, featurizer: Featurizer | None = None
    ) -> dict[str, Batches]:
        """The batches to validate on, by the name of their dataset.

        Raises a RecipeError if processes need an image in each batch, and a row has none.
        """
        if featurizer is not None and featurizer.completes:
            self._require_images(prepared)
        size = self.recipe.eval_batch_size or self.recipe.micro_batch_size
        collate: Any = self.method.collate(pad_token(tokenizer), featurizer)
        return {
            name: Batches(self._examples(samples), size, collate, world, blank)  # type: ignore[arg-type]  # 2026-11-27: its counts are numbers
            for name, samples in prepared.validation.items()
        }

    def _require_images(self, prepared: Any) -> None:
        """A batch of pairs gets no row with a blank image: its process would leave out a call."""
        if any(s.lacks_extra() for s in (prepared.train, *prepared.validation.values())):
            raise RecipeError(
                f"rl: {self.settings.method}: some rows have no image, and processes that share "
                "what reads images need one in each: leave such rows out, or train in one process"
            )

    def trainer(
        self,
        context: Context,
        model: Any,
        sequences: Any,
        resumed: Saved | None,
        on_first_step: Callable[[], None],
    ) -> EngineMixin:
        """TRL's trainer in this package's loop, by ``make_trainer``."""
        args = self.arguments(sequences, context.world)
        kwargs = {"processing_class": context.tokenizer, **self._judging(context)}
        precomputes = getattr(args, "precompute_ref_log_probs", False)
        if self.settings.reference and not self.recipe.adapter and not precomputes:
            kwargs["ref_model"] = reference_model(self.recipe, context.tokenizer)
        return make_trainer(
            context, model, self._dataset(sequences), resumed, on_first_step,
            self.method.trainer, args, kwargs, self.objective(),
        )  # fmt: skip

    def _judging(self, context: Context) -> dict[str, Any]:
        """The collator of TRL's trainer, and its rows for validation."""
        pad = pad_token(context.tokenizer)
        extra: dict[str, Any] = {"data_collator": self.method.collate(pad, context.featurizer)}
        sets = {name: self._dataset(b.packs) for name, b in context.validation.items()}
        if sets and self.settings.reference:  # they may compute the reference's part beforehand
            extra["eval_dataset"] = sets
        elif sets:
            extra["eval_dataset"] = next(iter(sets.values()))  # required; validation is ours
        return extra

    def _dataset(self, examples: Any) -> Any:
        change = self.method.before_precomputing
        if change is not None and self.recipe.precompute_ref_log_probs:
            return as_dataset(examples, change, self.recipe.micro_batch_size)
        return as_dataset(examples)
