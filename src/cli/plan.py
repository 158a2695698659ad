"""``fusewright plan``: what a recipe will take, before a machine is rented."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..train.terminal import Terminal, announce
from .switches import Trust

if TYPE_CHECKING:
    from ..train.consent import Consent


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Any key of the recipe can also be set here: --sequence_len 8192",
    )(plan)


def plan(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    gpus: Annotated[
        str | None,
        typer.Option(
            help="What the run gets: 8xH100, 8x80GB, 24GB. Default: what this machine has."
        ),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Number of processes on this machine.")
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            help="A card of your own: name=X,memory=48,tflops=100,bandwidth=900,link=50,network=12 "
            "(GB, TFLOP/s, GB/s)."
        ),
    ] = None,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare", help="Compare full fine-tuning, LoRA and QLoRA, shared in each way."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Say what a recipe will take: memory by part, time, network, and the smallest that fits."""
    from ..train.consent import Consent

    consent = Consent(trust_remote_code, False)
    _plan(recipe, context.args, consent, gpus, nproc, card, compare, as_json)


def _plan(
    name: str,
    arguments: list[str],
    consent: Consent,
    gpus: str | None,
    nproc: int | None,
    card: str | None,
    compare: bool,
    as_json: bool,
) -> None:
    from ..train.plan.cards import parse_card, parse_devices
    from ..train.recipe.load import check
    from ..train.recipe.overrides import parse_overrides

    own = parse_card(card) if card else None
    asked = gpus or (f"1x{own.name}" if own else None)
    devices = parse_devices(asked, own) if asked else None
    checked = check(name, parse_overrides(arguments), consent, with_data=False)

    announce("importing PyTorch and transformers")
    from ..train.plan.plan import make_plan  # slow to import

    announce("counting a training step on tensors without contents")
    made = make_plan(checked.recipe, devices, nproc, compare=compare)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2, default=str))
        return
    from ..train.plan.page import show

    show(made, Terminal(highlight=False))
