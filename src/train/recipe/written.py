"""A recipe as YAML for people to read, with chosen keys apart from defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .keys.base import is_default
from .recipe import GROUPS, Dataset, Recipe
from .secret_values import hide
from .status import entries

_ROWS = ("datasets", "test_datasets")


@dataclass(frozen=True)
class Folded:
    """YAML of the keys that are not at a default, and of the ``number`` others."""

    chosen: str
    defaults: str
    number: int


def folded(recipe: Mapping[str, Any]) -> Folded:
    """Split a recipe, as ``run.json`` holds it, into chosen keys and the rest.

    Keys that this version does not know count as chosen.
    """
    order = [name for group in GROUPS for name in group.model_fields if name in recipe]
    sorted_ = {name: recipe[name] for name in [*order, *recipe]}  # keys we do not know come last
    chosen, rest = _split(hide(sorted_), Recipe)
    for key in _ROWS:
        if isinstance(chosen.get(key), list):
            chosen[key] = [
                _split(row, Dataset)[0] if isinstance(row, Mapping) else row for row in chosen[key]
            ]
    return Folded(_yaml(chosen), _yaml(rest), len(rest))


def without_effect(recipe: Mapping[str, Any]) -> list[str]:
    """The chosen keys that are subsumed or do not apply, a line each; none for an odd recipe."""
    chosen, _ = _split({k: v for k, v in recipe.items() if k in Recipe.model_fields}, Recipe)
    try:
        checked = Recipe.model_validate(chosen)
    except ValidationError:  # another version's
        return []
    return [
        f"{entry.key}: {entry.status}: {entry.note}"
        for entry in entries(checked.model_dump(exclude_unset=True))
        if entry.asks and entry.status in ("subsumed", "not applicable")
    ]


def _split(
    values: Mapping[str, Any], model: type[BaseModel]
) -> tuple[dict[str, Any], dict[str, Any]]:
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in values.items():
        field = model.model_fields.get(key)
        usual = field is not None and is_default(field, value)
        (rest if usual else chosen)[str(key)] = value
    return chosen, rest


def _yaml(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # ten times as fast
    text: str = yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True, width=88)
    return text
