"""From a YAML file to a checked recipe, with every problem reported at once, by line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import RecipeError
from .recipe import Dataset, Recipe, conflicts
from .source import find_file, locate

Loc = tuple[str | int, ...]
"""The way to a value, e.g. ``("datasets", 0, "path")``."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that ``2e-4`` is a number (as in YAML 1.2 and in everyone's recipes)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """Read one value as a recipe would, e.g. ``"2e-4"`` or ``"[q_proj, v_proj]"``."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def load_recipe(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """Read and check a recipe, and make its paths absolute.

    Args:
        source: a YAML file, or its content as a mapping.
        overrides: keys that win over the file; a dotted key (``datasets.0.path``) goes inside.

    Raises:
        RecipeError: lists every problem, with its key and line.
    """
    if isinstance(source, Mapping):
        name, values, folder = "the recipe", _plain(source), Path.cwd()
        lines: dict[Loc, int] = {}
    else:
        path = Path(source)
        values, lines = _read(path)
        name, folder = str(source), path.resolve().parent
    where: dict[Loc, str] = {loc: f"line {line}" for loc, line in lines.items()}
    problems: list[tuple[Loc, str]] = []
    for dotted, value in (overrides or {}).items():
        loc = tuple(int(p) if p.isdecimal() else p for p in dotted.split("."))
        if _put(values, loc, value):
            where[loc] = "override"
        else:
            problems.append((loc, "there is nothing at this place to override"))
    values = _without_nulls(values)
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += _explained(error, values)
    meant = {_nearest_key(Recipe, k) for k in values if k not in Recipe.model_fields} - {None}
    for key, problem in conflicts(values):
        if not any(str(name) in problem for name in meant):  # it is there, only misspelt
            problems.append(((key,), problem))
    if recipe is not None:
        recipe, missing = _with_paths(recipe, folder)
        problems += missing
    if problems or recipe is None:
        raise RecipeError(_listed(name, problems, where))
    return recipe


def _read(path: Path) -> tuple[dict[str, Any], dict[Loc, int]]:
    """The file's content, and the line of every key and item."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; name the recipe's YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    loader = _Loader(text)
    lines: dict[Loc, int] = {}
    try:
        node = loader.get_single_node()
        repeated = list(_number(node, (), lines)) if node else []
        values = loader.construct_document(node) if node else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{path}{at}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: must hold keys and values, not {_kind(values)}")
    if repeated:
        raise RecipeError(
            _listed(
                str(path),
                [(loc, "is given twice") for loc in repeated],
                {loc: f"line {lines[loc]}" for loc in repeated},
            )
        )
    return values, lines


def _number(node: yaml.Node, loc: Loc, lines: dict[Loc, int]) -> Iterator[Loc]:
    """Fill ``lines`` (counted from 1) for what is below ``node``; yield keys that come twice."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*loc, str(key.value))
            if inner in lines:
                yield inner
            lines[inner] = key.start_mark.line + 1
            yield from _number(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*loc, i)] = item.start_mark.line + 1
            yield from _number(item, (*loc, i), lines)


def _plain(value: Any) -> Any:
    """A copy of nested mappings and lists that may be changed."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _put(values: Any, loc: Loc, value: Any) -> bool:
    """Set the value at ``loc``; False when there is nothing to set it in."""
    for part in loc[:-1]:
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


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _with_paths(recipe: Recipe, folder: Path) -> tuple[Recipe, list[tuple[Loc, str]]]:
    """The recipe with absolute paths, and what could not be found."""
    folders = list(dict.fromkeys([folder, Path.cwd()]))
    places = " or ".join(str(f) for f in folders)
    problems: list[tuple[Loc, str]] = []
    datasets: list[Dataset] = []
    for i, dataset in enumerate(recipe.datasets):
        builder = find_file(dataset.builder, folders) if dataset.builder else None
        path = find_file(dataset.path, folders)
        if dataset.builder and builder is None:
            problems.append(
                (("datasets", i, "builder"), f"there is no {dataset.builder} in {places}")
            )
        if path is None and dataset.builder is None:
            problems.append((("datasets", i, "path"), f"there is no {dataset.path} in {places}"))
        if Path(dataset.path).suffix not in (".jsonl", ".json"):
            problems.append((("datasets", i, "path"), "must be a .jsonl or a .json file"))
        absolute = path or (folder / Path(dataset.path).expanduser())
        names = {"path": str(absolute), "builder": str(builder) if builder else None}
        datasets.append(dataset.model_copy(update=names))
    base = recipe.base_model
    try:
        locate(base, folders)
        found = None if base.startswith("package:") else find_file(base, folders)
        base = str(found) if found else base
    except RecipeError as error:
        problems.append((("base_model",), str(error)))
    output = str(Path(recipe.output_dir).expanduser().resolve())
    update = {"datasets": datasets, "base_model": base, "output_dir": output}
    return recipe.model_copy(update=update), problems


def _explained(error: ValidationError, values: Any) -> list[tuple[Loc, str]]:
    """Pydantic's errors in our words; the branches of a union become one line."""
    grouped: dict[Loc, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        loc = detail["loc"]
        if detail["type"] not in ("missing", "extra_forbidden"):
            loc = _given(loc, values)
        grouped.setdefault(loc, []).append(detail)
    return [(loc, _words(loc, details)) for loc, details in grouped.items()]


def _given(loc: Loc, values: Any) -> Loc:
    """The part of ``loc`` that the recipe has (pydantic adds the names of union branches)."""
    for i, part in enumerate(loc):
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            return loc[:i]
    return loc


_WANTED = {
    "bool": "true or false", "int": "a whole number", "float": "a number", "string": "text",
    "list": "a list", "dict": "keys and values", "model": "keys and values",
    "value": "a number",
}  # fmt: skip


def _words(loc: Loc, details: list[ErrorDetails]) -> str:
    kind = details[0]["type"]
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return f"is not a key of a recipe{_nearest(loc)}"
    wanted = []
    for detail in details:
        word = detail.get("ctx", {}).get("expected") or _WANTED.get(detail["type"].split("_")[0])
        wanted.append(word or detail["msg"].removeprefix("Input should be "))
    wanted = list(dict.fromkeys(wanted))
    return f"must be {' or '.join(wanted)}, not {details[0]['input']!r}"


def _nearest(loc: Loc) -> str:
    model: type[BaseModel] = Dataset if loc[0] == "datasets" and len(loc) > 1 else Recipe
    near = _nearest_key(model, str(loc[-1]))
    return f"; did you mean {near}?" if near else ""


def _nearest_key(model: type[BaseModel], name: str) -> str | None:
    """The key that was meant; of two that are about as near, the one that begins the same."""
    near = difflib.get_close_matches(name, list(model.model_fields), n=5, cutoff=0.5)
    start = name.partition("_")[0]
    return next((n for n in near if n.partition("_")[0] == start), near[0] if near else None)


def _listed(name: str, problems: list[tuple[Loc, str]], where: Mapping[Loc, str]) -> str:
    """All problems as one message, in the order of the file."""
    order = {place: i for i, place in enumerate(where.values())}
    entries = []
    for loc, problem in problems:
        parents = (where[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in where)
        at = next(parents, "")
        text = f"{at}: " if at else ""
        entries.append((order.get(at, -1), f"{text}{'.'.join(map(str, loc))}: {problem}"))
    lines = [text for _, text in sorted(entries, key=lambda entry: entry[0])]
    if len(lines) == 1:
        return f"{name}, {lines[0]}"
    return "\n  ".join([f"{name} has {len(lines)} problems:", *lines])


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"
