"""Which prepared rows are trained on, which are held out, and in which order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from ...errors import DataError
from ..recipe.recipe import Recipe

T = TypeVar("T")
Array = np.ndarray[Any, Any]


def split(items: Sequence[T], size: float, seed: int) -> tuple[list[T], list[T]]:
    """Shuffle ``items`` and hold some out.

    Args:
        items: anything.
        size: a share below 1, or a number of items.
        seed: of the shuffle.

    Returns:
        The items to train on, and those held out.

    Raises:
        DataError: nothing would be left to train on, or nothing would be held out.
    """
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    count = round(len(shuffled) * size) if size < 1 else round(size)
    if count >= len(shuffled) or (size > 0 and count == 0):
        left = max(0, len(shuffled) - count)
        raise DataError(
            f"val_set_size: {size:g} of {len(shuffled)} rows leaves {left} to train on and "
            f"{len(shuffled) - left} to validate on; {_remedy(len(shuffled), size)}"
        )
    return shuffled[count:], shuffled[:count]


def _remedy(rows: int, size: float) -> str:
    """What to do where a share or a number of rows leaves one side empty."""
    if rows < 2:
        return "add rows, or set val_set_size: 0"
    if round(size * rows if size < 1 else size) == 0:
        return f"set val_set_size: 0 to validate on none, or a number of rows from 1 to {rows - 1}"
    return f"set val_set_size to a number of rows from 1 to {rows - 1}, to a share below 1, or to 0"


def order(sizes: Sequence[int], recipe: Recipe) -> tuple[Array, Array]:
    """The rows to train on and those to validate on.

    Args:
        sizes: rows of each dataset; they are numbered one dataset after the other.
        recipe: ``val_set_size``, the weights of the datasets, shards, and what is shuffled.

    Returns:
        Numbers of rows, int64 (N,) and (M,). A row may be trained on several times; it is never
        in both.

    Raises:
        DataError: nothing would be left on one side.
    """
    kept, held = split(range(sum(sizes)), recipe.val_set_size, recipe.seed)
    rest = np.array(kept, np.int64)
    mixed = recipe.shuffle_merged_datasets and not recipe.curriculum_sampling
    if not mixed and (recipe.curriculum_sampling or not recipe.shuffle_before_merging_datasets):
        rest.sort()
    weights = [dataset.weight or 1.0 for dataset in recipe.datasets]
    ends = np.cumsum(sizes)
    if any(w != 1.0 for w in weights) or not mixed:
        owners = np.searchsorted(ends, rest, side="right")
        weighed = [
            _weighed(rest[owners == i], w) for i, w in zip(range(len(sizes)), weights, strict=True)
        ]
        rest = np.concatenate(weighed)
        if mixed:
            rest = np.random.default_rng(recipe.seed).permutation(rest)
    if recipe.dataset_shard_num:
        rest = rest[recipe.dataset_shard_idx :: recipe.dataset_shard_num]
    return rest, np.array(held, np.int64)


def _weighed(rows: Array, weight: float) -> Array:
    """Each row so often: whole times, and the first ones once more for the fraction."""
    whole, part = divmod(weight, 1.0)
    return np.concatenate([*[rows] * int(whole), rows[: round(part * len(rows))]])
