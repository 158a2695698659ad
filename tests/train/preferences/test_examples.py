"""The examples of preference methods: what they say, the rows that they train on, and that they do.

Their model comes with a package that may not be installed; a tiny one reads the same rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusewright.train.data import PreparedData, Samples, prepare
from fusewright.train.data.preferences.examples import Examples
from fusewright.train.recipe.load import check
from fusewright.train.recipe.preferences import preference_settings, rows_of
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.recipe.status import entries
from fusewright.train.rewards.built_in import rewards_of

from ..commands import fusewright
from ..conftest import make_tokenizer

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
TOKENIZER = make_tokenizer()


def recipe(name: str, **changes: Any) -> Recipe:
    """An example, with a model that need not be there."""
    return check(EXAMPLES / f"{name}.yaml", {"base_model": "some/model", **changes}).recipe


def rows(whole: Recipe) -> tuple[PreparedData, list[dict[str, Any]]]:
    """The prepared rows of an example, and the first hundred as trainers read them."""
    prepared = prepare(whole, TOKENIZER)
    kind = rows_of(whole)
    assert isinstance(prepared.train, Samples)
    assert kind is not None
    return prepared, list(Examples(prepared.train, kind)[:100])


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_an_example_has_only_keys_that_its_method_reads(name: str) -> None:
    checked = check(EXAMPLES / f"{name}.yaml", {"base_model": "some/model"})
    found = {e.key: e.status for e in entries(checked.values)}
    others = {key for key, status in found.items() if status != "honoured"}
    wait = {"rl", "rl_beta", "datasets.0.field_chosen", "datasets.0.field_rejected"}
    assert {key for key in others if not key.startswith("trl.")} <= wait
    assert "subsumed" not in found.values()


def test_pairs_of_the_example_fit_and_are_held_out() -> None:
    whole = recipe("dpo", sequence_len=1024)  # a token per byte needs more of them
    prepared, examples = rows(whole)
    assert prepared.counts["validation_samples"] == whole.val_set_size == 32
    assert prepared.counts["train_samples"] > 1000
    settings = preference_settings(whole)
    assert settings is not None
    assert (settings.method, settings.reference) == ("dpo", True)
    assert settings.arguments == {"beta": 0.1}
    for example in examples:
        asked = TOKENIZER.decode(example["prompt_ids"])
        name = asked.partition("`")[2].partition("`")[0].rpartition(".")[2]
        chosen, rejected = (TOKENIZER.decode(example[f"{k}_ids"]) for k in ("chosen", "rejected"))
        assert f" {name}" in chosen.partition("\n")[0]
        assert chosen != rejected


def test_prompts_of_the_example_ask_for_what_its_rewards_measure() -> None:
    whole = recipe("grpo")
    _, examples = rows(whole)
    settings = preference_settings(whole)
    assert settings is not None
    assert settings.arguments["num_generations"] == whole.micro_batch_size
    for example in examples:
        assert example["prompt"][0]["content"] == whole.default_system_message
    judges = {reward.__name__: reward for reward in rewards_of(whole)}
    assert list(judges) == ["regex", "length"]
    texts = ["It wraps text.", "It wraps text", "It wraps text.\nIt can do more."]
    assert judges["regex"](texts) == [1.0, 0.0, 0.0]
    rewards = judges["length"](texts, completion_ids=[[0] * 10, [0] * 30, [0] * 40])
    assert rewards[0] == 1.0
    assert rewards == sorted(rewards, key=lambda r: -(r or 0))
    assert (rewards[2] or 0) < (rewards[1] or 0) < 1.0


def trained(name: str, folder: Path) -> dict[str, Any]:
    """What an example leaves in ``run.json``."""
    pytest.importorskip("trl", reason="its trainers train by preferences")
    output = folder / "out"
    result = fusewright("train", str(EXAMPLES / f"{name}.yaml"), f"--output_dir={output}")
    assert result.exit_code == 0, result.output
    run: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "finished"
    return run


def mean_of(run: dict[str, Any], key: str, steps: slice) -> float:
    values = [entry[key] for entry in run["history"] if key in entry][steps]
    return sum(values) / len(values)


@pytest.mark.real
@pytest.mark.slow
def test_the_margin_of_right_answers_rises(tmp_path: Path) -> None:
    run = trained("dpo", tmp_path)
    margin = "rewards/margins"
    assert mean_of(run, margin, slice(-5, None)) > mean_of(run, margin, slice(5)) + 0.5
    held = [entry["eval_loss"] for entry in run["history"] if "eval_loss" in entry]
    assert held[0] == pytest.approx(0.693, abs=0.01)  # the model is its own reference
    assert held[-1] < 0.45


@pytest.mark.real
@pytest.mark.slow
def test_the_reward_for_the_format_rises(tmp_path: Path) -> None:
    run = trained("grpo", tmp_path)
    assert mean_of(run, "reward", slice(-5, None)) > mean_of(run, "reward", slice(5)) + 0.5
