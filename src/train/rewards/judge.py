"""Rewards as a run calls them: what is wrong with one has a message that names it."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ...errors import DataError, FusewrightError, RewardError
from ..own_functions import what_failed
from ..processes.world import World
from .built_in import ExactMatch

Judgement = list[float | None]

GIVEN = (
    "prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra",
    "log_metric",
)  # fmt: skip
"""What rewards are called with besides the fields of rows; with completions, one item each."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Judge:
    """A reward, called as TRL calls it.

    One that fails, or returns what is no reward for each completion, gives 0 to all of them: other
    processes wait for the rewards of this one. ``require_rewards`` then raises in all of them.

    Attributes:
        failure: what went wrong; None: nothing so far.
        silence: ``"None"`` or ``"NaN"`` if it last judged no completion; None: it judged some.

    Args:
        reward: the function; if it takes no further arguments, it gets only those that it takes.
        key: where it is in the recipe.
        name: of its figures.
    """

    def __init__(self, reward: Callable[..., Any], key: str, name: str) -> None:
        self.reward, self.key, self.__name__ = reward, key, name
        self.failure: str | None = None
        self.silence: str | None = None
        self._takes = _named_arguments(reward)

    def __call__(self, **given: Any) -> Judgement:
        """The reward of each completion; None: it is not judged."""
        try:
            return self._checked(self.reward(**self._taken(given)), given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the function does, sys.exit() among it
            return self._failed(error, given)

    def _taken(self, given: dict[str, Any]) -> dict[str, Any]:
        if said := without_columns(self.reward, given):
            raise DataError(f"the reward {self.__name__} {said}")
        if self._takes is None:
            return given
        return {name: value for name, value in given.items() if name in self._takes}

    def _failed(self, error: BaseException, given: dict[str, Any]) -> Judgement:
        if not isinstance(error, FusewrightError):
            return self._refused(what_failed(error, self.reward), given)
        self.failure = f"{self.key}: {error}"
        return [0.0] * len(given["completions"])

    def _checked(self, found: Any, given: dict[str, Any]) -> Judgement:
        count = len(given["completions"])
        if isinstance(found, str | bytes) or not hasattr(found, "__iter__"):
            said = f"returned a {type(found).__name__}, not a list with one number each"
            return self._refused(said, given)
        values = list(found)
        if len(values) != count:
            said = f"returned {len(values)} rewards for {count} completions, not one each"
            return self._refused(said, given)
        rewards: Judgement = []
        for value in values:
            try:
                rewards.append(None if value is None else float(value))
            except (TypeError, ValueError, RuntimeError):
                said = f"returned {value!r:.60} as a reward, which is not a number"
                return self._refused(said, given)
        if any(r is not None and math.isinf(r) for r in rewards):
            return self._refused("returned an infinite reward", given)
        nothing = all(r is None or math.isnan(r) for r in rewards)
        self.silence = ("None" if None in rewards else "NaN") if nothing else None
        return rewards

    def _refused(self, said: str, given: dict[str, Any]) -> Judgement:
        self.failure = f"{self.key}: the reward {self.__name__} {said}"
        return [0.0] * len(given["completions"])


class AsyncJudge(Judge):
    """The same for a coroutine function."""

    async def __call__(self, **given: Any) -> Judgement:  # type: ignore[override]  # 2026-11-27: awaited by TRL
        """The reward of each completion; None: it is not judged."""
        try:
            return self._checked(await self.reward(**self._taken(given)), given)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the function does, sys.exit() among it
            return self._failed(error, given)


def judges(rewards: Sequence[Callable[..., Any]]) -> list[Judge]:
    """The rewards of a recipe, in its order, each with a name of its own."""
    names = [str(getattr(r, "__name__", type(r).__name__)) for r in rewards]
    often = Counter(names)
    found = []
    for i, (reward, name) in enumerate(zip(rewards, names, strict=True)):
        kind = AsyncJudge if _is_async(reward) else Judge
        own = f"{name}_{i + 1}" if often[name] > 1 else name
        found.append(kind(reward, f"trl.reward_funcs.{i}", own))
    return found


def require_columns(rewards: Sequence[Callable[..., Any]], columns: Iterable[str]) -> None:
    """See that rows have the fields that rewards need: of the right answer, or as arguments.

    Args:
        rewards: the functions of a recipe, in its order.
        columns: the fields of rows besides the prompt.

    Raises:
        DataError: none has one of them.
    """
    there = [*GIVEN, *columns]
    for i, reward in enumerate(rewards):
        if said := without_columns(reward, there):
            name = getattr(reward, "__name__", type(reward).__name__)
            raise DataError(f"trl.reward_funcs.{i}: the reward {name} {said}")


def without_columns(reward: Callable[..., Any], given: Iterable[str]) -> str | None:
    """What to say where rows lack a field that a reward needs; None: they have all.

    Args:
        reward: the function.
        given: the names of what it would be called with.
    """
    there = list(given)
    missing = [name for name in _needed_arguments(reward) if name not in there]
    columns = [repr(name) for name in there if name not in GIVEN]
    has = f"rows have {', '.join(columns)}" if columns else "rows have only a prompt"
    if isinstance(reward, ExactMatch) and reward.field not in there:
        return (
            f"needs the field {reward.field!r} with the right answer, and no row has it ({has}); "
            "name another field with exact_match:FIELD"
        )
    if not missing:
        return None
    return (
        f"needs the argument {missing[0]!r}, and no row has a field of that name ({has}); rename "
        "one of them, or give the argument a default"
    )


def require_rewards(found: Iterable[Judge], world: World) -> None:
    """See that no reward has failed, in any process; a collective.

    Raises:
        RewardError: one has; the message is the same in all processes.
    """
    own = next((judge.failure for judge in found if judge.failure is not None), None)
    said = next(filter(None, world.gather(own)), None)
    if said is not None:
        raise RewardError(said)


def _is_async(reward: Callable[..., Any]) -> bool:
    call = getattr(reward, "__call__", None)  # noqa: B004  # of an object, not whether it has one
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(call)


def _needed_arguments(reward: Callable[..., Any]) -> list[str]:
    """The arguments that a function cannot be called without."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # a builtin's are not known
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind in _NAMED]


def _named_arguments(reward: Callable[..., Any]) -> set[str] | None:
    """The arguments that a function takes; None: any."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # a builtin's are not known
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
