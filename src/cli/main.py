"""The command ``fusewright``. What a command needs is imported when it runs."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..compiler.options import Environment
from ..errors import FusewrightError, RecipeError, did_you_mean, nearest
from ..train.processes.ending import ending_as_rank
from ..train.recipe.secret_values import scrub
from ..train.terminal import Terminal, announce, say
from ..upstream import changed
from .commands import Builders, Code, Trust, Urls, register

if TYPE_CHECKING:
    from ..train.consent import Consent
    from ..train.recipe.load import Checked


# How every command ends: one line about what went wrong, and an exit code that says what to do.
#
# Exit code 2 is an error of the caller's: the line says what, where, and how to fix it. 1 is an
# unexpected error; its traceback is written to a file.


_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of click, of which typer may carry its own copy."""

_OTHER_NAMES = {
    "merge-lora": "merge", "inference": "generate", "evaluate": "eval", "finetune": "train",
    "fine-tune": "train", "sft": "train", "run": "train", "predict": "generate", "check": "doctor",
    "env": "doctor", "quantize": "export", "convert": "export",
}  # fmt: skip
"""Names that commands have in Axolotl and elsewhere -> those here."""

_NO_COMMANDS = {
    "resume": "a run resumes with its recipe: fusewright train RECIPE.yaml "
    "--resume_from_checkpoint true.",
    "dry-run": "that is fusewright train RECIPE.yaml --dry-run.",
}
"""What is no command here -> how it is done."""

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Commands(TyperGroup):
    """The commands of ``fusewright``; no exception of theirs gets past this."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the words before the command's name."""
        _take_any_encoding()
        with _ended():
            return super().make_context(*args, **kwargs)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or note which one was probably meant."""
        try:
            name, command, rest = super().resolve_command(ctx, args)
            _flags(command.get_params(ctx) if command else ())
            return name, command, rest
        except _UsageError as error:
            name = args[0].replace("_", "-")
            meant = did_you_mean(_OTHER_NAMES.get(name, name), self.commands)
            vars(error)["meant"] = _NO_COMMANDS.get(name, meant)
            raise

    def get_params(self, ctx: Any) -> Any:
        """The options before the command's name."""
        return _flags(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _ended(ctx):
            return super().invoke(ctx)


def _flags(parameters: Any) -> Any:
    """Let the help of flags name no type, as if a value followed."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


def _take_any_encoding() -> None:
    """Print characters that the terminal's encoding lacks as escapes, not as an error."""
    stream: Any
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", "") == "strict":
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _ended(context: typer.Context | None = None) -> Iterator[None]:
    """Turn an exception into a line and an exit code."""
    full = False
    try:
        try:
            full = Environment.read().traceback
        except ValueError as error:  # another variable
            _say(str(error))
            raise typer.Exit(2) from None
        yield
    except (typer.Exit, typer.Abort):
        raise
    except FusewrightError as error:
        if full:
            traceback.print_exception(error)
        _say(str(error))
        raise typer.Exit(error.exit_code) from error
    except _UsageError as error:
        _say(_usage(error, _command(context)))
        raise typer.Exit(2) from error
    except KeyboardInterrupt as stopped:
        _say(f"{_command(context)} was stopped; nothing more was saved")
        raise typer.Exit(128 + int(getattr(stopped, "signal", 2))) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python complains when it flushes
        raise typer.Exit(141) from None
    except Exception as error:
        if isinstance(error, ImportError | AttributeError):
            for reason in filter(None, map(changed, ("the compiler", "tools"))):
                _say(reason)
                raise typer.Exit(2) from error
        _say(_unforeseen(error, _command(context), full))
        raise typer.Exit(1) from error


def _command(context: typer.Context | None) -> str:
    return (context.invoked_subcommand if context else None) or "the command line"


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    say(Terminal(stderr=True), f"fusewright{f' (rank {rank})' if rank != '0' else ''}: {text}")


def _usage(error: Exception, command: str) -> str:
    shown: Any = error
    meant = getattr(error, "meant", "")
    if getattr(error, "possibilities", None):  # names that are not very near
        names = [name.lstrip("-") for name in shown.possibilities]
        typed = shown.option_name.lstrip("-")
        near = nearest(typed, names) or next((n for n in names if typed.endswith(f"-{n}")), None)
        meant, shown.possibilities = f"did you mean --{near}?" if near else "", None
    message = str(shown.format_message()).rstrip(".?").replace("\n", " ")
    subcommand = "" if " " in command else f" {command}"
    hint = f"{meant} See" if meant else "see"
    return f"{command}: {message[:1].lower()}{message[1:]}; {hint} fusewright{subcommand} --help"


def _unforeseen(error: Exception, command: str, full: bool) -> str:
    """The message for an unexpected error; its traceback is written to a file, or printed."""
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    at = ", ".join([command, *getattr(error, "__notes__", ())])
    if isinstance(error, MemoryError) or any(words in what for words in _NO_MEMORY):
        return (
            f"{at}: there is not enough memory ({what}); use memory: min, a smaller "
            "micro_batch_size or sequence_len, or a smaller model"
        )
    file = None if full else _save_traceback(error)
    if file is None:
        traceback.print_exception(error)
    return f"{at}: {what}. This may be a bug; please report it with " + (
        f"the traceback in {file}" if file else "the traceback above"
    )


def _save_traceback(error: Exception) -> str | None:
    """The file that the traceback was written to, or None if that failed."""
    with contextlib.suppress(OSError):
        options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
        with tempfile.NamedTemporaryFile(
            "w", prefix="fusewright-traceback-", suffix=".txt", delete=False, **options
        ) as file:
            file.write(scrub("".join(traceback.format_exception(error))))
            return file.name
    return None


class AdapterKind(StrEnum):
    """What ``--adapter`` may be, as in a recipe."""

    lora = "lora"


app = typer.Typer(
    name="fusewright",
    cls=Commands,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
    add_completion=False,
    suggest_commands=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
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
    # bitsandbytes warns at import about kernels that are not used, and so does the loader it asks
    for name in ("bitsandbytes", "kernels"):
        logging.getLogger(name).setLevel(logging.ERROR)
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
    allow_image_urls: Urls = False,
) -> None:
    """Fine-tune a model as described in a recipe.

    Keys of the recipe can be set behind it: --max_steps 10 --verbose true.
    """
    from ..train.consent import Consent

    consent = Consent(trust_remote_code, allow_builders, allow_code, allow_image_urls)
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


register(app)


def main() -> None:
    """The entry point of the installed command."""
    with ending_as_rank():
        app()


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
    if recipe.startswith("--"):
        raise RecipeError(f"train: name the recipe first: fusewright train RECIPE.yaml {recipe}")
    from ..train.processes.launchers import placement, reported_once
    from ..train.recipe.load import check, load_recipe
    from ..train.recipe.overrides import parse_overrides
    from ..train.recipe.paths import FUNCTIONS

    overrides = parse_overrides(arguments)
    if overwrite:
        overrides["overwrite_output_dir"] = True
    if dry_run:
        if placement(os.environ).rank == 0:
            checked = check(recipe, overrides, consent)
            announce("importing PyTorch and transformers")
            _show(checked, nproc)
        return 0
    with reported_once(os.environ):
        loaded = load_recipe(recipe, overrides, consent, FUNCTIONS)

    # PyTorch's C++ code warns in every process, such as of a model that uses all its parameters
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if placement(os.environ).rank == 0:
        announce("importing PyTorch and transformers")
    from ..train.processes.launch import launch, number_of_processes

    strategy = loaded.strategy()
    number = number_of_processes(nproc, alone=strategy.world() == 1)
    if number > 1:
        strategy.require_world(number)
        switches = ["--overwrite"] * overwrite + consent.switches()
        return launch(number, ["train", recipe, *switches, *arguments])
    from ..train.run import run  # slow to import: only for a recipe that is right

    return run(loaded).exit_code
