"""Distillation: the divergence from a teacher's most likely tokens, in place of the model's loss.

The logits of an optimized model are lazy, and all that is read of them is computed in tiles: the
log-probabilities of the teacher's tokens, and the cross entropy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import IGNORED
from ..data.teacher import take_teacher, with_teacher
from ..processes.world import World
from ..recipe.recipe import Recipe
from ..trainer.build import SupervisedTask
from ..trainer.evaluation import Batches, validate
from ..trainer.objective import FloatLogits, Objective

_MOST = 64
"""The most columns of log-probabilities that lazy logits give without being computed."""


@dataclass(frozen=True)
class Distillation:
    """The loss of a recipe with ``kd_trainer``.

    Attributes:
        alpha: weight of the divergence.
        ce_alpha: weight of the cross entropy.
        temperature: at which teacher and model are compared.
        beta: 0 for the forward KL divergence, 1 for the reverse one, or something between.
        normalizes: whether the model's probabilities are those among the teacher's tokens.
    """

    alpha: float = 1.0
    ce_alpha: float = 0.0
    temperature: float = 1.0
    beta: float = 0.0
    normalizes: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Distillation:
        """What the keys of a recipe say."""
        return cls(
            1.0 if recipe.kd_alpha is None else recipe.kd_alpha,
            recipe.kd_ce_alpha or 0.0,
            recipe.kd_temperature or 1.0,
            recipe.kd_beta or 0.0,
            bool(recipe.kd_normalize_topk or recipe.kd_top_k_before_softmax),
        )

    def total(self, logits: Tensor, labels: Tensor, ids: Tensor, teacher: Tensor) -> Tensor:
        """The summed loss of all trained tokens.

        Args:
            logits: (B, T, V), in float32.
            labels: (B, T), ``IGNORED`` where nothing is trained.
            ids: the teacher's tokens, each where its label is; (B, T, K).
            teacher: their log-probabilities at temperature 1, up to a constant for each label, and
                -inf where there are fewer than K; (B, T, K).
        """
        trained = labels[:, 1:] != IGNORED
        some = bool(trained.any())
        if not some:  # all processes compute the same operations, some of them for nothing
            trained = torch.zeros_like(trained)
            trained[0, 0], teacher = True, torch.zeros_like(teacher)
        rows, targets = logits[:, :-1][trained], labels[:, 1:][trained].clamp(min=0)
        ids, teacher = ids[:, 1:][trained], teacher[:, 1:][trained]
        student, losses = self._read(rows, targets, ids)
        total = self.alpha * self.temperature**2 * self._divergences(student, teacher).sum()
        if losses is not None:
            total = total + self.ce_alpha * losses.sum()
        return total if some else total * 0.0

    def _read(self, rows: Tensor, targets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (N, K) of the tokens ``ids``, and cross entropy (N,) if it counts."""
        # the logits are (N, V); log-probabilities are at the temperature
        if self.temperature == 1.0 and self.ce_alpha and ids.shape[-1] < _MOST:  # read once
            columns = torch.cat([targets[:, None], ids], dim=-1)
            chosen = F.log_softmax(rows, dim=-1).gather(-1, columns)
            return chosen[:, 1:], -chosen[:, 0]
        losses = F.cross_entropy(rows, targets, reduction="none") if self.ce_alpha else None
        scaled = rows if self.temperature == 1.0 else rows / self.temperature
        return F.log_softmax(scaled, dim=-1).gather(-1, ids), losses

    def _divergences(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence of each row, over the teacher's tokens (N, K)."""
        # student: at the temperature; teacher: at 1, not normalized, -inf where there is no token
        missing, q = ~torch.isfinite(teacher), student
        if self.normalizes:
            q = q - q.masked_fill(missing, -math.inf).logsumexp(-1, keepdim=True)
        p = F.log_softmax(teacher / self.temperature, dim=-1).masked_fill(missing, 0.0)
        if self.beta == 0.0:
            parts = p.exp() * (p - q)
        elif self.beta == 1.0:
            parts = q.exp() * (q - p)
        else:
            of_p, of_q = self.beta, 1.0 - self.beta
            mean = torch.logaddexp(p + math.log(of_p), q + math.log(of_q))
            parts = of_p * p.exp() * (p - mean) + of_q * q.exp() * (q - mean)
        return parts.masked_fill(missing, 0.0).sum(-1)


class DistillationObjective(Objective):
    """Supervised training whose loss, in training and validation, is that of distillation."""

    not_plain = "the loss is that of distillation"

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation

    def attach(self, trainer: Any) -> None:
        """Bind the trainer, once it is set up."""
        super().attach(trainer)
        # whether one is set decides how Trainer counts and scales; each batch sets its own
        trainer.compute_loss_func = self._no_loss

    def _no_loss(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a batch has come without its teacher")

    def loss(
        self, compute: Callable[..., Any], model: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's, with the loss of distillation."""
        inputs = dict(batch)
        ids, teacher = take_teacher(inputs)

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            total = self.distillation.total(outputs["logits"], labels, ids, teacher)
            mean: Tensor = total / num_items_in_batch
            return mean

        self.trainer.compute_loss_func = loss
        try:
            return compute(FloatLogits(model), inputs, *args, **kwargs)
        finally:
            self.trainer.compute_loss_func = self._no_loss

    def figures(self) -> dict[str, float]:
        """The loss per trained token of the validation rows; a collective."""
        context, loss = self.trainer.context, MeanLoss(self.distillation)
        return validate(self.trainer.model, context.validation, context.say, context.world, loss)


class MeanLoss:
    """The loss per trained token of a batch."""

    def __init__(self, distillation: Distillation) -> None:
        self.distillation = distillation

    def __call__(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The loss of ``model``."""
        inputs = dict(batch)
        ids, teacher = take_teacher(inputs)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        number = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        mean: Tensor = self.distillation.total(logits, labels, ids, teacher) / number
        return mean


class DistillationTask(SupervisedTask):
    """Training on rows with a teacher's log-probabilities."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.loss = MeanLoss(Distillation.of(recipe))

    def objective(self) -> Objective:
        """What the trainer trains."""
        return DistillationObjective(Distillation.of(self.recipe))

    def validation(
        self, prepared: Any, tokenizer: Any, world: World, featurizer: Any = None
    ) -> dict[str, Batches]:
        """The batches to validate on, by the name of their dataset."""
        sets = super().validation(prepared, tokenizer, world)
        for batches in sets.values():
            batches.collate = functools.partial(_with_teacher, batches.collate)
        return sets

    def collate(self, tokenizer: Any, featurizer: Any = None) -> Callable[[Any], dict[str, Any]]:
        """What makes a batch of sequences, with the teacher's part."""
        return functools.partial(_with_teacher, super().collate(tokenizer))


def _with_teacher(collate: Callable[[Any], dict[str, Any]], packs: Any) -> dict[str, Any]:
    return with_teacher(collate(packs), packs)
