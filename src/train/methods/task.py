"""The selection of a recipe's trainer."""

from __future__ import annotations

from ..recipe.preferences import preference_settings
from ..recipe.recipe import Recipe
from ..trainer.build import SupervisedTask
from .distillation import DistillationTask


def task_of(recipe: Recipe) -> SupervisedTask:
    """The task of a checked recipe: its rows, arguments and trainer."""
    settings = preference_settings(recipe)
    if recipe.kd_trainer:
        return DistillationTask(recipe)
    if settings is None:
        return SupervisedTask(recipe)
    from .build import PreferenceTask
    from .table import METHODS  # TRL is an extra, and takes a second to import

    method = METHODS[settings.method]
    return (method.task or PreferenceTask)(recipe, settings, method)
