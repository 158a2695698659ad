r"""Builds the quickstart's data: a chat about the docstrings of the running Python's library.

Every public module, class, function and method of the standard library that documents itself
becomes one line of JSON, the answer laid out as ``help()`` prints it::

    {"messages": [{"role": "user", "content": "What does `json.dumps` do?"},
                  {"role": "assistant", "content": "Help on function dumps in json:\n..."}]}

It is real text, it is on every machine that has Python, and the order is always the same. Recipes
have it as ``path: fusewright:docstrings`` (see ``train/data/readers/package_rows.py``). By hand::

    python src/train/data/readers/docstrings.py rows.jsonl
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

SHORTEST, LONGEST = 40, 2000
"""Length limits of a docstring, in characters."""

SKIPPED = {"antigravity", "idlelib", "lib2to3", "test", "this", "tkinter", "turtle", "turtledemo"}
"""Modules that act when imported (a browser, a poem), need a screen, or are not libraries."""


def modules() -> Iterator[ModuleType]:
    """Yield the public modules of the standard library that import here, in name order."""
    for name in sorted(sys.stdlib_module_names - SKIPPED):
        if name.startswith("_"):
            continue
        try:
            yield importlib.import_module(name)
        except Exception:  # not built, or not for this system
            continue


def members(owner: Any, prefix: str, module: str) -> Iterator[tuple[str, str, Any]]:
    """Yield ``(dotted name, kind, object)`` of the public things that ``module`` itself defines."""
    for name, value in sorted(vars(owner).items()):
        if name.startswith("_"):
            continue
        dotted = f"{prefix}.{name}"
        value = getattr(value, "__func__", value)  # static and class methods
        if inspect.isclass(value) and value.__module__ == module:
            yield dotted, "class", value
            if owner is sys.modules[module]:
                yield from members(value, dotted, module)
        elif inspect.isroutine(value) and getattr(value, "__module__", module) in (module, None):
            yield dotted, "function", value


def headline(kind: str, name: str, thing: Any) -> str:
    """The line above a docstring in ``help()``: how to call it, or what it derives from."""
    if kind == "class":
        return f"class {name}({', '.join(base.__name__ for base in thing.__bases__)})"
    try:
        signature = str(inspect.signature(thing))
    except (TypeError, ValueError):  # written in C, and says nothing
        signature = "(...)"
    # addresses and sets in default values differ from run to run
    return name + ("(...)" if "0x" in signature or "{" in signature else signature)


def rows() -> Iterator[dict[str, Any]]:
    """Yield one chat per distinct docstring."""
    ask = {
        "module": "What is the module `{}` for?",
        "class": "What is `{}`?",
        "function": "What does `{}` do?",
    }
    seen: set[str] = set()
    for module in modules():
        name = module.__name__
        for dotted, kind, thing in [(name, "module", module), *members(module, name, name)]:
            text = getattr(thing, "__doc__", None)
            text = inspect.cleandoc(text).strip() if isinstance(text, str) else ""
            if not SHORTEST <= len(text) <= LONGEST or text in seen:
                continue
            seen.add(text)
            owner, _, own = dotted.rpartition(".")
            lines = [f"Help on {kind} {own}{f' in {owner}' if owner else ''}:", ""]
            if kind != "module":
                lines.append(headline(kind, own, thing))
            answer = "\n".join([*lines, textwrap.indent(text, "    ")])
            yield {
                "messages": [
                    {"role": "user", "content": ask[kind].format(dotted)},
                    {"role": "assistant", "content": answer},
                ]
            }


def build(path: Path) -> int:
    """Write the JSONL file, whole or not at all, and return the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows()]
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.replace(path)
    return len(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docstrings.py FILE.jsonl")
    warnings.simplefilter("ignore")  # deprecated modules are documented too
    print(f"{build(Path(sys.argv[1]))} rows -> {sys.argv[1]}")
