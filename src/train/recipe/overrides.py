"""Keys of a recipe on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from ...errors import RecipeError, nearest
from .keys.base import Keys, aliases, current, moved, nested
from .recipe import Recipe
from .yaml_lines import parse_value


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read ``--key value``, ``--key=value``, and for booleans ``--key`` and ``--no-key``.

    Values are read as YAML, ``-`` in a key is read as ``_``, and a dotted key
    (``--datasets.0.path``) goes inside.

    Raises:
        RecipeError: a word that belongs to no key, or a key without a value.
    """
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise RecipeError(
                f"unexpected argument {word!r}; write --key value to set a key of the recipe"
            )
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        if equals:
            overrides[key] = parse_value(value)
        elif key.startswith("no_") and _is_switch(key[3:]):
            overrides[key[3:]] = False
        elif rest and not rest[0].startswith("--"):
            overrides[key] = parse_value(rest.pop(0))
        elif _is_switch(key):
            overrides[key] = True
        else:
            raise RecipeError(f"{word} {_no_value(key)}")
    return overrides


def _no_value(key: str) -> str:
    """The message about a word that no value follows: often it is a misspelt switch."""
    known = {*Recipe.model_fields, *aliases(Recipe), *moved(Recipe)}
    if key.removeprefix("no_").partition(".")[0] in known:
        return "needs a value"
    near = nearest(key, [*known, "dry_run", "overwrite"])
    hint = f"; did you mean --{near}?" if near else ""
    return f"is neither an option nor a key of a recipe{hint}"


def _is_switch(dotted: str) -> bool:
    """Whether a key may be a boolean."""
    model: type[Keys] | None = Recipe
    annotation: Any = None
    for name in current(Recipe, dotted):
        if isinstance(name, int):
            continue
        field = model.model_fields.get(name) if model is not None else None
        if field is None:
            return False
        annotation = field.annotation
        model = nested(annotation)
    return annotation is bool or bool in get_args(annotation)
