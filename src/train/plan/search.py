"""The limits of what fits: sequence length, batch, number of devices, size of a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...errors import RecipeError
from ...memory.budget import GB
from ..recipe.recipe import Recipe
from .count.layout import ProcessLayout, layout_of
from .estimate import SPARE, TrainingJob, smallest_peak

SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141, 180, 192, 288)
"""GiB that cards have."""

WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Headroom:
    """The largest and smallest settings that fit.

    Attributes:
        longest_sequence: in tokens, with the recipe's micro batch; 0: not even a short one.
        largest_micro_batch: sequences, with the recipe's length; 0: not even one.
        smallest_card: GiB of the smallest card that fits, in the same number; None: none does.
        fewest_devices: of the same card, a power of two; None: none fits.
        positions: the longest text that the model has learnt to read, which also limits a sequence.
    """

    longest_sequence: int
    largest_micro_batch: int
    smallest_card: int | None
    fewest_devices: int | None
    positions: int | None = None


def fits(job: TrainingJob, layout: ProcessLayout, room: int, factor: float = 1.0) -> bool:
    """Whether the first process of a run fits into ``room`` bytes, with a tenth to spare."""
    return smallest_peak(job, layout, room, factor) <= SPARE * room


def limits(job: TrainingJob, recipe: Recipe, layout: ProcessLayout, room: int) -> Headroom:
    """What would still fit into ``room`` bytes for each process."""
    factor = _largest(lambda f: fits(job, layout, room, f))
    length = int(recipe.sequence_len * factor) // 64 * 64
    rows = int(recipe.micro_batch_size * factor)
    card = next((s for s in SIZES if fits(job, layout, s * GB)), None)
    return Headroom(length, rows, card, _fewest(job, recipe, room))


def _fewest(job: TrainingJob, recipe: Recipe, room: int) -> int | None:
    for world in WORLDS:
        try:
            layout = layout_of(recipe, world)
        except RecipeError:  # the recipe says how many it needs
            continue
        if fits(job, layout, room):
            return world
    return None


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest factor that holds, to a hundredth; 0 if none does."""
    low, high = 0.0, 1.0
    while holds(high) and high < 4096:
        low, high = high, high * 2
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
