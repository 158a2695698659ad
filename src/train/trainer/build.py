"""From a recipe, a model and its data to the trainer that runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console

from ...errors import RecipeError
from ...memory.meter import Meter
from ..checkpoint.resume import Saved
from ..model.precision import device_for_training
from ..model.tokenizer import pad_token
from ..processes.signals import Interrupts
from ..processes.tensor_parallel import left_whole
from ..processes.world import World
from ..recipe.recipe import Recipe
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
from .watchdog import watchdogs


class SupervisedTask:
    """Training on rows some of whose tokens have labels.

    Args:
        recipe: checked.
    """

    figure: Figure = "loss"
    """What validations judge the model by: ``eval_loss``, or ``eval_reward``."""

    validates_first = True
    """Whether validation needs nothing but the model, so that it can come before the trainer."""

    loss: Loss | None = None
    """The mean over the trained tokens of a batch that is validated; None: the model's own."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def sequences(self, prepared: Any) -> Any:
        """What an epoch is made of, from the prepared rows."""
        return training_sequences(prepared, self.recipe)

    def arguments(self, sequences: Any, world: World) -> Any:
        """The arguments of the trainer."""
        return arguments_for(self.recipe, sequences, world)

    def require_figure(self, args: Any, names: Iterable[str]) -> None:
        """See that validations of the datasets have the figure that is to judge them."""
        require_figure(args.metric_for_best_model, names, wants_perplexity(self.recipe))

    def validation(self, prepared: Any, tokenizer: Any, world: World) -> dict[str, Batches]:
        """The batches to validate on, by the name of their dataset."""
        return validation_batches(prepared, self.recipe, pad_token(tokenizer), world)

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
        """The trainer; see ``make_trainer``."""
        own = {"data_collator": self.collate(context.tokenizer)}
        return make_trainer(
            context, model, sequences, resumed, on_first_step, objective=self.objective(), own=own
        )

    def collate(self, tokenizer: Any) -> Callable[[Any], dict[str, Any]]:
        """What makes a batch of sequences."""
        return _collate(self.recipe, tokenizer)


def make_context(
    task: SupervisedTask,
    model: Any,
    tokenizer: Any,
    prepared: Any,
    interrupts: Interrupts,
    console: Console,
    carried: Callable[[], dict[str, Any]],
) -> Context:
    """Bring together what the trainer needs besides the model and the rows.

    Args:
        task: what is done with the rows.
        model: which is trained.
        tokenizer: of the run.
        prepared: the rows, as ``prepare`` has made them.
        interrupts: of the run, with its processes.
        console: where to print.
        carried: says what else of the run a checkpoint has to keep.
    """
    world, recipe = interrupts.world, task.recipe
    meter = ThroughputMeter(
        flops=flops_per_token(model, typical_context(prepared, recipe)),
        peak=_peak(model, world),
    )
    sets = task.validation(prepared, tokenizer, world)
    return Context(
        recipe, tokenizer, console, interrupts, meter,
        validation=sets, data=prepared.fingerprint, carried=carried, world=world,
    )  # fmt: skip


def make_trainer(
    context: Context,
    model: Any,
    packs: Any,
    resumed: Saved | None = None,
    on_first_step: Callable[[], None] | None = None,
    kind: type[EngineMixin] = FineTuner,
    args: Any = None,
    own: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
) -> EngineMixin:
    """Set up the trainer; ``trainer.train()`` runs it.

    Args:
        context: the recipe and what goes with it.
        model: with its adapters.
        packs: the sequences to train on; a stream of them has no length.
        resumed: what the checkpoint kept that the run resumes from.
        on_first_step: called when the first step is complete.
        kind: of trainer.
        args: its arguments; None: those of the recipe for ``transformers.Trainer``.
        own: what else it is made with, or with something else.
        objective: the loss and the figures; None: those of supervised training.

    Raises:
        RecipeError: keys that do not go together, or a hub that cannot be reached.
    """
    recipe = context.recipe
    args = arguments_for(recipe, packs, context.world) if args is None else args
    memory = Meter(model.device)
    progress = ProgressCallback(
        context.meter, context.interrupts, context.console, args.max_steps,
        lambda: memory.used() / 2**20,
    )  # fmt: skip
    samplers = [LayerSampler(recipe, model)] if recipe.lisa_n_layers else []
    given = {
        "model": model,
        "args": args,
        "train_dataset": packs,
        # asked for; evaluate() is ours
        "eval_dataset": [None] if args.eval_strategy != "no" else None,
        "data_collator": _collate(recipe, context.tokenizer),
        "callbacks": [*watchdogs(recipe), *samplers],
        **(own or {}),
    }
    try:
        trainer = kind(context, objective or Objective(), progress, resumed, on_first_step, **given)
    except Exception as error:  # of the hub there are many kinds
        if not (args.push_to_hub or isinstance(error, (ValueError, OSError, ImportError))):
            raise
        raise RecipeError(f"the trainer refuses these settings: {error}") from error
    if trainer.sharding.divides and (experts := left_whole(model)):
        context.say(f"tensor_parallel_size: each process has all of {', '.join(experts)}")
    return trainer


def _collate(recipe: Recipe, tokenizer: Any) -> Callable[[Any], dict[str, Any]]:
    return functools.partial(training_batch, recipe=recipe, pad_id=pad_token(tokenizer))


def _peak(model: Any, world: World) -> float | None:
    """Operations per second that the devices of all processes can do; None: not known."""
    peak = peak_flops(device_for_training(), model.dtype)
    return None if peak is None else peak * world.size
