"""Prepares rows once, whatever the number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..processes.world import World
from ..recipe.recipe import Recipe
from .cache import Samples
from .prepare import PreparedData, prepare

if TYPE_CHECKING:
    from rich.console import Console


def prepare_once(
    recipe: Recipe, tokenizer: Any, console: Console | None, day: str, world: World
) -> PreparedData:
    """Let rank 0 prepare the rows of a recipe, and the other processes read them from its cache.

    On another machine that does not see the cache, the first process prepares them again. None of
    them waits at a collective, so preparation may take as long as it does. Arguments and errors are
    those of ``prepare``.
    """
    mine: list[PreparedData] = []

    def first() -> str:
        mine.append(prepare(recipe, tokenizer, console, day=day))
        return str(_cache(mine[0]) or "")

    root = world.share(first)
    if not world.main:
        overrides = {"dataset_prepared_path": root} if root else {}
        same = recipe.model_copy(update=overrides)
        shared = bool(root)
        world.one_per_machine(
            lambda: mine.append(prepare(same, tokenizer, None, day=day, shared=shared))
        )
    return mine[0]


def _cache(prepared: PreparedData) -> Path | None:
    for samples in (prepared.train, *prepared.validation.values()):
        if isinstance(samples, Samples):
            return samples.path.parent.parent
    return None
