"""Reading a YAML file as a checked recipe, with all problems reported at once, by line."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ...errors import RecipeError
from ..consent import Consent
from ..printable import odd_characters
from .conflicts import conflicts
from .keys.base import Keys, aliases, current, moved, nested
from .paths import DATA, broken_functions, unallowed_functions, with_paths
from .problems import Loc, explained, listed, nearest_key
from .recipe import Recipe
from .status import refusals
from .yaml_lines import read


@dataclass(frozen=True)
class Checked:
    """A recipe without mistakes, though training may refuse it.

    Attributes:
        name: of the file, as it was given.
        recipe: the keys, with absolute paths.
        values: what was written, with the current names of keys; unset ones are None.
        where: the line of every key and item, e.g. ``line 3``, or ``override``.
    """

    name: str
    recipe: Recipe
    values: Mapping[str, Any]
    where: Mapping[Loc, str]


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    consent: Consent | None = None,
    functions: Collection[str] = (),
) -> Recipe:
    """Read and check a recipe that is to be run, and make its paths absolute.

    Args:
        source: a YAML file, or its content as a mapping.
        overrides: keys that win over the file; a dotted key (``datasets.0.path``) goes inside.
        consent: what the caller allows; None: nothing. No key can allow it.
        functions: the keys whose Python functions are loaded, to see that they are there.

    Raises:
        RecipeError: lists every problem, with its key and line; also keys that ask for what is not
            yet available, or that would run foreign code without the caller's permission.
    """
    checked = check(source, overrides, consent)
    problems = [*refusals(checked.values), *unallowed_functions(checked.recipe)]
    problems = problems or broken_functions(checked.recipe, functions)
    if problems:
        raise RecipeError(listed(checked.name, problems, checked.where))
    return checked.recipe


def check(
    source: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    consent: Consent | None = None,
    with_data: bool = True,
) -> Checked:
    """Read and check a recipe, but take keys that are not yet available.

    Functions that it names need no permission here, because nothing is run. ``source``,
    ``overrides`` and ``consent`` are those of ``load_recipe``; with ``with_data``, the rows have to
    be on this machine.

    Raises:
        RecipeError: lists every problem, with its key and line.
    """
    if isinstance(source, Mapping):
        name, values, folder = "the recipe", _plain(source), Path.cwd()
        lines: dict[Loc, int] = {}
        repeated: list[tuple[Loc, str]] = []
    else:
        path = Path(source)
        values, lines, repeated = read(path)
        name, folder = str(source), path.resolve().parent
    where: dict[Loc, str] = {loc: f"line {line}" for loc, line in lines.items()}
    _move_tokens(values, where)
    problems = [*repeated, *_rename(Recipe, values, where, ())]
    problems += _override(values, overrides or {}, where)
    content = _without_nulls(values)
    odd = list(odd_characters(content))
    problems += odd
    recipe = None
    wrong: list[tuple[Loc, str]] = []
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        wrong = explained(error, content)
        problems += wrong
    near = {nearest_key(Recipe, k) for k in content if k not in Recipe.model_fields} - {None}
    known = {loc for loc, _ in problems}
    for loc, problem in conflicts(content):
        misspelt = any(str(key) in problem or key == loc[0] for key in near)
        if not misspelt and loc not in known:
            problems.append((loc, problem))
    sound = recipe or _sound_part(content, wrong)
    if sound is not None and not odd:  # no path has such characters
        complete, missing = with_paths(
            sound.allowed(consent or Consent()), folder, whole=recipe is not None
        )
        recipe = recipe and complete
        missing = [m for m in missing if with_data or m[0][0] not in DATA]
        problems += [m for m in missing if not any(m[0][: len(loc)] == loc for loc, _ in wrong)]
    if problems or recipe is None:
        known = {loc for loc, _ in problems}
        problems += [refusal for refusal in refusals(values) if refusal[0] not in known]
        raise RecipeError(listed(name, problems, where))
    return Checked(name, recipe, values, where)


def _sound_part(content: dict[str, Any], wrong: list[tuple[Loc, str]]) -> Recipe | None:
    """The recipe without what is ``wrong`` in it, for a look at its paths; None if that is none.

    A key that has to be there has a stand-in, the current folder.
    """
    values = _plain(content)
    for _ in range(3):  # what is wrong; what is missing without it; then it is right or none
        for loc, _problem in wrong:
            with contextlib.suppress(KeyError, IndexError, TypeError):  # inside of another one
                _take_out(values, loc)
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            wrong = explained(error, values)
    return None


def _take_out(values: Any, loc: Loc) -> None:
    """Remove the value at ``loc``, with the whole list if it is an item, or put one there."""
    for depth, part in enumerate(loc[:-1]):
        if isinstance(values[part], list) and depth == len(loc) - 2:
            del values[part]
            return
        values = values[part]
    if loc[-1] in values:
        del values[loc[-1]]
    else:
        values[loc[-1]] = "."


def _rename(
    model: type[Keys], values: dict[str, Any], where: dict[Loc, str], loc: Loc
) -> list[tuple[Loc, str]]:
    """Rename keys with an older name, also in ``where``; return keys that have both names."""
    problems: list[tuple[Loc, str]] = []
    names: dict[str, tuple[str, ...]] = {old: (new,) for old, new in aliases(model).items()}
    for old, new in {**names, **moved(model)}.items():
        if old not in values:
            continue
        if len(new) > 1 and values.get(new[0]) is None:
            values[new[0]] = {}
        group = values[new[0]] if len(new) > 1 else values
        if not isinstance(group, dict):  # which is another problem
            continue
        value = values.pop(old)
        if group.get(new[-1]) is not None and value is not None:
            message = f"is the old name of {'.'.join(new)}, which is set, too"
            problems.append(((*loc, old), message))
            continue
        if value is not None or new[-1] not in group:
            group[new[-1]] = value
            for at in [at for at in where if at[: len(loc) + 1] == (*loc, old)]:
                where[(*loc, *new, *at[len(loc) + 1 :])] = where[at]
    for name, field in model.model_fields.items():
        inner = nested(field.annotation)
        if inner is not None and isinstance(values.get(name), dict):
            problems += _rename(inner, values[name], where, (*loc, name))
    return problems


def _move_tokens(values: dict[str, Any], where: dict[Loc, str]) -> None:
    """Read ``tokens`` with keys and values as ``special_tokens``, whose old spelling it is."""
    old, new = values.get("tokens"), values.get("special_tokens")
    if not isinstance(old, dict) or (isinstance(new, dict | list) and new):
        return  # a list, or one that is set twice: another problem
    values["special_tokens"] = values.pop("tokens")
    for at in [at for at in where if at[:1] == ("tokens",)]:
        where["special_tokens", *at[1:]] = where[at]


def _override(
    values: dict[str, Any], overrides: Mapping[str, Any], where: dict[Loc, str]
) -> list[tuple[Loc, str]]:
    """Set what the command line says; return what cannot be set."""
    problems: list[tuple[Loc, str]] = []
    for dotted, value in overrides.items():
        loc = current(Recipe, dotted)
        if _put(values, loc, _plain(value)):
            for n in range(1, len(loc)):
                where.setdefault(loc[:n], "override")
            where[loc] = "override"
        else:
            problems.append((loc, "is not in the recipe, so it cannot be overridden"))
    return problems + _rename(Recipe, values, where, ())  # a value may be a mapping


def _put(values: Any, loc: Loc, value: Any) -> bool:
    """Set the value at ``loc``; False when there is nothing to set it in."""
    for part, following in itertools.pairwise(loc):
        if isinstance(values, dict) and isinstance(following, str) and values.get(part) is None:
            values[part] = {}  # the keys of an unset group, e.g. special_tokens
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return False
    last = loc[-1]
    try:
        if not isinstance(values, dict):
            values[last]  # a list does not grow
        values[last] = value
    except (IndexError, TypeError):
        return False
    return True


def _plain(value: Any) -> Any:
    """A copy of nested mappings and lists that may be changed."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
