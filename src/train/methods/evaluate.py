"""The figures of a trained model on rows of preferences, as validation during training has them."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..processes.signals import Interrupts
from ..recipe.recipe import Recipe
from ..trainer.context import Context
from .reference import restore_reference
from .task import task_of
from .tuner import MethodTuner


def measured(
    model: Any, recipe: Recipe, tokenizer: Any, prepared: Any, console: Console
) -> dict[str, dict[str, float]]:
    """What validation measures, by the name of the dataset.

    Args:
        model: trained by the recipe.
        recipe: with a preference method.
        tokenizer: of the run.
        prepared: the rows of the recipe; those of ``validation`` are measured.
        console: where to print.

    Returns:
        The figures of each dataset, ``loss`` among them.
    """
    recipe = recipe.model_copy(update={"hub_model_id": None})  # nothing is pushed
    task, interrupts = task_of(recipe), Interrupts()
    sets = task.validation(prepared, tokenizer, interrupts.world)
    context = Context(recipe, tokenizer, console, interrupts, validation=sets)
    trainer = task.trainer(context, model, task.sequences(prepared), None, lambda: None)
    assert isinstance(trainer, MethodTuner)
    restore_reference(trainer.model, recipe)
    found = {}
    for name in sets:
        context.validation = {name: sets[name]}
        figures = trainer.figures()
        found[name] = {key.removeprefix("eval_"): value for key, value in figures.items()}
    return found
