"""How every command ends: one line about what went wrong, and an exit code that says what to do.

Exit code 2 is an error of the caller's: the line says what, where, and how to fix it. 1 is an
unexpected error; its traceback is written to a file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperGroup

from ..compiler.options import Environment
from ..errors import FusewrightError, did_you_mean, nearest
from ..train.recipe.secrets import scrub
from ..train.terminal import Terminal, say

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Of click, of which typer may carry its own copy."""

_AXOLOTL = {"merge-lora": "merge", "inference": "generate", "evaluate": "eval"}
"""Its commands that have another name here."""

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Commands(TyperGroup):
    """The commands of ``fusewright``; no exception of theirs gets past this."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        """Read the words before the command's name."""
        _take_any_encoding()
        with _ended():
            return super().make_context(*given, **named)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or note which one was probably meant."""
        try:
            return super().resolve_command(ctx, args)
        except _UsageError as error:
            name = args[0].replace("_", "-")
            vars(error)["meant"] = did_you_mean(_AXOLOTL.get(name, name), self.commands)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _ended(ctx):
            return super().invoke(ctx)


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
        _say(_unforeseen(error, _command(context), full))
        raise typer.Exit(1) from error


def _command(context: typer.Context | None) -> str:
    return (context.invoked_subcommand if context else None) or "the command line"


def _say(text: str) -> None:
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    say(Terminal(stderr=True), f"fusewright{f' (rank {rank})' if rank != '0' else ''}: {text}")


def _usage(error: Exception, command: str) -> str:
    """The message for a mistake on the command line."""
    shown: Any = error
    meant = getattr(error, "meant", "")
    if getattr(error, "possibilities", None):  # names that are not very near
        names = [name.lstrip("-") for name in shown.possibilities]
        near = nearest(shown.option_name.lstrip("-"), names)
        meant, shown.possibilities = f"did you mean --{near}?" if near else "", None
    said = str(shown.format_message()).rstrip(".?").replace("\n", " ")
    own = "" if " " in command else f" {command}"
    hint = f"{meant} See" if meant else "see"
    return f"{command}: {said[:1].lower()}{said[1:]}; {hint} fusewright{own} --help"


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
    kept = None if full else _kept(error)
    if kept is None:
        traceback.print_exception(error)
    return f"{at}: {what}. This may be a bug; please report it with " + (
        f"the traceback in {kept}" if kept else "the traceback above"
    )


def _kept(error: Exception) -> str | None:
    """The file that the traceback was written to, or None if that failed."""
    with contextlib.suppress(OSError):
        options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}
        with tempfile.NamedTemporaryFile(
            "w", prefix="fusewright-traceback-", suffix=".txt", delete=False, **options
        ) as file:
            file.write(scrub("".join(traceback.format_exception(error))))
            return file.name
    return None
