"""The switches that several commands have: the caller's permission to run code."""

from __future__ import annotations

from typing import Annotated

import typer

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code that comes with the model. Recipes and folders cannot allow it.",
    ),
]
Code = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="Run the Python functions that the recipe names, as rewards or as types of rows. "
        "Recipes cannot allow it.",
    ),
]
Builders = Annotated[
    bool,
    typer.Option(
        "--allow-builders",
        help="Run the Python files that datasets name as builder. Recipes cannot allow it.",
    ),
]
