"""The loss on rows that are not trained."""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import RecipeError
from ..data import IGNORED
from ..processes.world import World
from ..recipe.recipe import Recipe

Batch = dict[str, Tensor]
Loss = Callable[[Any, Batch], Tensor]
"""The loss of a model for a batch: the mean over its trained tokens."""


def _without_labels(batch: Batch) -> None:
    batch["labels"].fill_(IGNORED)


class Batches:
    """The batches of a dataset, in order, each made on demand.

    Each process has a share of them, and all have the same number: where the last ones do not go
    round, a process repeats one without its labels.

    Args:
        size: sequences in a batch.
        blank: makes a batch count for nothing.
    """

    def __init__(
        self,
        packs: Sequence[Any],
        size: int,
        collate: Callable[[list[Any]], Batch],
        world: World | None = None,
        blank: Callable[[Batch], None] = _without_labels,
    ) -> None:
        self.packs, self.size, self.collate, self.blank = packs, size, collate, blank
        self.world = world or World()

    def _whole(self) -> int:
        return -(-len(self.packs) // self.size)

    def __len__(self) -> int:
        return -(-self._whole() // self.world.batch_ranks)

    def __iter__(self) -> Iterator[Batch]:
        for turn in range(len(self)):
            batch = self.collate([self.packs[i] for i in self._indices(turn)])
            if self._number(turn) >= self._whole():
                self.blank(batch)
            yield batch

    def rows(self, turn: int) -> int:
        """Sequences in a batch of this process."""
        return len(self._indices(turn))

    def _number(self, turn: int) -> int:
        """The number of a batch of this process among those of all."""
        return turn * self.world.batch_ranks + self.world.batch_rank

    def _indices(self, turn: int) -> range:
        start = min(self._number(turn), self._whole() - 1) * self.size
        return range(start, min(start + self.size, len(self.packs)))


QUIET = 30.0
"""Seconds after which a validation reports its progress."""


def validate(
    model: Any,
    sets: Mapping[str, Iterable[Batch]],
    say: Callable[[str], None] | None = None,
    world: World | None = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    """The loss per trained token of each dataset, and of all together.

    The model's mode is restored. Progress is reported by ``say`` where it takes long. ``loss``
    defaults to the model's own; ``world`` to this process alone.

    Returns:
        ``eval_loss``; and, where there are several datasets, ``eval_NAME_loss`` of each.
    """
    count = sum(operator.length_hint(batches) for batches in sets.values())
    on_batch = reporter(count, say) if say is not None else None
    world = world or World()
    sums = {
        name: _sum(model, batches, on_batch, world, loss or _model_loss)
        for name, batches in sets.items()
    }
    total, tokens = (sum(part) for part in zip(*sums.values(), strict=True))
    figures = {"eval_loss": _mean(total, tokens)}
    if len(sums) > 1:
        figures |= {f"eval_{name}_loss": _mean(*part) for name, part in sums.items()}
    return figures


def with_perplexity(figures: dict[str, float], recipe: Recipe) -> dict[str, float]:
    """The figures of a validation, with the perplexity of the trained tokens if requested."""
    if not wants_perplexity(recipe):
        return figures
    try:
        perplexity = math.exp(figures["eval_loss"])
    except OverflowError:
        perplexity = math.inf
    return {**figures, "eval_perplexity": perplexity}


def wants_perplexity(recipe: Recipe) -> bool:
    """Whether validations have ``eval_perplexity``."""
    return bool(recipe.do_causal_lm_eval and "perplexity" in (recipe.eval_causal_lm_metrics or ()))


def require_figure(metric: str | None, names: Iterable[str], perplexity: bool = False) -> None:
    """Raise RecipeError unless validations have ``metric``, with or without ``eval_``, if any."""
    sets = list(names)
    figures = ["eval_loss", *(f"eval_{name}_loss" for name in sets if len(sets) > 1)]
    figures += ["eval_perplexity"] * perplexity
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in figures:
        raise RecipeError(
            f"metric_for_best_model: validation has no {metric}; it has {', '.join(figures)}"
        )


def reporter(total: int, say: Callable[[str], None]) -> Callable[[], None]:
    """A callback for each batch of ``total``, which reports the progress now and then."""
    count, last = 0, time.perf_counter()

    def on_batch() -> None:
        nonlocal count, last
        count += 1
        if time.perf_counter() - last >= QUIET and count < total:
            last = time.perf_counter()
            say(f"  validated {count} of {total} batches")

    return on_batch


def _model_loss(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@torch.no_grad()
def _sum(
    model: Any,
    batches: Iterable[Batch],
    on_batch: Callable[[], None] | None,
    world: World,
    mean: Loss,
) -> tuple[float, int]:
    """The summed losses of all trained tokens, and their number."""
    training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for batch in batches:
            here = {k: v.to(model.device) for k, v in batch.items()}
            number = int((batch["labels"][:, 1:] != IGNORED).sum())
            if number or world.several:  # all processes take part in fetching sharded weights
                loss = float(mean(model, here))
                total += loss * number if number else 0.0
            tokens += number
            if on_batch is not None:
                on_batch()
    finally:
        model.train(training)
    sums = world.sums([total, tokens])
    return sums[0], int(sums[1])


def _mean(total: float, tokens: int) -> float:
    return total / tokens if tokens else float("nan")
