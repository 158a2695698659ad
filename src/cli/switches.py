"""The switches that several commands have: the caller's own word for what may be run."""

from __future__ import annotations

from typing import Annotated

import typer

Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the Python code that comes with the model. No recipe and no folder can allow it.",
    ),
]
Builders = Annotated[
    bool,
    typer.Option(
        "--allow-builders",
        help="Run the Python files that datasets name as builder. No recipe can allow it.",
    ),
]
