"""``fusewright train --dry-run``: whether a recipe would run, and what each of its keys does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import RecipeError
from .model.files import cached
from .preflight import encoding_obstacles, obstacles
from .recipe.keys.base import extra_of
from .recipe.load import Checked
from .recipe.locate import locate
from .recipe.paths import broken_functions, unallowed_functions
from .recipe.problems import line_of, listed
from .recipe.recipe import GROUPS, Recipe
from .recipe.secret_values import hide, without_hidden
from .recipe.status import Entry, entries, refusals, without_secrets
from .requirements import notices
from .terminal import announce, say

_COLOURS = {
    "honoured": "green",
    "subsumed": "cyan",
    "not applicable": "yellow",
    "not yet available": "red",
    "unset": "dim",
}


def show(checked: Checked, console: Console, processes: int | None = None) -> None:
    """Print whether the recipe trains and fits, then the keys that do not simply do what they say.

    With ``verbose``, all keys follow, and the resolved recipe as YAML, which is itself a recipe
    but for its secrets. ``processes`` will train it; None: as many as it needs.

    Raises:
        RecipeError: training would refuse the recipe; once all is printed.
    """
    recipe, name = checked.recipe, checked.name
    problems = _problems(checked)
    if problems:
        say(console, f"{name}: train would REFUSE this, for the reasons at the end")
    else:
        say(console, f"{name}: train would take this")
        for line in verdict(recipe, processes):
            say(console, f"  {line}")
        say(console, f"  rows were not checked: fusewright preprocess {name} checks them")
    for line in notices(recipe):
        say(console, line)
    written = sorted(entries(checked.values, recipe), key=lambda e: _number(_line(e, checked)))
    counts = {status: sum(_status(e) == status for e in written) for status in _COLOURS}
    say(console, "\nkeys: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n))
    odd = [e for e in written if recipe.verbose or e.note or _status(e) != "honoured"]
    if odd:
        console.print(_table(checked, odd))
    if recipe.verbose:
        say(console, "\n# the recipe with its defaults, without secrets and unset keys")
        console.out(resolved_yaml(recipe), end="", highlight=False)
    else:
        say(console, "--verbose: all keys, and the recipe with its defaults")
    if problems:
        raise RecipeError("train would refuse this: " + "\n  ".join(problems))


def _problems(checked: Checked) -> list[str]:
    """What training would refuse."""
    refused = [*refusals(checked.values), *unallowed_functions(checked.recipe)]
    refused += broken_functions(checked.recipe)
    problems = [listed(checked.name, [one], checked.where) for one in refused]
    problems += obstacles(checked.recipe)
    return problems or [*encoding_obstacles(checked.recipe)]


def _table(checked: Checked, entries: Sequence[Entry]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("key", "line", "status", "value"):
        table.add_column(header, no_wrap=True)
    table.add_column("note", min_width=30 if any(entry.note for entry in entries) else None)
    for entry in entries:
        value = "" if entry.value is None else escape(_flow(without_secrets(entry)))
        status = _status(entry)
        colour = _COLOURS[status]
        row = [escape(entry.key), _line(entry, checked), f"[{colour}]{status}[/]"]
        table.add_row(*row, value, f"[{colour}]{escape(entry.note)}[/]")
    return table


def _status(entry: Entry) -> str:
    return "unset" if entry.value is None else entry.status


def _line(entry: Entry, checked: Checked) -> str:
    return line_of(entry.loc, checked.where).removeprefix("line ").replace("override", "set")


def _number(line: str) -> float:
    return int(line) if line.isdecimal() else math.inf


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every key that has a value and an effect, and every key that was written; no secrets."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    shown: dict[str, Any] = {}
    for group in GROUPS:
        for name, field in group.model_fields.items():
            acts = extra_of(field).get("status", "honoured") == "honoured"
            written = name in recipe.model_fields_set
            if values.get(name) not in (None, [], {}) and (acts or written):
                shown[name] = _short(values[name], getattr(recipe, name))
    return dict(without_hidden(hide(shown)))


def resolved_yaml(recipe: Recipe) -> str:
    """``resolved`` as YAML: a recipe that does the same where it needs no secrets."""
    return yaml.safe_dump(
        resolved(recipe), sort_keys=False, allow_unicode=True, default_flow_style=False, width=96
    )


def _short(value: Any, original: Any) -> Any:
    """Entries of ``datasets`` without their defaults."""
    if isinstance(original, list) and original and hasattr(original[0], "model_dump"):
        keep = {"path", "type"}
        return [
            {k: v for k, v in shown.items() if k in keep or k in item.model_fields_set}
            for shown, item in zip(value, original, strict=True)
        ]
    return value


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return text.removesuffix("\n...\n").strip()


# The verdict of a plan in a few lines, for ``train --dry-run``.


def verdict(recipe: Recipe, processes: int | None) -> list[str]:
    """Whether a recipe fits on this machine, and how long a step takes, in a few sentences.

    By default as many processes as the recipe needs. One sentence where the model's configuration
    is not on this disk.
    """
    source = locate(recipe.base_model, [Path.cwd()])
    if source.gguf_file is None and not Path(source.name).is_dir():
        folder = cached(source.name, recipe.revision_of_model)
        if folder is None:
            return [
                f"NOT CHECKED: {recipe.base_model} is not on this machine. Training downloads it, "
                "if the hub has it and answers; nothing of it was looked at, and nothing is planned"
            ]
        recipe = recipe.model_copy(update={"base_model": str(folder)})
    from .plan.page import verdict_lines  # imports PyTorch
    from .plan.plan import make_plan

    announce("planning a training step, to see whether it fits")
    try:
        return verdict_lines(make_plan(recipe, None, processes))
    except Exception as error:  # a model's own code raises anything; a dry run does not end by it
        return [f"not planned: {error}"]
