"""Rewards as a run calls them: what is wrong with one has a message that names it."""

from __future__ import annotations

import inspect
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ...errors import DataError, FusewrightError, RewardError, first_line
from ..processes.world import World
from .built_in import ExactMatch

Judgement = list[float | None]


class Judge:
    """A reward, called as TRL calls it.

    One that fails, or returns what is no reward for each completion, gives 0 to all of them: other
    processes wait for the rewards of this one. ``require_rewards`` then raises in all of them.

    Attributes:
        failure: what went wrong; None: nothing so far.

    Args:
        reward: the function; if it takes no further arguments, it gets only those that it takes.
        key: where it is in the recipe.
        name: of its figures.
    """

    def __init__(self, reward: Callable[..., Any], key: str, name: str) -> None:
        self.reward, self.key, self.__name__ = reward, key, name
        self.failure: str | None = None
        self._takes = _named_arguments(reward)

    def __call__(self, **given: Any) -> Judgement:
        """The reward of each completion; None: it is not judged."""
        try:
            found = self.reward(**self._taken(given))
        except Exception as error:  # whatever the function does
            return self._failed(error, given)
        return self._checked(found, given)

    def _taken(self, given: dict[str, Any]) -> dict[str, Any]:
        if self._takes is None:
            return given
        return {name: value for name, value in given.items() if name in self._takes}

    def _failed(self, error: Exception, given: dict[str, Any]) -> Judgement:
        if isinstance(error, FusewrightError):
            said = str(error)
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            said = f"raised {type(error).__name__} at {where}: {first_line(error)}"
        return self._refused(said, given)

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
        return rewards

    def _refused(self, said: str, given: dict[str, Any]) -> Judgement:
        self.failure = f"{self.key}: the reward {self.__name__} {said}"
        return [0.0] * len(given["completions"])


class AsyncJudge(Judge):
    """The same for a coroutine function."""

    async def __call__(self, **given: Any) -> Judgement:  # type: ignore[override]  # 2026-11-27: awaited by TRL
        """The reward of each completion; None: it is not judged."""
        try:
            found = await self.reward(**self._taken(given))
        except Exception as error:  # whatever the function does
            return self._failed(error, given)
        return self._checked(found, given)


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


def require_columns(rewards: Iterable[Callable[..., Any]], columns: Iterable[str]) -> None:
    """See that rows have the field of the right answer, where a reward compares with it.

    Raises:
        DataError: none has it.
    """
    there = set(columns)
    for reward in rewards:
        if isinstance(reward, ExactMatch) and reward.field not in there:
            raise DataError(reward.without_field())


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


def _named_arguments(reward: Callable[..., Any]) -> set[str] | None:
    """The arguments that a function takes; None: any."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # a builtin's are not known
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
