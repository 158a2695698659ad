"""From a recipe, a model and its data to the trainer that runs them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from rich.console import Console

from ...errors import RecipeError
from ...memory.meter import Meter
from ..checkpoint.resume import Saved
from ..model.tokenizer import pad_token
from ..processes.signals import Interrupts
from ..processes.tensor_parallel import left_whole
from ..recipe.recipe import Recipe
from ..report.throughput import ThroughputMeter, flops_per_token
from .arguments import arguments_for
from .batches import training_batch, typical_context, validation_batches
from .callbacks import LayerSampler, watchdogs
from .context import Context
from .parallel import peak_of
from .progress import ProgressCallback
from .trainer import FineTuner


def make_context(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    prepared: Any,
    interrupts: Interrupts,
    console: Console,
    carried: Callable[[], dict[str, Any]],
) -> Context:
    """Bring together what the trainer needs besides the model and the rows.

    Args:
        recipe: checked.
        model: which is trained.
        tokenizer: of the run.
        prepared: the rows, as ``prepare`` has made them.
        interrupts: of the run, with its processes.
        console: where to print.
        carried: says what else of the run a checkpoint has to keep.
    """
    world = interrupts.world
    meter = ThroughputMeter(
        flops=flops_per_token(model, typical_context(prepared, recipe)),
        peak=peak_of(model, world),
    )
    sets = validation_batches(prepared, recipe, pad_token(tokenizer), world)
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
    kind: type[FineTuner] = FineTuner,
) -> FineTuner:
    """Set up the trainer; ``trainer.train()`` runs it.

    Args:
        context: the recipe and what goes with it.
        model: with its adapters.
        packs: the sequences to train on; a stream of them has no length.
        resumed: what the checkpoint kept that the run resumes from.
        on_first_step: called when the first step is complete.
        kind: of trainer.

    Raises:
        RecipeError: keys that do not go together, or a hub that cannot be reached.
    """
    recipe = context.recipe
    args = arguments_for(recipe, packs, context.world)
    pad_id = pad_token(context.tokenizer)
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
        "data_collator": functools.partial(training_batch, recipe=recipe, pad_id=pad_id),
        "callbacks": [*watchdogs(recipe), *samplers],
    }
    try:
        trainer = kind(context, progress, resumed, on_first_step, **given)
    except Exception as error:  # of the hub there are many kinds
        if not (args.push_to_hub or isinstance(error, (ValueError, OSError, ImportError))):
            raise
        raise RecipeError(f"the trainer refuses these settings: {error}") from error
    if trainer.divides and (experts := left_whole(model)):
        context.say(f"tensor_parallel_size: each process has all of {', '.join(experts)}")
    return trainer
