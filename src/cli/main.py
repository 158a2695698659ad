"""The command ``fusewright``. What a command needs is imported when it runs."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from ..errors import RecipeError

_EXTRA = ("matplotlib", "psutil", "pydantic", "rich", "typer", "yaml")
_MISSING = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
if _MISSING:
    missing = ", ".join(_MISSING)
    print(f'fusewright: {missing} missing; pip install "fusewright[train]"', file=sys.stderr)
    raise SystemExit(2)

import typer  # noqa: E402  # 2026-11-24: after the check that it is there

from ..train.terminal import Terminal, announce  # noqa: E402  # 2026-11-26: as above
from . import data as data_commands  # noqa: E402  # 2026-11-25: as above
from . import doctor as doctor_command  # noqa: E402  # 2026-11-27: as above
from . import group  # noqa: E402  # 2026-11-25: as above
from . import init as init_command  # noqa: E402  # 2026-11-27: as above
from . import plan as plan_command  # noqa: E402  # 2026-11-27: as above
from . import trained as trained_commands  # noqa: E402  # 2026-11-25: as above
from . import verify as verify_command  # noqa: E402  # 2026-11-27: as above
from .rank_ending import end_rank  # noqa: E402  # 2026-11-27: as above
from .switches import Builders, Code, Trust  # noqa: E402  # 2026-11-26: as above

if TYPE_CHECKING:
    from ..train.consent import Consent
    from ..train.recipe.load import Checked


class AdapterKind(StrEnum):
    """What ``--adapter`` may be, as in a recipe."""

    lora = "lora"


app = typer.Typer(
    name="fusewright",
    cls=group.Commands,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
    add_completion=False,
    suggest_commands=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("fusewright"))
        raise typer.Exit


@app.callback()
def fusewright(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    local_rank: Annotated[
        int | None,
        typer.Option(hidden=True, help="From a launcher, which sets LOCAL_RANK, too."),
    ] = None,
) -> None:
    """Fine-tune Hugging Face decoder models on an optimized graph."""
    # warns at import about kernels that are not used
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Any key of the recipe can also be set here: --max_steps 5 --learning_rate 1e-4 "
    "--load_in_4bit --no-sample_packing --datasets.0.path rows.jsonl",
)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run in output_dir.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check the recipe, and show what each key does."),
    ] = False,
    nproc: Annotated[
        str | None,
        typer.Option(
            help="Number of processes on this machine, or gpu: one per GPU. Default: one per GPU. "
            "Several machines: start it with torchrun."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    allow_builders: Builders = False,
    allow_code: Code = False,
) -> None:
    """Fine-tune a model as described in a recipe."""
    from ..train.consent import Consent

    consent = Consent(trust_remote_code, allow_builders, allow_code)
    raise typer.Exit(_train(recipe, overwrite, dry_run, nproc, context.args, consent))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes: every key, its type, default, meaning and status."""
    from ..train.recipe.json_schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face id, a folder, a .gguf file, package:NAME; or a folder with only a "
            "config.json, or a model type: then the weights are random."
        ),
    ],
    graph: Annotated[
        bool,
        typer.Option("--graph", help="Print each captured graph, before and after the rewrites."),
    ] = False,
    module: Annotated[
        str | None, typer.Option(help="Print the graph of this module, e.g. model.layers.0.")
    ] = None,
    adapter: Annotated[
        AdapterKind | None, typer.Option(help="Add adapters of rank 8 to all linear layers.")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="The same as --adapter lora.")] = False,
    layers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of layers. Default for random weights: 2, or one of each kind."
        ),
    ] = None,
    fp32: Annotated[
        bool,
        typer.Option("--fp32", help="Load weights in float32. Default: the dtype of training."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Show what would be rewritten in a model, what would not, and why."""
    announce("importing PyTorch and transformers")
    from ..train.explain import ExplainOptions, run  # slow to import

    lora = lora or adapter is AdapterKind.lora
    request = ExplainOptions(model, layers, lora, fp32, trust_remote_code)
    run(request, graph=graph, module=module, as_json=as_json)


plan_command.register(app)
data_commands.register(app)
trained_commands.register(app)
verify_command.register(app)
doctor_command.register(app)
init_command.register(app)


def main() -> None:
    """The entry point of the installed command."""
    try:
        app()
    except SystemExit as ended:
        if "torch.distributed" in sys.modules and os.environ.get("WORLD_SIZE", "1") != "1":
            end_rank(ended.code)
        raise


def _show(checked: Checked, nproc: str | None) -> None:
    """Print what a recipe means, and see that the number of processes fits, if it is known."""
    from ..train.dry_run import show
    from ..train.processes.launchers import placement

    number: int | None = placement(os.environ).size
    if nproc is not None:
        from ..train.processes.launch import number_of_processes  # imports PyTorch

        number = number_of_processes(nproc)
    elif number == 1:
        number = None
    show(checked, Terminal(highlight=False), number)
    if number is not None:
        checked.recipe.strategy().require_world(number)


def _train(
    recipe: str,
    overwrite: bool,
    dry_run: bool,
    nproc: str | None,
    arguments: list[str],
    consent: Consent,
) -> int:
    """Train, and return the exit code of the result."""
    if recipe.startswith("--"):
        raise RecipeError(f"train: name the recipe first: fusewright train RECIPE.yaml {recipe}")
    from ..train.processes.launchers import placement, said_once
    from ..train.recipe.load import check, load_recipe
    from ..train.recipe.overrides import parse_overrides
    from ..train.recipe.paths import FUNCTIONS

    overrides = parse_overrides(arguments)
    if overwrite:
        overrides["overwrite_output_dir"] = True
    if dry_run:
        if placement(os.environ).rank == 0:
            _show(check(recipe, overrides, consent), nproc)
        return 0
    with said_once(os.environ):
        checked = load_recipe(recipe, overrides, consent, FUNCTIONS)

    # PyTorch's C++ code warns in every process, such as of a model that uses all its parameters
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if placement(os.environ).rank == 0:
        announce("importing PyTorch and transformers")
    from ..train.processes.launch import launch, number_of_processes

    strategy = checked.strategy()
    number = number_of_processes(nproc, alone=strategy.world() == 1)
    if number > 1:
        strategy.require_world(number)
        switches = ["--overwrite"] * overwrite + consent.switches()
        return launch(number, ["train", recipe, *switches, *arguments])
    from ..train.run import run  # slow to import: only for a recipe that is right

    return run(checked).exit_code
