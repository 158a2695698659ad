"""``fusewright init``: a starter recipe for somebody's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..train.terminal import announce


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(init)


def init(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A file, a folder, the id of a dataset on the hub, or whatever else path may be "
            "in a recipe.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(help="What base_model may be. Default: a small model."),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What training may use, such as 24GB. Default: what is free here."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write. Default: standard output.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file of --output.")
    ] = False,
) -> None:
    """Look at rows, and write a commented recipe for them."""
    announce("importing PyTorch and transformers")
    from ..train.starter.init import InitOptions, run  # slow to import

    run(InitOptions(data, model, memory, output, overwrite))
