"""transformers' Trainer with a loss that weighs tokens, in training and validation."""

from __future__ import annotations

from typing import Any

from ...errors import RecipeError
from ..model.token_losses import TokenLoss, weigher
from ..model.tokenizer import pad_token
from ..recipe.strategy import strategy_of
from .batches import training_batch
from .context import Context
from .evaluation import validate, with_perplexity
from .parallel import ParallelTrainer


class WeighingTrainer(ParallelTrainer):
    """``Trainer`` whose training loss is DFT's or EAFT's where the recipe asks for it.

    Validation has the plain cross entropy.

    Args:
        context: the recipe, and what goes with it.
        kwargs: Trainer's own.

    Raises:
        RecipeError: the model's code does not take the number of tokens that a step trains.
    """

    def __init__(self, context: Context, **kwargs: Any) -> None:
        self.context = context
        super().__init__(context.world, strategy_of(context.recipe), **kwargs)
        weigh = weigher(context.recipe)
        self._token_loss = None if weigh is None else TokenLoss(context.recipe, weigh)
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

    def figures(self) -> dict[str, float]:
        """The loss per trained token of the validation rows: ``eval_loss``, and what goes with it.

        With several processes, a collective.
        """
        context = self.context
        found = validate(self.model, context.validation, context.say, self.world)
        return with_perplexity(found, context.recipe)

    def probe(self) -> dict[str, Any]:
        """A batch of one sequence, to compare models on."""
        rows: Any = self.train_dataset
        recipe = self.context.recipe
        return training_batch([next(iter(rows))], recipe, pad_token(self.context.tokenizer))
