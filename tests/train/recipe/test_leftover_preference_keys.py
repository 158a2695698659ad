"""Recipes without a preference method that keep keys of one: nothing reads them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.train.recipe.keys.preferences import TrlKeys
from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.status import entries, messages, refusals

BASE: dict[str, Any] = {"base_model": "a/b", "output_dir": "o", "datasets": [{"path": "a/b"}]}

LEFT_OVER: tuple[dict[str, Any], ...] = (
    {"dpo_norm_loss": True},
    {"dpo_generate_during_eval": True},
    {"dpo_use_liger_kernel": True},
    {"rpo_alpha": 0.5},
    {"dpo_loss_type": "made_up"},
    {"dpo_loss_type": ["made_up", "sigmoid"]},
    {"dpo_loss_weights": [1.0]},
    {"dpo_loss_weights": []},
    {"dpo_loss_type": ["sigmoid"], "dpo_loss_weights": [1.0, 2.0]},
    {"dpo_label_smoothing": 0.5},
    {"dpo_ld_alpha": 2},
    {"num_labels": 0},
    {"orpo_alpha": 0, "rl_beta": -1.0},
    {"dpo_padding_free": True, "precompute_ref_log_probs": True},
    {"trl": {"async_prefetch": True}},
    {"trl": {"use_data_producer": True, "use_liger_loss": True}},
    {"trl": {"rollout_func": "a.b"}},
    {"trl": {"num_generations": 1}},
    {"trl": {"num_generations": 4, "generation_batch_size": 6}},
    {"trl": {"top_k": -1}},
    {"trl": {"reward_funcs": []}},
    {"trl": {"reward_funcs": ["no such"], "reward_weights": [1, 2]}},
    {"trl": {"loss_type": "luspo"}},
    {"trl": {"loss_type": "made_up", "epsilon": "much"}},
    {"rl_beta": 0.1, "trl": {"beta": 0.2}},
    {"vllm": {"port": 70000, "dtype": 3}},
)


@pytest.mark.parametrize("keys", LEFT_OVER, ids=str)
@pytest.mark.parametrize("method", [{}, {"rl": None, "reward_model": False}])
def test_no_value_is_a_mistake_where_nothing_reads_it(
    keys: dict[str, Any], method: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe = load_recipe({**BASE, **keys, **method})
        said = " ".join(messages(recipe))
        kept = recipe.recorded()
        unset = recipe.model_dump(exclude_unset=True)
    values = check({**BASE, **keys, **method}).values
    assert refusals(values) == []
    for entry in entries(values):
        if entry.loc[0] in keys and entry.value is not None:
            assert entry.status == "not applicable", entry.key
            assert entry.key in said or not entry.asks
    for name, value in keys.items():
        assert unset[name] == value
        expected = kept[name]
        if isinstance(value, dict):
            expected = {key: expected[key] for key in value}
        assert expected == value


@pytest.mark.parametrize(
    "method", [{"rl": "dpo"}, {"rl": "dop"}, {"reward_model": True}, {"process_reward_model": True}]
)
def test_a_method_has_limits(method: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as refused:
        check({**BASE, **method, "dpo_label_smoothing": 0.5, "trl": {"top_k": -1}})
    said = str(refused.value)
    assert "dpo_label_smoothing: must be less than 0.5, not 0.5" in said
    assert "trl.top_k: must be" in said


def test_a_default_is_that_of_trl() -> None:
    trl = pytest.importorskip("trl", reason="the default is TRL's, which only benchmarks need")
    about = TrlKeys.model_fields["use_bias_correction_kl"].description or ""
    assert about.endswith("Unset: yes.") == trl.GRPOConfig.use_bias_correction_kl
