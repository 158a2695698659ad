"""The fine-tuning engine: a recipe in, a trained adapter out.

In processing order: ``recipe/`` (the keys, their status, reading and checking) → ``preflight``
(what would keep a run from starting) → ``checkpoint/resume`` (the checkpoint to resume from) →
``model/tokenizer`` and ``data/`` (rows, tokens, labels) → ``model/`` (weights and adapters) →
``trainer/`` (batches, arguments, optimizer, schedule, and the optimizer steps), which writes with
``checkpoint/`` → ``finish`` (the files of a finished run) → ``report/`` (the result, the page, the
model card). ``run`` calls them one after the other. ``inference/`` and ``merge/`` work with a
finished run; ``proof/`` trains a few steps in several ways and compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .report.result import RunResult

__all__ = ["train"]


def train(
    recipe: str | Path | Mapping[str, Any],
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    allow_builders: bool = False,
    allow_code: bool = False,
    allow_image_urls: bool = False,
    console: Console | None = None,
    **overrides: Any,
) -> RunResult:
    """Train as ``fusewright train RECIPE`` does.

    Args:
        recipe: a YAML file, or its content as a mapping.
        overwrite: replace the run that ``output_dir`` already holds.
        trust_remote_code: run the Python code that comes with the model. What the recipe says of
            that is not enough, because it may be anybody's.
        allow_builders: run the Python files that datasets name as ``builder``.
        allow_code: run the Python functions that the recipe names, as rewards or as types of rows.
        allow_image_urls: download the images that rows name by an address.
        console: where to print; None for standard output. ``Console(quiet=True)`` prints nothing.
        overrides: recipe keys that win over the file, e.g. ``max_steps=5``.

    Returns:
        The figures of the run, as they are also in ``run.json``. After Ctrl-C or SIGTERM the
        result's ``signal`` says so, and the adapter of the last whole step has been saved.

    Raises:
        RecipeError: the recipe cannot be run; the message lists every problem.
        DataError: a dataset cannot be used; the message has file and line.
        KeyboardInterrupt: stopped before the first step, or a second time; nothing was saved.
    """
    from .consent import Consent
    from .recipe.load import load_recipe
    from .recipe.paths import FUNCTIONS

    if overwrite:
        overrides["overwrite_output_dir"] = True
    consent = Consent(trust_remote_code, allow_builders, allow_code, allow_image_urls)
    checked = load_recipe(recipe, overrides, consent, FUNCTIONS)

    from .run import run  # slow to import: only for a recipe that is right

    return run(checked, console)
