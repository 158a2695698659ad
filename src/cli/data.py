"""``fusewright preprocess``: prepare the rows of a recipe before a run, and look at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..train.terminal import Terminal, announce
from .switches import Builders, Code, Trust

if TYPE_CHECKING:
    from ..train.consent import Consent


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Any key of the recipe can also be set here: --sequence_len 2048",
    )(preprocess)


def preprocess(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show samples token by token; trained tokens are green and marked ▸."
        ),
    ] = False,
    debug_num_examples: Annotated[int, typer.Option(min=1, help="Number of samples to show.")] = 5,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Read only this many rows of each dataset; cache nothing."),
    ] = None,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
) -> None:
    """Read, tokenize and mask the data of a recipe, and cache it for later runs."""
    from ..train.consent import Consent

    consent = Consent(trust_remote_code, allow_builders, allow_code)
    _preprocess(recipe, context.args, debug_num_examples if debug else 0, limit, consent)


def _preprocess(
    name: str, arguments: list[str], examples: int, limit: int | None, consent: Consent
) -> None:
    from ..train.recipe.load import load_recipe
    from ..train.recipe.overrides import parse_overrides
    from ..train.recipe.paths import DATA

    recipe = load_recipe(name, parse_overrides(arguments), consent, DATA)

    announce("importing PyTorch and transformers")
    from ..train.data import prepare  # slow to import: only for a recipe that is right
    from ..train.data.preview import first, show, summary
    from ..train.model.load import quiet
    from ..train.model.tokenizer import load_tokenizer

    console = Terminal()
    with quiet():
        tokenizer = load_tokenizer(recipe)
        prepared = prepare(recipe, tokenizer, console, keep=limit is None, limit=limit)
    summary(prepared, console)
    if examples:
        show(first(prepared, examples), tokenizer, console)
