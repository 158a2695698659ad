"""The selection of a recipe's trainer."""

from __future__ import annotations

from ...errors import RecipeError
from ..recipe.preferences import preference_settings
from ..recipe.recipe import Recipe
from ..requirements import missing_packages
from ..trainer.build import SupervisedTask
from .distillation import DistillationTask


def task_of(recipe: Recipe) -> SupervisedTask:
    """The task of a checked recipe: its rows, arguments and trainer.

    Raises:
        RecipeError: a package is missing that the method needs.
    """
    settings = preference_settings(recipe)
    if recipe.kd_trainer:
        return DistillationTask(recipe)
    if settings is None:
        return SupervisedTask(recipe)
    if missing := missing_packages(recipe):
        raise RecipeError("\n  ".join(missing))
    from .build import PreferenceTask
    from .table import METHODS  # TRL is an extra, and takes a second to import

    method = METHODS[settings.method]
    return (method.task or PreferenceTask)(recipe, settings, method)
