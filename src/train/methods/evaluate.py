"""The figures of a trained model on preference rows, as validation during training has them."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..processes.signals import Interrupts
from ..processing import Processing
from ..recipe.keys.preferences import TrlKeys
from ..recipe.preferences import generation_sizes, rows_of
from ..recipe.recipe import Recipe
from ..trainer.build import featurizer_for
from ..trainer.context import Context
from .reference import restore_reference
from .task import task_of


def measured(
    model: Any, recipe: Recipe, processing: Processing, prepared: Any, console: Console
) -> dict[str, dict[str, float]]:
    """What validation measures, ``loss`` included, by the name of the dataset.

    The rows are those of ``prepared.validation``.
    """
    recipe = _alone(recipe)
    task, interrupts = task_of(recipe), Interrupts()
    tokenizer = processing.tokenizer
    featurizer = featurizer_for(model, recipe, processing, prepared.has_extra())
    sets = task.validation(prepared, tokenizer, interrupts.world, featurizer)
    context = Context(
        recipe, tokenizer, console, interrupts, validation=sets, featurizer=featurizer
    )
    trainer = task.trainer(context, model, task.sequences(prepared), None, lambda: None)
    restore_reference(trainer.model, recipe)
    by_dataset = {}
    for name in sets:
        context.validation = {name: sets[name]}
        figures = trainer.figures()
        by_dataset[name] = {key.removeprefix("eval_"): value for key, value in figures.items()}
    return by_dataset


def _alone(recipe: Recipe) -> Recipe:
    """The recipe of a trainer that only validates."""
    # nothing is pushed, tracked, judged or precomputed, and any number of rows will do
    switches = ("wandb", "mlflow", "comet", "trackio", "swanlab", "tensorboard")
    update: dict[str, Any] = {
        **dict.fromkeys((f"use_{name}" for name in switches), False),
        **dict.fromkeys(
            ("hub_model_id", "precompute_ref_log_probs", "early_stopping_patience", "eval_steps",
             "evals_per_epoch", "eval_strategy", "save_strategy", "metric_for_best_model")
        ),
        "load_best_model_at_end": False, "lr_scheduler": "constant", "max_steps": 1,
    }  # fmt: skip
    if rows_of(recipe) == "prompts":
        trl = recipe.trl or TrlKeys()
        update |= {
            "micro_batch_size": generation_sizes(recipe, 1).each,
            "gradient_accumulation_steps": 1,
            "trl": trl.model_copy(update={"generation_batch_size": None}),
        }
    return recipe.model_copy(update=update)
