"""Rewards by name, and functions that a recipe names."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import DataError, RecipeError
from fusewright.train.consent import Consent
from fusewright.train.recipe.keys.row_types import REWARDS, reward_problem
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.rewards.built_in import built_in, rewards_of
from fusewright.train.user_functions import load_function

ALLOWED = Consent(allow_code=True)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Paris", "Paris", 1.0),
        (" paris \n", "Paris", 1.0),
        ("It is Paris", "Paris", 0.0),
        ("<think>Rome?</think><answer>\nParis</answer>", "Paris", 1.0),
        ("<answer>Rome</answer> no: <answer>Paris</answer>", "Paris", 1.0),
        ("72", "He has 48 and 24.\n#### 72", 1.0),
        ("72", 72, 1.0),
        ("", "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_exact_match(completion: str, answer: Any, reward: float | None) -> None:
    judge = built_in("exact_match")
    assert judge([completion, said(completion)], answer=[answer] * 2) == [reward] * 2


def test_exact_match_reads_the_field_that_is_named() -> None:
    assert built_in("exact_match:right")(["a"], right=["a"], answer=["b"]) == [1.0]


def test_regex() -> None:
    judge = built_in(r"regex:^The end: \d+$")
    assert judge(["The end: 12", "The end: x", "a\nThe end: 1"]) == [1.0, 0.0, 0.0]
    assert built_in("regex:a.*b")([said("a\nb")]) == [1.0]
    assert built_in("regex:a:b")(["a:b"]) == [1.0]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think>a</think><answer> </answer>", 0.5),
        ("<answer>b</answer><think>a</think>", 0.5),
        ("x <think>a</think><answer>b</answer>", 0.5),
        ("<think>a<think>b</think><answer>c</answer>", 0.375),
        ("<answer>b", 0.125),
        ("", 0.0),
    ],
)
def test_format(text: str, reward: float) -> None:
    assert built_in("format")([text]) == [reward]


def test_format_of_other_parts() -> None:
    judge = built_in("format: plan, code")
    assert judge(["<plan>a</plan><code>b</code>", "<think>a</think>"]) == [1.0, 0.0]


def test_length() -> None:
    judge, between = built_in("length:10"), built_in("length:4-10")
    ids = [[0] * n for n in (0, 4, 10, 15, 20, 40)]
    texts = ["x"] * len(ids)
    assert judge(texts, completion_ids=ids) == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert between(texts, completion_ids=ids) == [0.6, 1.0, 1.0, 0.5, 0.0, 0.0]
    with pytest.raises(DataError, match="needs the tokens of completions"):
        judge(texts)


NAMES = ["exact_match", "exact_match:right", "regex:a+", "format", "format:a,b", "length:3"]


@pytest.mark.parametrize("name", NAMES)
def test_rewards_take_what_the_trainer_hands_over(name: str) -> None:
    judge = pickle.loads(pickle.dumps(built_in(name)))
    assert judge.__name__ == name.partition(":")[0]
    found = judge(
        prompts=["p"], completions=[said("a")], completion_ids=[[1]], answer=["a"], right=["a"],
        trainer_state=None, log_extra=None, log_metric=None,
    )  # fmt: skip
    assert len(found) == 1


def test_every_reward_is_tried() -> None:
    assert {name.partition(":")[0] for name in NAMES} == set(REWARDS)
    assert [reward_problem(name) for name in NAMES] == [None] * len(NAMES)


def test_a_name_that_is_none() -> None:
    with pytest.raises(RecipeError, match=r"trl\.reward_funcs: 'formats' is neither a reward"):
        built_in("formats")
    with pytest.raises(RecipeError, match="is a function, not a reward of that name"):
        built_in("a.b")


# --- functions ------------------------------------------------------------------------------------

CODE = """
import pathlib
from helper_of_rewards import VALUE
pathlib.Path(__file__).with_name("it-was-run").touch()

def steady(completions, **columns):
    return [VALUE for _ in completions]

number = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> Iterator[str]:
    """The path of a file with a function, which imports another one beside it."""
    (tmp_path / "rewards_of_mine.py").write_text(CODE)
    (tmp_path / "helper_of_rewards.py").write_text("VALUE = 0.25")
    before = set(sys.modules)
    yield str(tmp_path / "rewards_of_mine.py")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def recipe(*names: str) -> Recipe:
    return Recipe.model_validate(
        {"base_model": "a/b", "rl": "grpo", "trl": {"reward_funcs": list(names)}}
    )


def test_a_function_runs_with_the_callers_word_alone(module: str, tmp_path: Path) -> None:
    whole = recipe("format", f"{module}:steady")
    with pytest.raises(RecipeError, match="pass --allow-code if you trust it"):
        rewards_of(whole)
    assert not (tmp_path / "it-was-run").exists()
    first, second = rewards_of(whole.allowed(ALLOWED))
    assert (tmp_path / "it-was-run").exists()
    assert first.__name__ == "format"
    assert second(["a", "b"]) == [0.25, 0.25]
    assert str(tmp_path) not in sys.path


def test_a_file_is_imported_once(module: str) -> None:
    found = [load_function(f"{module}:steady", "key", ALLOWED) for _ in range(2)]
    assert found[0] is found[1]
    assert pickle.loads(pickle.dumps(found[0])) is found[0]


def test_a_file_does_not_take_the_name_of_another_module(tmp_path: Path) -> None:
    before = dict(sys.modules)
    for name in ("json", "this", "numpy"):  # loaded, not yet loaded, installed
        (tmp_path / f"{name}.py").write_text(f"def steady(completions): return [{name!r}]")
        loaded = load_function(f"{tmp_path}/{name}.py:steady", "key", ALLOWED)
        assert loaded(["a"]) == [name]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "json.py").write_text("def steady(completions): return [2.0]")
    assert load_function(f"{tmp_path}/other/json.py:steady", "key", ALLOWED)(["a"]) == [2.0]
    assert "this" not in sys.modules
    assert all(sys.modules[name] is module for name, module in before.items())
    for name in set(sys.modules) - set(before):
        del sys.modules[name]


def test_functions_that_cannot_be_had(module: str, tmp_path: Path) -> None:
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    (tmp_path / "ending.py").write_text("import sys; sys.exit(0)")
    for name, problem in (
        (f"{module}:nothing", "key: rewards_of_mine.py has no function 'nothing'"),
        (
            f"{module}:number",
            "has no function 'number': it is of the type int",
        ),
        (f"{module}:staedy", "has no function 'staedy'; did you mean steady?"),
        (f"{tmp_path}/broken_rewards.py:f", "broken_rewards.py:f cannot be imported: division by"),
        (f"{tmp_path}/absent.py:f", "absent.py:f cannot be imported: "),
        (f"{tmp_path}/ending.py:f", "ending.py:f cannot be imported: it called sys.exit(0)"),
        ("no_such_package.f", "no_such_package.f cannot be imported: No module named"),
    ):
        with pytest.raises(RecipeError) as refused:
            load_function(name, "key", ALLOWED)
        assert problem in str(refused.value)
    assert not any("broken_rewards" in str(m) for m in list(sys.modules.values()))


def test_other_methods_have_no_rewards() -> None:
    assert rewards_of(Recipe(base_model="a/b")) == []
    assert rewards_of(Recipe(base_model="a/b", rl="dpo")) == []
