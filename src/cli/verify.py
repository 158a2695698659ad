"""``fusewright verify``: prove on a recipe's own data that the optimized engine trains the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RecipeError
from ..train.terminal import announce
from .switches import Builders, Code, Trust


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Any key of the recipe can also be set here: --sequence_len 256. Exit code 0: all "
        "ways passed; 1: one failed; 2: the recipe cannot be used.",
    )(verify)


def verify(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps that each way trains.")] = 5,
    processes: Annotated[
        int,
        typer.Option(
            "--processes", "--nproc", min=1, help="Processes to compare with one; 1 leaves it out."
        ),
    ] = 2,
    json: Annotated[Path | None, typer.Option(help="Write all figures to this file.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the scratch folder, and say where it is.")
    ] = False,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
) -> None:
    """Train a few steps of a recipe in several ways, and compare losses and gradients.

    Eager and optimized, packed and unpacked, accumulated and not, one process and several.
    """
    from ..train.consent import Consent
    from ..train.processes.launchers import placement
    from ..train.recipe.load import load_recipe
    from ..train.recipe.overrides import parse_overrides

    if recipe.startswith("--"):
        raise RecipeError(f"verify: name the recipe first: fusewright verify RECIPE.yaml {recipe}")
    consent = Consent(trust_remote_code, allow_builders, allow_code)
    checked = load_recipe(recipe, parse_overrides(context.args), consent)
    if placement(os.environ).size > 1:
        raise RecipeError(
            "verify: it starts its own processes; run it without torchrun, and give --processes"
        )
    if json is not None and not json.resolve().parent.is_dir():
        raise RecipeError(f"--json: the folder {json.parent} does not exist; make it first")
    announce("importing PyTorch and transformers")
    from ..train.proof import command  # slow to import: only for a recipe that is right

    options = command.VerifyOptions(recipe, steps, processes, json, keep)
    raise typer.Exit(command.verify(checked, options))
