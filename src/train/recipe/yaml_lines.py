"""YAML as recipes are written in it, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError
from .problems import Loc


class _Loader(yaml.SafeLoader):
    """YAML 1.1, except that ``2e-4`` is a number (as in YAML 1.2 and in everyone's recipes)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


_MOST = 50_000
"""Most values in a recipe: aliases of aliases multiply, and a few lines could fill the memory."""


def parse_value(text: str) -> Any:
    """Read one value as a recipe would, e.g. ``"2e-4"`` or ``"[q_proj, v_proj]"``."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def read(path: Path) -> tuple[dict[str, Any], dict[Loc, int], list[tuple[Loc, str]]]:
    """Read a recipe's file, the line of every key and item, counted from 1, and repeated keys.

    Raises:
        RecipeError: it is not there, no text, no YAML, or no mapping.
    """
    text = _text(path)
    lines: dict[Loc, int] = {}
    loader = None
    try:
        loader = _Loader(text)  # raises, too: for characters that YAML does not have
        node = loader.get_single_node()
        repeated = list(_number(node, (), lines)) if node else []
        values = loader.construct_document(node) if node else {}
    except yaml.YAMLError as error:
        raise RecipeError(_not_yaml(path, error)) from None
    except RecursionError:
        problem = "a value contains itself, or is nested too deeply"
        raise RecipeError(f"{path}: not valid YAML: {problem}") from None
    except ValueError as error:  # a date that is none, or too many values
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        raise RecipeError(f"{path}: must hold keys and values, not {kind}")
    return values, lines, [(loc, "is given twice") for loc in repeated]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: file not found") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; name the recipe's YAML file") from None
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8; save it as a text file in UTF-8"
        raise RecipeError(f"{path}: cannot be read: {problem}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from None


def _not_yaml(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    at = f", line {mark.line + 1}" if mark else ""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    hint = ""
    if "\\t" in problem:
        hint = "; indent with spaces, not with tabs"
    elif "mapping values are not allowed" in problem:
        hint = "; put a text with a colon into quotes"
    return f"{path}{at}: not valid YAML: {problem}{hint}"


def _number(node: yaml.Node, loc: Loc, lines: dict[Loc, int]) -> Iterator[Loc]:
    """Fill ``lines`` for what is below ``node``; yield keys that come twice."""
    if len(lines) > _MOST:
        raise ValueError(f"with its aliases it holds more than {_MOST:,} values")
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
