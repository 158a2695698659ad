"""The trainer of a recipe, with what it needs of the model and the data."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from rich.console import Console

from ...errors import RecipeError
from ...memory.budget import gigabytes
from ...memory.meter import Meter
from ..checkpoint.resume import Saved
from ..data.images.features import Featurizer
from ..data.images.reading import featurizer_of
from ..model.image_positions import positions_of_images
from ..model.merge_aware import RoundingStart
from ..model.precision import device_for_training
from ..model.relora import Relora
from ..model.tokenizer import pad_token
from ..processes.mesh import is_sharded
from ..processes.signals import Interrupts
from ..processes.tensor_parallel import left_whole
from ..processes.world import World
from ..processes.wrapping import left_whole as fsdp_whole
from ..processing import Processing
from ..recipe.preferences import rows_of
from ..recipe.recipe import Recipe
from ..recipe.strategy import Strategy
from ..report.progress import ProgressCallback
from ..report.result import Figure
from ..report.throughput import ThroughputMeter, flops_per_token, peak_flops
from .arguments import arguments_for
from .batches import training_batch, training_sequences, typical_context, validation_batches
from .context import Context
from .engine import EngineMixin, FineTuner
from .evaluation import Batches, Loss, require_figure, wants_perplexity
from .objective import Objective
from .optimizer import LayerSampler
from .ready import require_packing_of_images
from .watchdog import watchdogs


class SupervisedTask:
    """Training on rows some of whose tokens have labels."""

    figure: Figure = "loss"
    """The figure that validations judge the model by: ``eval_loss`` or ``eval_reward``."""

    validates_first = True
    """Whether validation needs nothing but the model, so that it can come before the trainer."""

    loss: Loss | None = None
    """The mean loss over the trained tokens of a validation batch; None: the model's."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def sequences(self, prepared: Any) -> Any:
        """The sequences of an epoch, from the prepared rows."""
        return training_sequences(prepared, self.recipe)

    def arguments(self, sequences: Any, world: World) -> Any:
        """The arguments of the trainer."""
        return arguments_for(self.recipe, sequences, world)

    def require_figure(self, args: Any, names: Iterable[str]) -> None:
        """Check that validations of the datasets have the figure that judges them."""
        require_figure(args.metric_for_best_model, names, wants_perplexity(self.recipe))

    def validation(
        self, prepared: Any, tokenizer: Any, world: World, featurizer: Featurizer | None = None
    ) -> dict[str, Batches]:
        """The batches to validate on, by the name of their dataset."""
        return validation_batches(prepared, self.recipe, pad_token(tokenizer), world, featurizer)

    def objective(self) -> Objective:
        """What the trainer trains."""
        return Objective()

    def trainer(
        self,
        context: Context,
        model: Any,
        sequences: Any,
        resumed: Saved | None,
        on_first_step: Callable[[], None],
    ) -> EngineMixin:
        """The trainer, by ``make_trainer``."""
        args = {"data_collator": self.collate(context.tokenizer, context.featurizer)}
        return make_trainer(
            context,
            model,
            sequences,
            resumed,
            on_first_step,
            objective=self.objective(),
            overrides=args,
        )

    def collate(
        self, tokenizer: Any, featurizer: Featurizer | None = None
    ) -> Callable[[Any], dict[str, Any]]:
        """What makes a batch of sequences."""
        return _collate(self.recipe, tokenizer, featurizer)


def make_context(
    task: SupervisedTask,
    model: Any,
    processing: Processing,
    prepared: Any,
    interrupts: Interrupts,
    console: Console,
    carried: Callable[[], dict[str, Any]],
) -> Context:
    """Collect what the trainer needs besides the model and the rows.

    ``carried`` returns what else of the run a checkpoint keeps.
    """
    world, recipe, tokenizer = interrupts.world, task.recipe, processing.tokenizer
    meter = ThroughputMeter(
        flops=flops_per_token(model, typical_context(prepared, recipe)),
        peak=_peak(model, world),
    )
    featurizer = featurizer_for(model, recipe, processing, prepared.has_extra(), world)
    if featurizer is not None:
        _require_whole(recipe.strategy())
        require_packing_of_images(model, recipe)
    sets = task.validation(prepared, tokenizer, world, featurizer)
    return Context(
        recipe, tokenizer, console, interrupts, meter,
        validation=sets, data=prepared.fingerprint, carried=carried, world=world,
        featurizer=featurizer,
        answering=featurizer_of(recipe, processing) if recipe.sample_image else None,
    )  # fmt: skip


def _require_whole(strategy: Strategy) -> None:
    """Raise a RecipeError where processes would share the tokens or layers of a batch's images."""
    sizes = {"context_parallel_size": strategy.context, "tensor_parallel_size": strategy.tensor}
    for key, size in sizes.items():
        if size > 1:
            raise RecipeError(
                f"{key}: not with images, which each process has whole: leave it out, or set "
                "language_model_only: true to stream rows of text"
            )


