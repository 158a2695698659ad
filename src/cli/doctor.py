"""``fusewright doctor``: what this machine has for training, and what mends each gap."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print what is found as JSON.")] = False,
) -> None:
    """Check versions, devices, compilers and libraries, and say what mends each gap."""
    from ..train.doctor.report import run

    raise typer.Exit(run(as_json))
