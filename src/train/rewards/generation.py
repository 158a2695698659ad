"""How many completions are generated at a time."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RecipeError
from ..recipe.keys.preferences.trl import TrlKeys
from ..recipe.recipe import Recipe

_COMPLETIONS = 8
"""Completions of each prompt, where the recipe does not say."""


@dataclass(frozen=True)
class GenerationSizes:
    """How many completions are generated at a time.

    Attributes:
        each: completions of each prompt.
        batch: completions at a time, of all processes together.
        iterations: how often they are trained on.
    """

    each: int
    batch: int
    iterations: int

    @property
    def prompts(self) -> int:
        """Prompts at a time."""
        return self.batch // self.each

    def passes(self, rows: int) -> int:
        """Completions that are trained on in an epoch; prompts that fill no batch are left out.

        Raises:
            RecipeError: all of them are.
        """
        if rows < self.prompts:
            raise RecipeError(
                f"micro_batch_size: completions of {self.prompts} prompts are generated at a time "
                f"({self.batch} completions, {self.each} of each prompt), and there are only "
                f"{rows} rows; lower micro_batch_size, gradient_accumulation_steps or "
                "trl.generation_batch_size, or add rows"
            )
        return rows // self.prompts * self.batch * self.iterations


def generation_sizes(recipe: Recipe, processes: int) -> GenerationSizes:
    """How many completions a recipe has generated at a time.

    Args:
        recipe: of a method that generates.
        processes: how many train it.

    Raises:
        RecipeError: they are no whole groups of completions of one prompt.
    """
    trl = recipe.trl or TrlKeys()
    each = trl.num_generations or _COMPLETIONS
    micro, passes = recipe.micro_batch_size, recipe.accumulation()
    asked = trl.generation_batch_size
    batch = asked or micro * passes * processes
    if batch % (micro * processes):
        raise RecipeError(
            f"trl.generation_batch_size: must be a multiple of micro_batch_size ({micro}) times "
            f"the processes ({processes}), and {batch} is not"
        )
    if batch % each:
        said = "" if trl.num_generations else ", its default"
        product = (
            "trl.generation_batch_size"
            if asked
            else f"micro_batch_size ({micro}) x gradient_accumulation_steps ({passes}) x "
            f"processes ({processes})"
        )
        raise RecipeError(
            f"trl.num_generations: {batch} completions are generated at a time, which is {product}"
            f", and that must be a multiple of trl.num_generations ({each}{said}); change one of "
            "them"
        )
    return GenerationSizes(each, batch, trl.num_iterations or 1)
