"""Calling rewards in a run, with messages that name the one that fails."""

from __future__ import annotations

import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError, FusewrightError, RewardError
from ..processes.world import World
from ..user_functions import what_failed
from .built_in import ExactMatch

Judgement = list[float | None]

REWARD_ARGUMENTS = (
    "prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra",
    "log_metric",
)  # fmt: skip
"""The arguments of rewards besides the fields of rows; with completions, one item each."""

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Judge:
    """A reward, called as TRL calls it; with fewer arguments if it takes no further ones.

    One that fails, or does not return a reward for each completion, gives 0 to all of them: other
    processes wait for the rewards of this one. ``require_rewards`` then raises in all of them.

    Attributes:
        failure: what went wrong; None: nothing so far.
        silence: ``"None"`` or ``"NaN"`` if it last judged no completion; None: it judged some.
    """

    def __init__(self, reward: Callable[..., Any], key: str, name: str) -> None:
        self.reward, self.key, self.__name__ = reward, key, name
        self.failure: str | None = None
        self.silence: str | None = None
        self._takes = _named_arguments(reward)

    def __call__(self, **kwargs: Any) -> Judgement:
        """The reward of each completion; None: it is not judged."""
        try:
            return self._checked(self.reward(**self._accepted(kwargs)), kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the function does, sys.exit() among it
            return self._failed(error, kwargs)

    def _accepted(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if problem := without_columns(self.reward, kwargs):
            raise DataError(f"the reward {self.__name__} {problem}")
        if self._takes is None:
            return kwargs
        return {name: value for name, value in kwargs.items() if name in self._takes}

    def _failed(self, error: BaseException, kwargs: dict[str, Any]) -> Judgement:
        if not isinstance(error, FusewrightError):
            return self._refused(what_failed(error, self.reward), kwargs)
        self.failure = f"{self.key}: {error}"
        return [0.0] * len(kwargs["completions"])

    def _checked(self, result: Any, kwargs: dict[str, Any]) -> Judgement:
        count = len(kwargs["completions"])
        if isinstance(result, str | bytes) or not hasattr(result, "__iter__"):
            problem = f"returned a {type(result).__name__}, not a list with one number each"
            return self._refused(problem, kwargs)
        values = list(result)
        if len(values) != count:
            problem = f"returned {len(values)} rewards for {count} completions, not one each"
            return self._refused(problem, kwargs)
        rewards: Judgement = []
        for value in values:
            try:
                rewards.append(None if value is None else float(value))
            except (TypeError, ValueError, RuntimeError):
                problem = f"returned {value!r:.60} as a reward, which is not a number"
                return self._refused(problem, kwargs)
        if any(r is not None and math.isinf(r) for r in rewards):
            return self._refused("returned an infinite reward", kwargs)
        nothing = all(r is None or math.isnan(r) for r in rewards)
        self.silence = ("None" if None in rewards else "NaN") if nothing else None
        return rewards

    def _refused(self, problem: str, kwargs: dict[str, Any]) -> Judgement:
        self.failure = f"{self.key}: the reward {self.__name__} {problem}"
        return [0.0] * len(kwargs["completions"])


class AsyncJudge(Judge):
    """A reward that is a coroutine function."""

    async def __call__(self, **kwargs: Any) -> Judgement:  # type: ignore[override]  # 2026-11-27: awaited by TRL
        """The reward of each completion; None: it is not judged."""
        try:
            return self._checked(await self.reward(**self._accepted(kwargs)), kwargs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever the function does, sys.exit() among it
            return self._failed(error, kwargs)


def judges(rewards: Sequence[Callable[..., Any]]) -> list[Judge]:
    """The rewards of a recipe, in its order, each with a unique name."""
    names = [str(getattr(r, "__name__", type(r).__name__)) for r in rewards]
    often = Counter(names)
    result = []
    for i, (reward, name) in enumerate(zip(rewards, names, strict=True)):
        kind = AsyncJudge if _is_async(reward) else Judge
        unique = f"{name}_{i + 1}" if often[name] > 1 else name
        result.append(kind(reward, f"trl.reward_funcs.{i}", unique))
    return result


def require_columns(rewards: Sequence[Callable[..., Any]], columns: Iterable[str]) -> None:
    """Raise DataError if rows lack a field that a reward needs, of the answer or as an argument.

    ``columns`` are the fields besides the prompt.
    """
    arguments = [*REWARD_ARGUMENTS, *columns]
    for i, reward in enumerate(rewards):
        if problem := without_columns(reward, arguments):
            name = getattr(reward, "__name__", type(reward).__name__)
            raise DataError(f"trl.reward_funcs.{i}: the reward {name} {problem}")


def without_columns(reward: Callable[..., Any], kwargs: Iterable[str]) -> str | None:
    """The message where ``kwargs`` lacks an argument that a reward needs; None: it has all."""
    arguments = list(kwargs)
    missing = [name for name in _needed_arguments(reward) if name not in arguments]
    columns = [repr(name) for name in arguments if name not in REWARD_ARGUMENTS]
    has = f"rows have {', '.join(columns)}" if columns else "rows have only a prompt"
    if isinstance(reward, ExactMatch) and reward.field not in arguments:
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


def require_rewards(judges: Iterable[Judge], world: World) -> None:
    """Raise the same RewardError in all processes if a reward has failed in any; a collective."""
    failure = next((judge.failure for judge in judges if judge.failure is not None), None)
    message = next(filter(None, world.gather(failure)), None)
    if message is not None:
        raise RewardError(message)


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


# --- where nothing is learnt: completions without rewards, and rewards that are equal -------------


SEVERAL = 5
"""Logged steps after which equal rewards are reported."""


def require_judged(judges: Sequence[Judge], rewards: Tensor, world: World) -> None:
    """Raise the same RewardError in all processes if no completion has a reward; a collective.

    ``rewards`` are those of all processes, (completions, judges); NaN: not judged.
    """
    if not len(rewards) or not bool(rewards.isnan().all()):
        return
    silent = world.gather([judge.silence for judge in judges])[0]
    key = judges[0].key if len(judges) == 1 else "trl.reward_funcs"
    reasons = " and ".join(
        f"the reward {judge.__name__} returned {what}"
        for judge, what in zip(judges, silent, strict=True)
    )
    hint = "; NaN often comes from 0 divided by 0" if "NaN" in silent else ""
    raise RewardError(
        f"{key}: {reasons} for all {len(rewards)} completions, from which nothing can be learnt; "
        f"return a number for each completion that the reward applies to{hint}"
    )


class RewardWatch:
    """Reports once where training learns nothing from some completions, or from all of them.

    ``names`` are those of the rewards; a prompt has ``each`` completions.
    """

    def __init__(self, names: Sequence[str], each: int, say: Callable[[str], None]) -> None:
        self.names, self.each, self.say = names, each, say
        self.equal, self.logs, self.complete = True, 0, True
        self.least, self.most = ([sign * torch.inf] * len(names) for sign in (1, -1))

    def judged(self, rewards: Tensor, step: int) -> None:
        """Take in rewards that are trained at ``step``, (completions, rewards); NaN: not judged.

        Those of a prompt are consecutive.
        """
        unjudged = int(rewards.isnan().all(dim=1).sum())
        if unjudged and self.complete:
            self.complete = False
            self.say(
                f"warning: step {step}: no reward judged {unjudged} of {len(rewards)} completions "
                "(None or NaN); nothing is learnt from such completions"
            )
        groups = rewards.cpu().reshape(-1, self.each, len(self.names))
        least = groups.nan_to_num(nan=torch.inf).amin(dim=1)
        most = groups.nan_to_num(nan=-torch.inf).amax(dim=1)
        self.equal = self.equal and not bool((most > least).any())
        self.least = list(map(min, self.least, least.amin(dim=0).tolist()))
        self.most = list(map(max, self.most, most.amax(dim=0).tolist()))

    def logged(self, last: bool) -> None:
        """Note a logged step, after which no other follows if ``last``."""
        self.logs += 1
        if self.equal and (self.logs == SEVERAL or (last and self.logs < SEVERAL)):
            steps = "the only logged step" if self.logs == 1 else f"{self.logs} logged steps"
            self.say(
                f"warning: in {steps}, all completions of a prompt had the same reward, and "
                f"nothing is learnt from equal rewards: {self._which()}; use rewards that tell "
                "completions apart, or more and more varied completions (trl.num_generations, "
                "trl.temperature)"
            )

    def _which(self) -> str:
        return ", ".join(
            f"{name} "
            + (f"gave {least:.4g} to all" if least == most else "did not tell them apart")
            for name, least, most in zip(self.names, self.least, self.most, strict=True)
            if least <= most  # else it judged none
        )


@contextmanager
def without_trls_lines() -> Iterator[None]:
    """Suppress TRL's line about completions without a reward: ``RewardWatch`` reports them."""
    logger = logging.getLogger("trl.trainer.grpo_trainer")

    def is_other(record: logging.LogRecord) -> bool:
        return "All reward functions returned None" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


# --- the figures of completions -------------------------------------------------------------------


def reward_figures(
    sets: Mapping[str, Tensor], names: Sequence[str], weights: Tensor
) -> dict[str, float]:
    """The figures of the completions of validation prompts.

    ``sets`` has the rewards of each dataset, (completions, rewards), NaN: not judged; ``weights``
    is (rewards,).

    Returns:
        ``eval_reward`` and ``eval_reward_std`` of the weighted sums, ``eval_rewards/NAME/mean`` of
        each reward; and, of several datasets, ``eval_NAME_reward`` each.
    """
    everything = torch.cat(list(sets.values())).cpu().double()
    weights = weights.cpu().double()
    total = _total(everything, weights)
    judged = total[~total.isnan()]
    figures = {"eval_reward": _mean(total), "eval_reward_std": float(judged.std(correction=0))}
    for i, name in enumerate(names):
        figures[f"eval_rewards/{name}/mean"] = _mean(everything[:, i])
    if len(sets) > 1:
        for name, values in sets.items():
            figures[f"eval_{name}_reward"] = _mean(_total(values.cpu().double(), weights))
    return figures


def means(measured: Mapping[str, Sequence[float]], sizes: Sequence[int]) -> dict[str, float]:
    """The means of batches' figures, weighted by the completions of each batch; NaN is left out.

    A figure that was not measured once for each batch is not weighted.
    """
    figures = {}
    for name, values in measured.items():
        weights = sizes if len(values) == len(sizes) else [1] * len(values)
        parts = [(v, n) for v, n in zip(values, weights, strict=True) if not math.isnan(v)]
        if parts:
            figures[name] = sum(v * n for v, n in parts) / sum(n for _, n in parts)
    return figures


def _total(rewards: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the rewards of each completion; NaN where no reward has judged it."""
    total = (rewards * weights).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = math.nan
    return total


def _mean(values: Tensor) -> float:
    return float(values.nanmean())
