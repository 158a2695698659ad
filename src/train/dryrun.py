"""``fusewright train --dry-run``: what becomes of each key, and the recipe that would run."""

from __future__ import annotations

from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .keys.base import extra_of
from .problems import line_of
from .recipe import GROUPS, Recipe
from .status import entries, refusals
from .yamlfile import Checked

_COLOURS = {
    "honoured": "green",
    "subsumed": "cyan",
    "not applicable": "yellow",
    "not yet available": "red",
}


def show(checked: Checked, console: Console) -> None:
    """Print the table of written keys, then the resolved recipe as YAML.

    Args:
        checked: what was read.
        console: where to print. What is printed below the table is itself a recipe.
    """
    table = Table("key", "line", "value", "status", "note", title=escape(checked.name))
    table.columns[0].no_wrap = table.columns[1].no_wrap = table.columns[3].no_wrap = True
    found = entries(checked.values)
    order = {loc: i for i, loc in enumerate(checked.where)}
    for entry in sorted(found, key=lambda e: order.get(e.loc, -1)):
        line = line_of(entry.loc, checked.where).removeprefix("line ")
        value = "" if entry.value is None else _flow(entry.value)
        status = f"[{_COLOURS[entry.status]}]{entry.status}[/]"
        table.add_row(escape(entry.key), line, escape(value), status, escape(entry.note))
    console.print(table)
    counts = {status: sum(e.status == status for e in found) for status in _COLOURS}
    console.print(", ".join(f"{n} {status}" for status, n in counts.items() if n))
    if refused := refusals(checked.values):
        console.print("training would be refused: " + ", ".join(_dotted(loc) for loc, _ in refused))
    console.print("\n# the recipe with its defaults; empty keys are left out")
    console.out(resolved_yaml(checked.recipe), end="", highlight=False)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every key that has a value and an effect, and every key that was written."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    shown: dict[str, Any] = {}
    for group in GROUPS:
        for name, field in group.model_fields.items():
            acts = extra_of(field).get("status", "honoured") == "honoured"
            written = name in recipe.model_fields_set
            if values.get(name) not in (None, [], {}) and (acts or written):
                shown[name] = _short(values[name], getattr(recipe, name))
    return shown


def resolved_yaml(recipe: Recipe) -> str:
    """The same as YAML, which is a recipe that does the same."""
    return yaml.safe_dump(
        resolved(recipe), sort_keys=False, allow_unicode=True, default_flow_style=False, width=96
    )


def _short(value: Any, original: Any) -> Any:
    """Entries of ``datasets`` without what is theirs by default."""
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


def _dotted(loc: tuple[str | int, ...]) -> str:
    return ".".join(map(str, loc))
