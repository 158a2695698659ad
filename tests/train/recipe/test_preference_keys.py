"""Keys of preferences and rewards: which conflict, which nothing reads, what trainers get."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from fusewright.errors import RecipeError
from fusewright.train.consent import Consent
from fusewright.train.recipe.conflicts import conflicts, without_effect
from fusewright.train.recipe.keys.preferences import DpoLoss, PreferenceKeys, TrlKeys, VllmKeys
from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.preferences import ROWS, method_of, preference_settings, rows_of
from fusewright.train.recipe.recipe import Recipe

ROW: dict[str, Any] = {"datasets": [{"path": "a/b"}]}
REWARDS: dict[str, Any] = {"trl": {"reward_funcs": ["format"]}}

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"rl": "dpo"}, "ipo": {"rl": "ipo"}, "orpo": {"rl": "orpo"},
    "kto": {"rl": "kto", "micro_batch_size": 2}, "simpo": {"rl": "simpo"}, "cpo": {"rl": "cpo"},
    "grpo": {"rl": "grpo", **REWARDS}, "gdpo": {"rl": "gdpo", **REWARDS},
    "reward": {"reward_model": True}, "process_reward": {"process_reward_model": True},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_method_alone_has_no_conflict(method: str) -> None:
    keys = {"base_model": "a/b", "output_dir": "o", **ROW, **METHODS[method]}
    assert list(conflicts(keys)) == []
    recipe = check(keys).recipe
    assert method_of(recipe) == method
    assert rows_of(recipe) == ROWS[method]


def test_supervised_training_has_no_settings() -> None:
    assert preference_settings(Recipe(base_model="a/b")) is None
    assert rows_of(Recipe(base_model="a/b", rl="ebft")) is None


def test_keys_that_the_method_does_not_read() -> None:
    values = {
        "rl": "kto", "kto_desirable_weight": 2.0, "orpo_alpha": 0.1, "num_labels": 1,
        "trl": {"beta": 0.1, "epsilon": 0.2, "ref_model_sync_steps": 9}, "vllm": {"port": 1},
        "precompute_ref_log_probs": True, "dpo_ld_alpha": 0.5,
    }  # fmt: skip
    found = dict(without_effect(values))
    assert found["orpo_alpha"] == "only rl: orpo reads it"
    assert found["num_labels"] == "only reward_model and process_reward_model read it"
    assert found["trl.epsilon"] == "only rl: grpo and gdpo read it"
    assert found["trl.ref_model_sync_steps"] == "only trl.sync_ref_model: true reads it"
    assert found["vllm"] == "only rl: grpo, gdpo read it"
    assert found["dpo_ld_alpha"] == "only rl: dpo, ipo read it"
    assert {"kto_desirable_weight", "trl.beta", "precompute_ref_log_probs"} & set(found) == set()
    assert dict(without_effect({"rl_beta": 0.1}))["rl_beta"] == (
        "only a preference method (key rl) reads it"
    )
    compared = dict(without_effect({"rl": "dpo", "train_on_inputs": True}))
    assert compared["train_on_inputs"] == "only answers are compared, never prompts"
    assert dict(without_effect({"train_on_inputs": True})) == {}
    vllm = {"rl": "grpo", "trl": {"vllm_mode": "server"}, "vllm": {"port": 1}}
    assert dict(without_effect(vllm))["trl.vllm_mode"] == "only trl.use_vllm: true reads it"
    assert "vllm" not in dict(without_effect({**vllm, "trl": {"use_vllm": True}}))


# --- what the trainers get ------------------------------------------------------------------------

CONFIGS = {
    "dpo": "trl:DPOConfig", "ipo": "trl:DPOConfig", "kto": "trl:KTOConfig",
    "orpo": "trl.experimental.orpo:ORPOConfig", "cpo": "trl.experimental.cpo:CPOConfig",
    "simpo": "trl.experimental.cpo:CPOConfig", "grpo": "trl:GRPOConfig", "gdpo": "trl:GRPOConfig",
    "reward": "trl:RewardConfig",
}  # fmt: skip

EVERYTHING: dict[str, Any] = {
    "rl_beta": 0.3, "dpo_loss_type": ["sigmoid", "sft"], "dpo_loss_weights": [1.0, 0.5],
    "dpo_label_smoothing": 0.1, "dpo_use_weighting": True, "dpo_ld_alpha": 0.5,
    "dpo_padding_free": True, "precompute_ref_log_probs": False, "cpo_alpha": 0.7,
    "simpo_gamma": 0.9, "kto_desirable_weight": 2.0, "kto_undesirable_weight": 0.5,
    "center_rewards_coefficient": 0.01,
    "trl": {
        "max_completion_length": 64, "num_generations": 4, "generation_batch_size": 8,
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "generation_kwargs": {"seed": 1}, "mask_truncated_completions": True,
        "reward_funcs": ["format", "exact_match"], "reward_weights": [1.0, 2.0],
        "loss_type": "dr_grpo", "num_iterations": 2, "epsilon": 0.1, "epsilon_high": 0.3,
        "importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.5,
        "use_bias_correction_kl": True, "entropy_coef": 0.01, "use_adaptive_entropy": True,
        "entropy_target": 0.3, "entropy_coef_delta": 0.01, "entropy_coef_min": 0.0,
        "entropy_coef_max": 0.5, "log_completions": True, "num_completions_to_print": 3,
        "scale_rewards": False, "chat_template_kwargs": {"enable_thinking": False},
        "sync_ref_model": True, "use_vllm": True, "vllm_server_port": 9000,
        "vllm_guided_decoding_regex": "a+", "vllm_server_timeout": 60,
        "vllm_importance_sampling_cap": 2.0, "vllm_importance_sampling_clip_min": 0.5,
        "vllm_importance_sampling_correction": True, "vllm_enable_sleep_mode": True,
        "vllm_importance_sampling_mode": "token_mask",
    },
    "vllm": {"host": "h", "gpu_memory_utilization": 0.4, "tensor_parallel_size": 2,
             "max_model_len": 99},
}  # fmt: skip


def settings_of(method: str, **keys: Any) -> Any:
    recipe = Recipe.model_validate({"base_model": "a/b", **EVERYTHING, **METHODS[method], **keys})
    return preference_settings(recipe)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_arguments_are_those_of_trl(method: str, mode: str) -> None:
    pytest.importorskip("trl", reason="the configurations are TRL's, which only benchmarks need")
    module, _, name = CONFIGS[method].partition(":")
    names = {f.name for f in dataclasses.fields(getattr(importlib.import_module(module), name))}
    trl = {**EVERYTHING["trl"], "vllm_mode": mode}
    found = settings_of(method, trl=trl)
    assert set(found.arguments) - names == set()
    assert None not in found.arguments.values()


def test_values_of_arguments() -> None:
    dpo = settings_of("dpo").arguments
    assert dpo["loss_type"] == ["sigmoid", "sft"]
    assert (dpo["beta"], dpo["label_smoothing"], dpo["ld_alpha"]) == (0.3, 0.1, 0.5)
    assert (dpo["ref_model_mixup_alpha"], dpo["ref_model_sync_steps"]) == (0.9, 64)
    ipo = settings_of("ipo", dpo_loss_type=None, dpo_loss_weights=None).arguments
    assert ipo["loss_type"] == ["ipo"]
    assert "label_smoothing" not in ipo
    assert settings_of("orpo").arguments == {"beta": 0.3}
    assert settings_of("orpo", rl_beta=None, orpo_alpha=0.2).arguments == {"beta": 0.2}
    simpo = settings_of("simpo").arguments
    assert (simpo["loss_type"], simpo["simpo_gamma"], simpo["cpo_alpha"]) == ("simpo", 0.9, 0.7)
    kto = settings_of("kto").arguments
    assert (kto["desirable_weight"], kto["undesirable_weight"]) == (2.0, 0.5)
    assert settings_of("reward").arguments == {"center_rewards_coefficient": 0.01}
    server = settings_of("grpo", trl=EVERYTHING["trl"]).arguments
    assert server["scale_rewards"] == "none"
    assert (server["vllm_server_host"], server["vllm_server_port"]) == ("h", 9000)
    assert server["vllm_importance_sampling_clip_max"] == 2.0
    assert server["vllm_structured_outputs_regex"] == "a+"
    plain = settings_of("gdpo").arguments
    assert plain["scale_rewards"] == "group"
    assert plain["multi_objective_aggregation"] == "normalize_then_sum"
    assert not any(name.startswith("vllm") for name in plain)
    assert settings_of("dpo", dpo_loss_type="hinge", dpo_loss_weights=None).arguments[
        "loss_type"
    ] == ["hinge"]


def test_what_else_the_settings_say() -> None:
    assert settings_of("dpo").reference
    assert not settings_of("simpo").reference
    assert settings_of("grpo", rl_beta=0.1).reference
    assert not settings_of("grpo", rl_beta=None).reference
    assert settings_of("grpo").reward_functions == ("format",)
    assert settings_of("dpo", trl=EVERYTHING["trl"]).reward_functions == ()
    assert settings_of("reward").num_labels == 1
    assert settings_of("process_reward").num_labels == 2
    assert settings_of("process_reward", num_labels=3).num_labels == 3


def test_losses_are_those_of_trl() -> None:
    pytest.importorskip("trl", reason="the losses are TRL's, which only benchmarks need")
    from trl import DPOConfig

    text = DPOConfig.__doc__ or ""
    listed = text.partition("loss_type (")[2].partition("loss_weights (")[0]
    assert all(f"'{loss}'" in listed for loss in get_args(DpoLoss))
    assert listed.count("`'") == len(get_args(DpoLoss))


def test_every_key_of_the_groups_is_read_or_says_why_not() -> None:
    from fusewright.train.recipe import methods_table, preferences
    from fusewright.train.recipe.keys import preferences as keys
    from fusewright.train.recipe.keys.base import extra_of

    modules = (preferences, methods_table, keys)
    text = "".join(Path(m.__file__ or "").read_text(encoding="utf-8") for m in modules)
    for group in (PreferenceKeys, TrlKeys, VllmKeys):
        for name, field in group.model_fields.items():
            status = extra_of(field).get("status", "honoured")
            if status == "honoured" and name not in ("trl", "vllm"):
                assert f".{name}" in text or f'"{name}"' in text, name


# --- functions of the recipe's own ----------------------------------------------------------------


def grpo(folder: Path, name: str, **dataset: Any) -> dict[str, Any]:
    (folder / "rows.jsonl").write_text('{"prompt": "a"}\n')
    return {
        "base_model": "a/b", "output_dir": str(folder / "out"), "rl": "grpo",
        "datasets": [{"path": str(folder / "rows.jsonl"), **dataset}],
        "trl": {"reward_funcs": ["format", name]},
    }  # fmt: skip


def test_functions_need_the_callers_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rwd.py").write_text("raise SystemExit('it was run')")
    keys = grpo(tmp_path, "rwd.good", type="rwd.change")
    with pytest.raises(RecipeError) as refused:
        load_recipe(keys)
    said = str(refused.value)
    assert f"trl.reward_funcs.1: {tmp_path}/rwd.py:good is Python code; it is run only with" in said
    assert f"datasets.0.type: {tmp_path}/rwd.py:change is Python code" in said
    assert "pass --allow-code if you trust it" in said
    load_recipe(keys, consent=Consent(allow_code=True))
    recipe = check(keys).recipe  # which runs nothing, so that it needs no permission
    assert recipe.trl is not None
    assert recipe.trl.reward_funcs == ["format", f"{tmp_path}/rwd.py:good"]
    assert recipe.datasets[0].type == f"{tmp_path}/rwd.py:change"


def test_functions_must_be_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = ModuleType("made_in_this_process")  # without a spec, as __main__ may be
    monkeypatch.setitem(sys.modules, made.__name__, made)
    with pytest.raises(
        RecipeError, match=r"trl\.reward_funcs\.1: there is no nowhere\.py in .* and"
    ):
        check(grpo(tmp_path, "nowhere.good"), consent=Consent(allow_code=True))
    for absent in ("__main__", "made_in_this_process"):
        with pytest.raises(RecipeError, match=rf"funcs\.1: there is no {absent}\.py in"):
            check(grpo(tmp_path, f"{absent}.good"), consent=Consent(allow_code=True))
    installed = check(grpo(tmp_path, "json.loads"), consent=Consent(allow_code=True)).recipe
    assert installed.trl is not None
    assert installed.trl.reward_funcs == ["format", "json.loads"]
