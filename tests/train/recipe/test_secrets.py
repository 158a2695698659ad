"""Secrets of a recipe: in nothing that a run leaves behind, and not missed there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.inference.run_folder import open_run
from fusewright.train.inference.run_recipe import recipe_for
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.recipe.secret_values import HIDDEN, hide, without_hidden
from fusewright.train.requirements import tracking

from ..commands import fusewright

QUIET = Console(quiet=True)
SECRETS = {
    "comet_api_key": "sesame-1",
    "overrides_of_model_kwargs": {"token": "sesame-2", "use_safetensors": True},
    "mlflow_tracking_uri": "https://me:sesame-3@example.org/mlflow",
    "use_mlflow": False,
}


@pytest.mark.parametrize(
    "name",
    [
        "comet_api_key", "hub_token", "token", "use_auth_token", "HF_TOKEN", "accessToken",
        "password", "client_secret", "apikey", "aws_secret_access_key", "private-key",
    ],
)  # fmt: skip
def test_a_secret_at_any_depth(name: str) -> None:
    recipe = {name: "a", "x": {name: "b", "y": [{name: "c", "kept": "d"}]}, "lora_r": 4}
    before = json.dumps(recipe)
    inner = {name: HIDDEN, "y": [{name: HIDDEN, "kept": "d"}]}
    assert hide(recipe) == {name: HIDDEN, "x": inner, "lora_r": 4}
    assert hide({name: ["a", {"b": "c"}]}) == {name: [HIDDEN, {"b": HIDDEN}]}
    assert json.dumps(recipe) == before
    assert hide(hide(recipe)) == hide(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        {"special_tokens": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>"}},
        {"chat_template_kwargs": {"user_token": "<|user|>", "eot_token": "<|eot|>"}},
        {"tokenizer_config": "a/b", "tokenizer_type": "LlamaTokenizer", "tokens": ["<x>"]},
        {"eot_tokens": ["<|im_end|>"], "added_tokens_overrides": {"5": "<y>"}},
        {"sample_max_tokens": 64, "hf_use_auth_token": True, "total_num_tokens": None},
        {"comet_experiment_key": "k", "wandb_entity": "me", "hub_token": ""},
        {"datasets": [{"path": "hf://datasets/me/rows@main"}, {"path": "me@home/rows.jsonl"}]},
        {"default_system_message": "Mail me: ftp://me@example.org is mine."},
    ],
)
def test_what_is_no_secret_stays(recipe: dict[str, Any]) -> None:
    assert hide(recipe) == recipe


def test_a_declared_secret_is_in_no_text_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(base_model="x", comet_api_key="sesame-1", comet_project_name="p")
    dumped = json.dumps(recipe.model_dump(mode="json"))
    assert "sesame" not in f"{recipe!r} {recipe.recorded()} {dumped}"
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    with tracking(recipe):  # but the tracker gets it
        assert os.environ["COMET_API_KEY"] == "sesame-1"
    assert "COMET_API_KEY" not in os.environ


@pytest.mark.parametrize("account", ["me:pw", "me:p@ss", "@", "token"])
@pytest.mark.parametrize("rest", ["host:80/a", "host", "host/a@b", "host/a?to=me@home"])
def test_an_address_keeps_all_but_the_account(account: str, rest: str) -> None:
    assert hide({"uri": f"https://{account}@{rest}"}) == {"uri": f"https://{HIDDEN}@{rest}"}


def test_reading_back_leaves_out_what_was_hidden() -> None:
    recipe = {"token": "a", "x": {"password": "b", "kept": 1}, "y": [{"api_key": "c"}, 2]}
    assert without_hidden(hide(recipe)) == {"x": {"kept": 1}, "y": [{}, 2]}


def files_with(folder: Path, text: bytes) -> list[str]:
    return [
        str(p.relative_to(folder))
        for p in sorted(folder.rglob("*"))
        if p.is_file() and text in p.read_bytes()
    ]


def test_no_file_of_a_run_tells_them_and_it_can_be_used(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    result = train({**recipe, **SECRETS}, console=QUIET, save_steps=2)
    out = tmp_path / "out"
    assert files_with(out, b"sesame") == []
    assert "sesame" not in repr(result)
    telling = {"run.json", "report.html", "README.md", "checkpoint-2/fusewright.json"}
    assert telling <= set(files_with(out, HIDDEN.encode()))

    read = recipe_for(open_run(out))
    assert read.comet_api_key is None
    assert read.overrides_of_model_kwargs == {"use_safetensors": True}  # no token that is none
    for command in (("eval",), ("generate", "Hi", "--max_new_tokens", "2"), ("merge",)):
        done = fusewright(command[0], out, *command[1:])
        assert done.exit_code == 0, done.output
    assert files_with(out, b"sesame") == []


@pytest.mark.long
def test_a_run_goes_on_with_the_same_secrets_or_new_ones(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    asked = {**recipe, **SECRETS, "save_steps": 2}
    train(asked, console=QUIET, output_dir=str(tmp_path / "whole"))
    start = tmp_path / "whole" / "checkpoint-2"
    shown = shutil.copytree(start, tmp_path / "older" / "checkpoint-2") / "fusewright.json"
    saved = json.loads(shown.read_text(encoding="utf-8"))
    saved["recipe"] |= SECRETS  # as versions wrote it that hid nothing
    shown.write_text(json.dumps(saved), encoding="utf-8")
    changed = {**SECRETS["overrides_of_model_kwargs"], "token": "sesame-4"}
    for i, (path, keys) in enumerate(
        [(start, {}), (start, {"overrides_of_model_kwargs": changed}), (shown.parent, {})]
    ):
        asked |= {"output_dir": str(tmp_path / f"{i}"), "resume_from_checkpoint": str(path)}
        resumed = train({**asked, **keys}, console=QUIET)
        assert (resumed.status, resumed.resumed_from) == ("finished", 2)
    asked |= {"output_dir": str(tmp_path / "other")}
    other = {**SECRETS["overrides_of_model_kwargs"], "use_safetensors": None}
    with pytest.raises(RecipeError, match=r"kwargs\.use_safetensors was true and") as refused:
        train(asked, console=QUIET, overrides_of_model_kwargs=other)
    assert "sesame" not in str(refused.value)