def featurizer_for(
    model: Any,
    recipe: Recipe,
    processing: Processing,
    has_extra: bool,
    world: World | None = None,
) -> Featurizer | None:
    """What makes the features of images that ``model`` takes; None: no row has any.

    ``has_extra``: whether rows have other data than tokens, which may be a teacher's, or columns.
    """
    others = recipe.kd_trainer or rows_of(recipe) == "prompts"
    featurizer = featurizer_of(recipe, processing) if has_extra and not others else None
    if featurizer is not None:
        featurizer.positions = positions_of_images(model)
        if world is not None and world.several:
            shards = is_sharded(recipe.strategy(), world)
            featurizer.completes = shards or not recipe.freeze_mm_modules
    return featurizer


def make_trainer(
    context: Context,
    model: Any,
    packs: Any,
    resumed: Saved | None = None,
    on_first_step: Callable[[], None] | None = None,
    kind: type[EngineMixin] = FineTuner,
    args: Any = None,
    overrides: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> EngineMixin:
    """Set up the trainer; ``trainer.train()`` runs it.

    ``args`` defaults to the recipe's for ``transformers.Trainer``, ``objective`` to supervised
    training. ``overrides`` adds to, or replaces, the arguments that ``kind`` is called with.
    ``packs`` may be a stream, which has no length. ``on_first_step`` is called when that step is
    complete.

    Raises:
        RecipeError: keys that do not go together, or a hub that cannot be reached.
    """
    recipe = context.recipe
    args = arguments_for(recipe, packs, context.world) if args is None else args
    if context.featurizer is not None:
        args.dataloader_num_workers = _image_workers(recipe, context.world)
    memory = Meter(model.device)
    progress = ProgressCallback(
        context.meter, context.interrupts, context.console, args.max_steps,
        lambda: memory.used() / 2**20, "logging_steps" in recipe.model_fields_set,
    )  # fmt: skip
    samplers: list[Any] = [LayerSampler(recipe, model)] if recipe.lisa_n_layers else []
    samplers += [Relora(model, recipe, context.say)] if recipe.relora else []
    samplers += [RoundingStart(model, recipe)] if recipe.rounds_after() else []
    extra = {
        "model": model,
        "args": args,
        "train_dataset": packs,
        # Trainer requires one; ``evaluate`` is overridden
        "eval_dataset": [None] if args.eval_strategy != "no" else None,
        "data_collator": _collate(recipe, context.tokenizer, context.featurizer),
        "callbacks": [*watchdogs(recipe), *samplers],
        **(overrides or {}),
    }
    try:
        trainer = kind(context, objective or Objective(), progress, resumed, on_first_step, **extra)
    except Exception as error:  # of the hub there are many kinds
        if not (args.push_to_hub or isinstance(error, (ValueError, OSError, ImportError))):
            raise
        raise RecipeError(f"the trainer refuses these settings: {error}") from error
    if trainer.sharding.divides and (experts := left_whole(model)):
        context.say(f"tensor_parallel_size: each process has all of {', '.join(experts)}")
    if trainer.sharding.shards and trainer.sharding.strategy.fsdp and (whole := fsdp_whole(model)):
        size = gigabytes(sum(_bytes(p) for p in whole.values()))
        context.say(
            f"fsdp: {len(whole)} quantized weights are not sharded, because their scales are "
            f"separate: each process has all {size} of them; the rest is sharded"
        )
    return trainer


_MOST_WORKERS = 4


def _image_workers(recipe: Recipe, world: World) -> int:
    """The workers of a loader of images; set by this, ``TOKENIZERS_PARALLELISM`` lets them fork.

    A processor takes a core for a few hundredths of a second for each image, for which a GPU would
    wait. Workers of a stream would read other batches.
    """
    asked = "dataloader_num_workers" in recipe.model_fields_set or recipe.streams()
    workers = recipe.dataloader_num_workers
    if not asked and torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) // world.local_size
        workers = max(0, min(_MOST_WORKERS, cores - 1))
    if workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return workers


def _bytes(parameter: Any) -> int:
    parts = getattr(parameter, "packed", [parameter])
    return sum(part.numel() * part.element_size() for part in parts)


def _collate(
    recipe: Recipe, tokenizer: Any, featurizer: Featurizer | None
) -> Callable[[Any], dict[str, Any]]:
    return functools.partial(
        training_batch, recipe=recipe, pad_id=pad_token(tokenizer), featurizer=featurizer
    )


def _peak(model: Any, world: World) -> float | None:
    """Operations per second of the devices of all processes; None: unknown."""
    peak = peak_flops(device_for_training(), model.dtype)
    return None if peak is None else peak * world.size
