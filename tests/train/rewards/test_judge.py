"""Rewards as a run calls them: their arguments, what they return, and the figures of it."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fusewright.errors import DataError, RewardError
from fusewright.train.processes.world import World
from fusewright.train.rewards.built_in import built_in, shown
from fusewright.train.rewards.judge import (
    AsyncJudge,
    judges,
    means,
    require_columns,
    require_rewards,
    reward_figures,
)

REWARD_ARGUMENTS: dict[str, Any] = {
    "prompts": ["a", "b"],
    "completions": ["x", "y"],
    "answer": ["x", "z"],
}


def test_a_function_gets_the_arguments_that_it_takes() -> None:
    def few(completions: list[str]) -> list[float]:
        return [float(len(c)) for c in completions]

    def all_of_them(**given: Any) -> list[float]:
        return [float(len(given))] * 2

    named, everything = judges([few, all_of_them])
    assert named(**REWARD_ARGUMENTS) == [1.0, 1.0]
    assert everything(**REWARD_ARGUMENTS) == [3.0, 3.0]
    require_rewards([named, everything], World())


def test_what_counts_as_a_number() -> None:
    (judge,) = judges([lambda completions: [None, torch.tensor(2)]])
    assert judge(**REWARD_ARGUMENTS) == [None, 2.0]
    (judge,) = judges([lambda completions: torch.tensor([True, False])])
    assert judge(**REWARD_ARGUMENTS) == [1.0, 0.0]
    (judge,) = judges([lambda completions: (x for x in (math.nan, 1))])
    assert str(judge(**REWARD_ARGUMENTS)) == "[nan, 1.0]"


def test_names_are_different() -> None:
    found = judges([built_in("regex:a"), built_in("exact_match"), built_in("regex:b")])
    assert [judge.__name__ for judge in found] == ["regex_1", "exact_match", "regex_3"]
    assert [judge.key for judge in found] == [f"trl.reward_funcs.{i}" for i in range(3)]


def test_coroutines_are_awaited() -> None:
    async def later(completions: list[str], **columns: Any) -> list[float]:
        return [1.0, 2.0]

    async def never(completions: list[str], **columns: Any) -> list[float]:
        raise OSError("no connection")

    good, bad = judges([later, never])
    assert isinstance(good, AsyncJudge)
    assert asyncio.run(good(**REWARD_ARGUMENTS)) == [1.0, 2.0]
    assert asyncio.run(bad(**REWARD_ARGUMENTS)) == [0.0, 0.0]
    with pytest.raises(
        RewardError, match=r"reward_funcs.1: the reward never raised OSError at test"
    ):
        require_rewards([good, bad], World())


def test_the_words_of_our_own_errors_are_kept() -> None:
    found = judges([built_in("exact_match:solution")])
    assert found[0](**REWARD_ARGUMENTS) == [0.0, 0.0]
    said = (
        "^trl.reward_funcs.0: the reward exact_match needs the field 'solution' with the right "
        r"answer, and no row has it \(rows have 'answer'\)"
    )
    with pytest.raises(RewardError, match=said):
        require_rewards(found, World())
    with pytest.raises(DataError, match="needs the field 'solution'"):
        require_columns([built_in("exact_match:solution")], ["answer"])
    require_columns([built_in("exact_match"), built_in("format")], ["answer"])


def test_a_function_cannot_end_the_run() -> None:
    class OddError(BaseException):
        pass

    def ends(completions: list[str]) -> list[float]:
        sys.exit(0)

    def odd(completions: list[str]) -> list[float]:
        raise OddError("of its own")

    def late(completions: list[str]) -> Iterator[float]:
        yield 1.0
        raise KeyError("answer")

    async def ends_later(completions: list[str]) -> list[float]:
        sys.exit()

    def stopped(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    line = ends.__code__.co_firstlineno + 1
    for reward, said in (
        (ends, rf"the reward ends called sys.exit\(0\) at test_judge.py:{line}$"),
        (odd, "the reward odd raised OddError at test_judge.py:.*: of its own"),
        (late, "the reward late raised KeyError at test_judge.py:.*: 'answer'"),
        (ends_later, r"the reward ends_later called sys.exit\(\) at test_judge.py:"),
    ):
        (judge,) = judges([reward])
        found: Any = judge(**REWARD_ARGUMENTS)
        assert (asyncio.run(found) if isinstance(judge, AsyncJudge) else found) == [0.0, 0.0]
        with pytest.raises(RewardError, match=said):
            require_rewards([judge], World())
    with pytest.raises(KeyboardInterrupt):
        judges([stopped])[0](**REWARD_ARGUMENTS)


def test_the_line_is_that_of_the_function_itself() -> None:
    def reads(completions: list[str]) -> list[float]:
        return [json.loads(c)["x"] for c in completions]

    class Reads:
        def __call__(self, completions: list[str]) -> list[float]:
            return reads(completions)

    line = reads.__code__.co_firstlineno + 1
    for reward in (reads, Reads(), functools.partial(reads)):
        (judge,) = judges([reward])
        judge(**REWARD_ARGUMENTS)
        with pytest.raises(RewardError, match=f"JSONDecodeError at test_judge.py:{line}: Expect"):
            require_rewards([judge], World())


def test_an_argument_that_no_row_has() -> None:
    def needs(completions: list[str], solution: list[str], other: int = 0) -> list[float]:
        return [1.0] * len(completions)

    said = (
        "^trl.reward_funcs.0: the reward needs needs the argument 'solution', and no row has a "
        r"field of that name \(rows have 'answer'\)"
    )
    (judge,) = judges([needs])
    judge(**REWARD_ARGUMENTS)
    with pytest.raises(RewardError, match=said):
        require_rewards([judge], World())
    with pytest.raises(DataError, match=said):
        require_columns([needs], ["answer"])
    require_columns([needs], ["answer", "solution"])


def test_figures_leave_out_what_is_not_judged() -> None:
    nan = math.nan
    one = torch.tensor([[1.0, nan], [0.0, 2.0], [nan, nan]])
    other = torch.tensor([[1.0, 1.0]])
    found = reward_figures({"a": one, "b": other}, ["x", "y"], torch.tensor([1.0, 0.5]))
    assert found["eval_reward"] == pytest.approx((1.0 + 1.0 + 1.5) / 3)
    assert found["eval_a_reward"] == pytest.approx(1.0)
    assert found["eval_b_reward"] == pytest.approx(1.5)
    assert found["eval_rewards/x/mean"] == pytest.approx(2 / 3)
    assert found["eval_rewards/y/mean"] == pytest.approx(1.5)
    assert found["eval_reward_std"] == pytest.approx(0.2357, abs=1e-4)
    assert "eval_a_reward" not in reward_figures({"a": one}, ["x", "y"], torch.ones(2))


def test_means_weigh_batches_by_their_sizes() -> None:
    measured = {"kl": [1.0, 4.0], "other": [3.0], "entropy": [math.nan, 2.0], "none": [math.nan]}
    assert means(measured, [2, 1]) == {"kl": 2.0, "other": 3.0, "entropy": 2.0}


def test_completions_to_look_at_are_of_several_prompts() -> None:
    generated = {
        "prompt": [[{"role": "user", "content": "a"}]] * 2 + ["b"] * 2,
        "completion": [[{"role": "assistant", "content": "x\x00"}], "y", "z" * 3000, "w"],
        "rewards": {"r": [0.0, 1.0, 2.0, 3.0]}, "advantages": [0.1, 0.2, 0.3, 0.4],
    }  # fmt: skip
    found = shown(generated, 7, each=2, most=2)
    assert [entry["prompt"] for entry in found] == ["user: a", "b"]
    assert found[0] == {
        "step": 7, "prompt": "user: a", "completion": "x\ufffd", "rewards": {"r": 0.0},
        "advantage": 0.1,
    }  # fmt: skip
    assert len(found[1]["completion"]) < 2100
    assert len(shown(generated, 7, each=2, most=None)) == 4
