"""Which trainer a recipe asks for."""

from __future__ import annotations

from ..recipe.preferences import preference_settings
from ..recipe.recipe import Recipe
from ..trainer.build import SupervisedTask


def task_of(recipe: Recipe) -> SupervisedTask:
    """What a recipe trains, from its prepared rows to the trainer.

    Args:
        recipe: checked.
    """
    settings = preference_settings(recipe)
    if settings is None:
        return SupervisedTask(recipe)
    # TRL is an extra, and takes a second to import
    if settings.rows == "prompts":
        from .completions import CompletionTask

        return CompletionTask(recipe, settings)
    from .build import PreferenceTask

    return PreferenceTask(recipe, settings)
