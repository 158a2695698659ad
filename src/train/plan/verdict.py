"""The verdict of a plan in a few lines, for ``train --dry-run``."""

from __future__ import annotations

from pathlib import Path

from ..model.files import cached
from ..recipe.locate import locate
from ..recipe.recipe import Recipe


def verdict(recipe: Recipe, processes: int | None) -> list[str]:
    """Whether a recipe fits on this machine, and how long a step takes, in a few sentences.

    By default as many processes as the recipe needs. One sentence where the model's configuration
    is not on this disk.
    """
    source = locate(recipe.base_model, [Path.cwd()])
    if source.gguf_file is None and not Path(source.name).is_dir():
        folder = cached(source.name, recipe.revision_of_model)
        if folder is None:
            return [
                f"NOT CHECKED: {recipe.base_model} is not on this machine. Training downloads it, "
                "if the hub has it and answers; nothing of it was looked at, and nothing is planned"
            ]
        recipe = recipe.model_copy(update={"base_model": str(folder)})
    from .page import verdict_lines  # imports PyTorch
    from .plan import make_plan

    try:
        return verdict_lines(make_plan(recipe, None, processes))
    except Exception as error:  # a model's own code raises anything; a dry run does not end by it
        return [f"not planned: {error}"]
