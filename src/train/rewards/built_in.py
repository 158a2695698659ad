"""Rewards by name: exact match, a regular expression, a format, a length.

Each is called as TRL calls reward functions: with the completions, and one list for every field of
the rows; it returns one number per completion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from ...errors import DataError, RecipeError
from ..printable import printable
from ..recipe.keys.row_types import is_function, reward_problem
from ..recipe.preferences import preference_settings
from ..recipe.recipe import Recipe
from ..user_functions import load_function

Generated = str | Sequence[dict[str, Any]]
"""A completion: text, or messages where the prompt is messages."""


class Reward(Protocol):
    """A reward function."""

    @property
    def __name__(self) -> str:
        """The name in logs."""
        ...

    def __call__(self, completions: Sequence[Generated], **columns: Any) -> list[float | None]:
        """The reward of each completion; None: it is not judged."""
        ...


def text_of(completion: Generated) -> str:
    """The text of a completion; of messages, that of the last one."""
    if isinstance(completion, str):
        return completion
    return str(completion[-1].get("content") or "") if completion else ""


@dataclass(frozen=True)
class ExactMatch:
    """1 for a completion that is the right answer, in the row's ``field``, 0 for any other.

    Case and surrounding white space do not count. Of a completion with ``<answer>`` marks, what is
    between the last ones is compared; of a right answer with ``####``, as GSM8K has it, what comes
    after that.
    """

    field: str = "answer"
    __name__ = "exact_match"

    def __call__(self, completions: Sequence[Generated], **columns: Any) -> list[float | None]:
        """1 or 0 for each completion; None for a row without an answer."""
        right = columns[self.field]
        return [
            None if r is None else float(_answer(text_of(c)) == _plain(str(r).split("####")[-1]))
            for c, r in zip(completions, right, strict=True)
        ]


@dataclass(frozen=True)
class Matches:
    """1 for a completion in which ``pattern`` is found, 0 for others; a dot matches line breaks."""

    pattern: str
    __name__ = "regex"

    def __call__(self, completions: Sequence[Generated], **columns: Any) -> list[float | None]:
        """1 or 0 for each completion."""
        expression = re.compile(self.pattern, re.DOTALL)
        return [float(expression.search(text_of(c)) is not None) for c in completions]


@dataclass(frozen=True)
class Tagged:
    """How far a completion consists of the tagged parts, such as ``<think>...</think>``, in order.

    1 if it is exactly that, each part once, in order, and with something in it. Otherwise 0.5 times
    the fraction of marks that are there once, so that there is something to learn from.
    """

    tags: tuple[str, ...] = ("think", "answer")
    __name__ = "format"

    def __call__(self, completions: Sequence[Generated], **columns: Any) -> list[float | None]:
        """From 0 to 1 for each completion."""
        whole = re.compile(
            r"\s*".join(rf"<{t}>(.*?)</{t}>" for t in map(re.escape, self.tags)), re.S
        )
        return [self._reward(text_of(c).strip(), whole) for c in completions]

    def _reward(self, text: str, whole: re.Pattern[str]) -> float:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        once = sum(text.count(mark) == 1 for mark in marks)
        match = whole.fullmatch(text)
        if match and once == len(marks) and all(part.strip() for part in match.groups()):
            return 1.0
        return 0.5 * once / len(marks)


@dataclass(frozen=True)
class TokenCount:
    """1 for ``least`` to ``most`` tokens, less the further a completion is from that, down to 0."""

    most: int
    least: int = 0
    __name__ = "length"

    def __call__(self, completions: Sequence[Generated], **columns: Any) -> list[float | None]:
        """From 0 to 1 for each completion, by the number of its tokens (``completion_ids``)."""
        if "completion_ids" not in columns:
            raise DataError("the reward length needs the tokens of completions (completion_ids)")
        return [self._reward(len(ids)) for ids in columns["completion_ids"]]

    def _reward(self, count: int) -> float:
        off = max(count - self.most, self.least - count, 0)
        return max(0.0, 1.0 - off / self.most)


def built_in(name: str) -> Reward:
    """The reward of a name in a recipe, e.g. ``exact_match`` or ``length:200``.

    Raises:
        RecipeError: there is none, or what comes after the colon is not right.
    """
    if (problem := reward_problem(name)) is not None:
        raise RecipeError(f"trl.reward_funcs: {problem}")
    kind, _, argument = name.partition(":")
    match kind:
        case "exact_match":
            return ExactMatch(argument.strip() or "answer")
        case "regex":
            return Matches(argument)
        case "format":
            tags = tuple(tag.strip() for tag in argument.split(",") if tag.strip())
            return Tagged(tags) if tags else Tagged()
        case "length":
            least, _, most = argument.rpartition("-")
            return TokenCount(int(most), int(least or 0))
    raise RecipeError(f"trl.reward_funcs: {name!r} is a function, not a reward of that name")


def _answer(text: str) -> str:
    marked = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    return _plain(marked[-1] if marked else text)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


# --- the rewards of a recipe ----------------------------------------------------------------------


def rewards_of(recipe: Recipe) -> list[Reward]:
    """The rewards of a checked recipe, in its order.

    Raises:
        RecipeError: the recipe has no rewards, a function cannot be imported, or the caller does
            not allow it.
    """
    settings = preference_settings(recipe)
    names = () if settings is None else settings.reward_functions
    rewards: list[Any] = []
    for i, name in enumerate(names):
        if is_function(name):
            rewards.append(load_function(name, f"trl.reward_funcs.{i}", recipe.consent))
        else:
            rewards.append(built_in(name))
    return cast("list[Reward]", rewards)


# --- completions to look at, with their rewards ---------------------------------------------------


FEW = 4
"""Completions of a generation that are shown by default."""

_LONGEST = 2_000
"""Characters of a text that are kept."""

Shown = dict[str, Any]
"""``step``, ``prompt``, ``completion``, ``rewards`` by their names, and ``advantage``."""


def shown(generated: Mapping[str, Any], step: int, each: int, most: int | None) -> list[Shown]:
    """Some completions of a generation, of as many prompts as there are.

    ``generated`` has ``prompt``, ``completion`` and ``advantages`` of each, and ``rewards`` by
    name, with ``each`` completions of a prompt; ``most`` are shown, None: a few.
    """
    prompts, completions = list(generated["prompt"]), list(generated["completion"])
    advantages = list(generated["advantages"])
    rewards = {name: list(values) for name, values in generated["rewards"].items()}
    order = sorted(range(len(prompts)), key=lambda i: (i % each, i))[: most or FEW]
    return [
        {
            "step": step,
            "prompt": _cut(_prompt(prompts[i])),
            "completion": _cut(text_of(completions[i])),
            "rewards": {name: values[i] for name, values in rewards.items()},
            "advantage": advantages[i],
        }
        for i in sorted(order)
    ]


def _prompt(prompt: Any) -> str:
    """The text of a prompt; of messages, with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m.get('role', '')}: {m.get('content') or ''}" for m in prompt)


def _cut(text: str) -> str:
    """The beginning of a text; a model also writes characters that no JSON may hold."""
    return printable(text if len(text) <= _LONGEST else text[:_LONGEST] + " …")
