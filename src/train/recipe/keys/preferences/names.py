"""The names that types of rows, and rewards, have in training on preferences."""

from __future__ import annotations

import re

from .....errors import did_you_mean, nearest

_FAMILIES = ("chatml", "llama3")
_OF_PAIRS = ("", ".intel", ".icr", ".argilla", ".argilla_chat", ".prompt_pairs", ".ultra")
_OF_LABELS = ("", ".intel", ".argilla", ".argilla_chat", ".prompt_pairs", ".ultra")

ROW_TYPES: dict[str, tuple[str, ...]] = {
    "pairs": (
        "chat_template", "chat_template.argilla", "chat_template.argilla_chat", "passthrough",
        *(family + kind for family in _FAMILIES for kind in _OF_PAIRS),
        "bradley_terry.chat_template", "bradley_terry.llama3.icr",
    ),
    "labelled": (
        "chat_template", "passthrough",
        *(family + kind for family in _FAMILIES for kind in _OF_LABELS),
    ),
    "prompts": ("chat_template", "passthrough"),
    "steps": ("stepwise_supervised",),
}  # fmt: skip
"""The types of rows, by what a row is, in Axolotl's names; each may also end in ``.default``."""

REWARDS = ("exact_match", "regex", "format", "length")
"""The rewards that need no code of the recipe's own."""

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+|.+\.py:[A-Za-z_]\w*")
_BOUNDS = re.compile(r"(\d+-)?\d+")


def plain_type(name: str) -> str:
    """The name of a type without ``.load`` or ``.default`` at its end."""
    return name.removesuffix(".load").removesuffix(".default")


def is_function(name: str) -> bool:
    """Whether a name has the form of a Python function's: ``module.function``, ``PATH.py:name``."""
    return name.partition(":")[0] not in REWARDS and _FUNCTION.fullmatch(name) is not None


def is_own_type(name: str, rows: str) -> bool:
    """Whether the type of a dataset is a Python function that changes its rows.

    Args:
        name: the type.
        rows: what the rows are, one of ``ROW_TYPES``.
    """
    known = ROW_TYPES[rows]
    plain = plain_type(name)
    family = plain.split(".")[0] in {n.split(".")[0] for n in known}
    if plain in known or plain == "user_defined" or family:
        return False
    return is_function(name) and not nearest(plain, known)


def type_problem(name: str, rows: str) -> str | None:
    """What is wrong with the type of a dataset; None: nothing.

    Args:
        name: the type.
        rows: what the rows are, one of ``ROW_TYPES``.
    """
    known = ROW_TYPES[rows]
    if plain_type(name) in known or is_own_type(name, rows):
        return None
    if plain_type(name) == "user_defined":
        return "write the type as keys (field_prompt, prompt_format, ...) instead of user_defined"
    hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
    return f"{name!r} is not a type of such rows; {hint}"


def reward_problem(name: str) -> str | None:
    """What is wrong with the name of a reward; None: nothing."""
    kind, colon, argument = name.partition(":")
    if kind == "regex":
        if not argument:
            return "needs a pattern: write regex:PATTERN"
        try:
            re.compile(argument)
        except re.error as error:
            return f"{argument!r} is not a regular expression: {error}"
    elif kind == "length":
        bounds = _BOUNDS.fullmatch(argument)
        low, _, high = argument.rpartition("-")
        if bounds is None or int(low or 0) > int(high) or int(high) == 0:
            return "needs a number of tokens: write length:MOST or length:LEAST-MOST"
    elif kind in REWARDS:
        if colon and not all(part.strip() for part in argument.split(",")):
            return f"has nothing after the colon: write {kind}, or {kind}:NAME"
    elif "/" in name and ".py:" not in name:
        return "a reward model cannot be named yet: use a Python function, as module.function"
    elif not is_function(name):
        hint = did_you_mean(kind, REWARDS) or f"there are {', '.join(REWARDS)}"
        return f"{name!r} is neither a reward ({hint}) nor a function, as module.function"
    return None
