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
    """The batches of a dataset, in order, each made when it is asked for.

    Of several processes, each has a share of them, and all have as many: where the last ones do
    not go round, a process gets one again, without its labels.

    Args:
        packs: the sequences.
        size: sequences in a batch.
        collate: makes a batch of them.
        world: the processes of the run.
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
"""Seconds after which a validation says how far it is."""


def validate(
    model: Any,
    sets: Mapping[str, Iterable[Batch]],
    say: Callable[[str], None] | None = None,
    world: World | None = None,
    loss: Loss | None = None,
) -> dict[str, float]:
    """The loss per trained token of every dataset, and of all together.

    Args:
        model: its mode is kept.
        sets: the batches of each dataset; of several processes, those of this one.
        say: prints a line; called from time to time where it takes long.
        world: the processes that validate together; None: this one alone.
        loss: of a batch; None: the model's own.

    Returns:
        ``eval_loss``; and, where there are several datasets, ``eval_NAME_loss`` of each.
    """
    count = sum(operator.length_hint(batches) for batches in sets.values())
    on_batch = reporter(count, say) if say is not None else None
    world = world or World()
    sums = {
        name: _sum(model, batches, on_batch, world, loss or _own) for name, batches in sets.items()
    }
    total, tokens = (sum(part) for part in zip(*sums.values(), strict=True))
    found = {"eval_loss": _mean(total, tokens)}
    if len(sums) > 1:
        found |= {f"eval_{name}_loss": _mean(*part) for name, part in sums.items()}
    return found


def with_perplexity(figures: dict[str, float], recipe: Recipe) -> dict[str, float]:
    """The figures of a validation, and the perplexity of the trained tokens if it is wanted."""
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
    """See that validations have the figure that is to judge them.

    Args:
        metric: its name, with or without ``eval_``; None: nothing judges them.
        names: of the datasets.
        perplexity: whether that is one of the figures.

    Raises:
        RecipeError: they have not.
    """
    sets = list(names)
    figures = ["eval_loss", *(f"eval_{name}_loss" for name in sets if len(sets) > 1)]
    figures += ["eval_perplexity"] * perplexity
    if metric is not None and f"eval_{metric.removeprefix('eval_')}" not in figures:
        raise RecipeError(
            f"metric_for_best_model: validation has no {metric}; it has {', '.join(figures)}"
        )


def reporter(total: int, say: Callable[[str], None]) -> Callable[[], None]:
    """What is to be called after each batch: it says how many there were, now and then.

    Args:
        total: batches.
        say: prints a line.
    """
    done, last = 0, time.perf_counter()

    def on_batch() -> None:
        nonlocal done, last
        done += 1
        if time.perf_counter() - last >= QUIET and done < total:
            last = time.perf_counter()
            say(f"  validated {done} of {total} batches")

    return on_batch


def _own(model: Any, batch: Batch) -> Tensor:
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
    """The losses of all trained tokens, added up, and their number."""
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
    both = world.sums([total, tokens])
    return both[0], int(both[1])


def _mean(total: float, tokens: int) -> float:
    return total / tokens if tokens else float("nan")
