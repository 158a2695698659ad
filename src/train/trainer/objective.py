"""What a trainer trains: the loss of a batch, and what validation measures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..checkpoint.resume import Saved
from ..data.order import order_of
from ..data.ranks import Fillable
from ..model.token_losses import TokenLoss, weigher
from ..model.tokenizer import pad_token
from .batches import training_batch
from .evaluation import validate, with_perplexity


class Objective:
    """The objective of supervised training: the loss of Trainer, or of DFT or EAFT.

    Subclasses override what differs. ``EngineMixin`` calls the methods in the order below.

    Attributes:
        weighs_tokens: whether the loss of a step is the mean over its trained tokens, whatever
            their batches.
    """

    trainer: Any
    weighs_tokens = True
    _token_loss: TokenLoss | None = None

    # --- the trainer and its rows ----------------------------------------------------------------

    def dtypes_left(self, model: Any) -> AbstractContextManager[None]:
        """A context around the set-up of the trainer, which may change the dtypes of weights."""
        return contextlib.nullcontext()

    def attach(self, trainer: Any) -> None:
        """Bind the trainer, once it is set up.

        Raises:
            RecipeError: the model's code does not take the number of tokens that a step trains.
        """
        self.trainer = trainer
        recipe = trainer.context.recipe
        weigh = weigher(recipe)
        self._token_loss = None if weigh is None else TokenLoss(recipe, weigh)
        if weigh is not None and not trainer.model_accepts_loss_kwargs:
            raise RecipeError(
                "use_dft, use_eaft: the code of this model computes a loss of its own for each "
                "batch: leave the key out"
            )

    @property
    def not_plain(self) -> str:
        """Why the loss is not the cross entropy of the labels; empty: it is."""
        if self._token_loss is not None:
            return "the loss weighs tokens differently"
        return "labels are smoothed" if self.trainer.label_smoother is not None else ""

    def order(self, rows: Any) -> Any:
        """The sampler of the rows to train on."""
        return order_of(rows, self.trainer.context.recipe, self.trainer._train_batch_size)

    def fillable(self, rows: Any) -> Any:
        """The rows to train on, where those with an inverted index train nothing."""
        return Fillable(rows)

    @property
    def rows_per_batch(self) -> int:
        """Rows in a batch of the loader."""
        return int(self.trainer._train_batch_size)

    def load_reference(self) -> None:
        """Restore a reference model that moves, before anything is measured."""

    def restore(self, resumed: Saved | None) -> None:
        """Restore what a checkpoint kept by ``carried``, before the first step."""

    # --- a step ----------------------------------------------------------------------------------

    def weigh_batches(self, batches: Any) -> None:
        """Look at the batches of a step, of this process, before the first of them is trained."""

    def begin_batch(self, batch: Any) -> None:
        """Look at a batch before it is trained."""

    def measured_once(self) -> AbstractContextManager[None]:
        """Around each try to train a batch: a failed one may leave nothing measured."""
        return contextlib.nullcontext()

    def loss(
        self, compute: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The loss of a batch, by the trainer's ``compute``; validation has plain cross entropy."""
        if self._token_loss is None or not model.training:
            return compute(model, batch, *args, **kwargs)
        with self._token_loss.on(model):
            return compute(model, batch, *args, **kwargs)

    def end_step(self) -> None:
        """Record what a checkpoint needs if the next step does not finish."""

    # --- validation ------------------------------------------------------------------------------

    def evaluating(self) -> AbstractContextManager[None]:
        """Around a validation and what is logged of it."""
        return contextlib.nullcontext()

    def figures(self) -> dict[str, float]:
        """``eval_loss``, the loss per trained token of the validation rows, and further figures.

        A collective.
        """
        context = self.trainer.context
        figures = validate(self.trainer.model, context.validation, context.say, context.world)
        return with_perplexity(figures, context.recipe)

    def require_judged(self, figures: Mapping[str, float]) -> None:
        """Raise RecipeError unless a validation had the figure that judges it."""

    def probe(self) -> dict[str, Any]:
        """A batch of one row, to compare models on."""
        context, rows = self.trainer.context, self.trainer.train_dataset
        pad = pad_token(context.tokenizer)
        return training_batch([next(iter(rows))], context.recipe, pad, context.featurizer)

    @property
    def completions(self) -> list[dict[str, Any]]:
        """Texts to look at, where the model generates."""
        return []

    # --- checkpoints -----------------------------------------------------------------------------

    def carried(self) -> dict[str, Any]:
        """What a checkpoint keeps of the last whole step, by names."""
        return {}

    def writing(self, folder: Path) -> AbstractContextManager[None]:
        """A context around writing a checkpoint, to which files may be added."""
        return contextlib.nullcontext()


class FloatLogits:
    """A model whose logits are float32, as accelerate's mixed precision returns them.

    The sum of an answer's log-probabilities is of the order of its length: in bfloat16 it would be
    rounded by more than two answers differ.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, with their logits cast."""
        outputs = self.model(*args, **kwargs)
        outputs.logits = outputs.logits.float()
        return outputs
