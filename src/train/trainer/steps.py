"""How many optimizer steps a recipe makes of its data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import RecipeError
from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class Steps:
    """How many optimizer steps there are.

    Attributes:
        total: of the whole run.
        per_epoch: of one pass over the data; None for a stream, which has no end.
    """

    total: int
    per_epoch: int | None

    def every(self, interval: float, key: str) -> int:
        """An interval in whole steps.

        Args:
            interval: a number of steps; below 1, a share of all steps.
            key: the recipe's, for the message.

        Raises:
            RecipeError: it is a number above 1 that is not whole.
        """
        if interval < 1:
            return max(1, math.ceil(self.total * interval))
        if interval != int(interval):
            raise RecipeError(
                f"{key}: {interval:g} is neither a number of steps nor a fraction below 1"
            )
        return int(interval)

    def times_per_epoch(self, times: int, key: str) -> int:
        """The interval, in steps, of what happens so many times in an epoch.

        Raises:
            RecipeError: the data is a stream, which has no epochs.
        """
        if self.per_epoch is None:
            raise RecipeError(f"{key}: streamed data has no epochs; give a number of steps instead")
        return max(1, math.ceil(self.per_epoch / times))


def steps(recipe: Recipe, sequences: int | None, processes: int = 1) -> Steps:
    """Count the optimizer steps that the recipe makes of the data.

    Args:
        recipe: the recipe.
        sequences: how many there are in an epoch; None for a stream.
        processes: each of them makes the recipe's forward passes in a step, with its own batches.

    Raises:
        RecipeError: a stream without ``max_steps``, or too few sequences for one batch.
    """
    if sequences is None:
        if recipe.max_steps is None:
            raise RecipeError("max_steps: streamed data has no end, so this must be set")
        return Steps(recipe.max_steps, None)
    rounded = math.floor if recipe.dataloader_drop_last else math.ceil
    batches = rounded(sequences / recipe.micro_batch_size)
    if not batches:
        raise RecipeError(
            f"micro_batch_size: {sequences} sequences do not fill a batch of "
            f"{recipe.micro_batch_size}, and dataloader_drop_last drops incomplete batches"
        )
    each = math.ceil(batches / processes)
    per_epoch = math.ceil(each / recipe.accumulation())
    total = recipe.max_steps or math.ceil(per_epoch * recipe.num_epochs)
    return Steps(total, per_epoch)
