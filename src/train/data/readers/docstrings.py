r"""Builds the data of the examples, about the docstrings of the running Python's library.

Every public module, class, function and method of the standard library that documents itself
becomes one line of JSON, the answer laid out as ``help()`` prints it::

    {"messages": [{"role": "user", "content": "What does `json.dumps` do?"},
                  {"role": "assistant", "content": "Help on function dumps in json:\n..."}]}

There are two other forms of the same rows. ``pairs`` are preferences: the right answer against that
of another function, if possible of the same module, so that the question decides::

    {"messages": [{"role": "user", "content": "What does `json.dumps` do?"}],
     "chosen": {"role": "assistant", "content": "Help on function dumps in json:\n..."},
     "rejected": {"role": "assistant", "content": "Help on function load in json:\n..."}}

``prompts`` are the questions alone, with the first paragraph of the docstring for rewards to read::

    {"prompt": [{"role": "user", "content": "What does `json.dumps` do?"}],
     "answer": "Serialize ``obj`` to a JSON formatted ``str``."}

It is real text, it is on every machine that has Python, and the order is always the same. Recipes
have it as ``path: fusewright:docstrings``, ``fusewright:docstring_pairs`` and
``fusewright:docstring_prompts`` (see ``user_functions``). By hand::

    python src/train/data/readers/docstrings.py rows.jsonl [chats | pairs | prompts]
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

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


class Documented(NamedTuple):
    """Something with its own docstring.

    Attributes:
        kind: ``module``, ``class`` or ``function``.
        answer: the output of ``help()``.
        summary: the first paragraph of the docstring, on one line.
    """

    module: str
    kind: str
    question: str
    answer: str
    summary: str


def documented() -> Iterator[Documented]:
    """Yield everything with a docstring; of things with the same one, the first."""
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
            owner, _, attribute = dotted.rpartition(".")
            lines = [f"Help on {kind} {attribute}{f' in {owner}' if owner else ''}:", ""]
            if kind != "module":
                lines.append(headline(kind, attribute, thing))
            answer = "\n".join([*lines, textwrap.indent(text, "    ")])
            summary = " ".join(text.split("\n\n")[0].split())
            yield Documented(name, kind, ask[kind].format(dotted), answer, summary)


def message(role: str, content: str) -> dict[str, str]:
    """A message of a chat."""
    return {"role": role, "content": content}


def chats() -> Iterator[dict[str, Any]]:
    """Yield one chat per distinct docstring."""
    for one in documented():
        yield {"messages": [message("user", one.question), message("assistant", one.answer)]}


def _groups(one: Documented) -> tuple[tuple[str, ...], ...]:
    """The groups that it is in, the narrowest first."""
    return (one.module, one.kind), (one.module,), ()


def pairs() -> Iterator[dict[str, Any]]:
    """Yield one question per distinct docstring, with the right answer and another one's.

    The wrong answer is that of the next thing of the same kind in the same module, the first one
    coming after the last. So most answers are right once and wrong once: none is better by itself.
    Alone of its kind, a thing gets the next one of its module, or else the next one of all.
    """
    things = list(documented())
    groups: dict[tuple[str, ...], list[Documented]] = defaultdict(list)
    for one in things:
        for name in _groups(one):
            groups[name].append(one)
    for one in things:
        group = next(groups[name] for name in _groups(one) if len(groups[name]) > 1)
        other = group[(group.index(one) + 1) % len(group)]
        yield {
            "messages": [message("user", one.question)],
            "chosen": message("assistant", one.answer),
            "rejected": message("assistant", other.answer),
        }


def prompts() -> Iterator[dict[str, Any]]:
    """Yield one question per distinct docstring, with the first paragraph of that."""
    for one in documented():
        yield {"prompt": [message("user", one.question)], "answer": one.summary}


FORMS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "chats": chats,
    "pairs": pairs,
    "prompts": prompts,
}


def build(path: Path, form: str = "chats") -> int:
    """Write the JSONL file, whole or not at all, and return the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in FORMS[form]()]
    unfinished.write_text("".join(lines), encoding="utf-8")
    unfinished.replace(path)
    return len(lines)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or not FORMS.keys() >= set(sys.argv[2:]):
        sys.exit(f"usage: python docstrings.py FILE.jsonl [{' | '.join(FORMS)}]")
    warnings.simplefilter("ignore")  # deprecated modules are documented too
    print(f"{build(Path(sys.argv[1]), *sys.argv[2:])} rows -> {sys.argv[1]}")
