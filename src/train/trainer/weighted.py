"""transformers' Trainer with a loss that weighs tokens."""

from __future__ import annotations

from typing import Any

from ...errors import RecipeError
from ..model.token_losses import TokenLoss, weigher
from ..processes.world import World
from ..recipe.recipe import Recipe
from ..recipe.strategy import strategy_of
from .parallel import ParallelTrainer


class WeighingTrainer(ParallelTrainer):
    """``Trainer`` whose training loss is DFT's or EAFT's where the recipe asks for it.

    Validation has the plain cross entropy.

    Args:
        recipe: the recipe.
        world: the processes of the run.
        kwargs: Trainer's own.

    Raises:
        RecipeError: the model's code does not take the number of tokens that a step trains.
    """

    def __init__(self, recipe: Recipe, world: World, **kwargs: Any) -> None:
        super().__init__(world, strategy_of(recipe), **kwargs)
        weigh = weigher(recipe)
        self._token_loss = None if weigh is None else TokenLoss(recipe, weigh)
        if weigh is not None and not self.model_accepts_loss_kwargs:
            raise RecipeError(
                "use_dft, use_eaft: the code of this model computes a loss of its own for each "
                "batch: leave the key out"
            )

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Trainer's own, with the recipe's loss in training."""
        own: Any = super().compute_loss
        if self._token_loss is None or not model.training:
            return own(model, inputs, *args, **kwargs)
        with self._token_loss.on(model):
            return own(model, inputs, *args, **kwargs)
