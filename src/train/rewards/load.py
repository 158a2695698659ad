"""The rewards of a recipe."""

from __future__ import annotations

from typing import Any, cast

from ..own_functions import load_function
from ..recipe.keys.row_types import is_function
from ..recipe.preferences import preference_settings
from ..recipe.recipe import Recipe
from .built_in import Reward, built_in


def rewards_of(recipe: Recipe) -> list[Reward]:
    """What judges the completions of a recipe, in its order.

    Args:
        recipe: checked, with absolute paths.

    Raises:
        RecipeError: the recipe has no rewards, a function cannot be imported, or the caller does
            not allow it.
    """
    settings = preference_settings(recipe)
    names = () if settings is None else settings.reward_functions
    found: list[Any] = []
    for i, name in enumerate(names):
        if is_function(name):
            found.append(load_function(name, f"trl.reward_funcs.{i}", recipe.consent))
        else:
            found.append(built_in(name))
    return cast("list[Reward]", found)
