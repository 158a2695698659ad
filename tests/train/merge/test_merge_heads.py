"""Adapters with a classification head, merged: the result has the head, and can be used alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from fusewright.train.checkpoint.save_model import save_whole
from fusewright.train.inference.load_run import load_model_of
from fusewright.train.inference.run_folder import open_run
from fusewright.train.model.adapters import add_adapter
from fusewright.train.model.load import load_model

from ..commands import fusewright, refused
from ..conftest import checked, learnt, make_model, make_tokenizer

BATCH = {
    "input_ids": torch.tensor([[1, 7, 45, 99, 130], [2, 200, 31, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}
METHODS = {
    "reward_model": AutoModelForSequenceClassification,
    "process_reward_model": AutoModelForTokenClassification,
}


@torch.no_grad()
def scores(model: Any) -> torch.Tensor:
    made: torch.Tensor = model.eval()(**BATCH).logits
    return made


def run_of(base: Path, folder: Path, **keys: Any) -> Any:
    """The model of a run that has learnt something, and whose results are in ``folder``."""
    recipe = checked(base, **keys)
    model = load_model(recipe)
    if recipe.adapter is not None:
        model = add_adapter(model, recipe)
    save_whole(learnt(model), make_tokenizer(), folder)
    (folder / "run.json").write_text(json.dumps({"recipe": recipe.recorded()}))
    return model


def plain_base(folder: Path) -> Path:
    """A base that neither has a head nor says what it pads with."""
    model = make_model()
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


LORA = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}


@pytest.mark.parametrize("method", METHODS)
def test_a_new_head_is_in_the_merged_model(method: str, tmp_path: Path) -> None:
    model = run_of(plain_base(tmp_path / "base"), tmp_path / "run", **LORA, **{method: True})
    expected = scores(model)
    assert torch.equal(scores(load_model_of(open_run(tmp_path / "run"))), expected)
    done = fusewright("merge", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "in memory: the base's files have no score.weight" in done.stdout
    merged = METHODS[method].from_pretrained(tmp_path / "run" / "merged")
    torch.testing.assert_close(scores(merged), expected, rtol=1e-4, atol=1e-6)
    assert merged.config.pad_token_id == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_base_with_a_head_is_merged_file_by_file(method: str, tmp_path: Path) -> None:
    run_of(plain_base(tmp_path / "base"), tmp_path / "whole", **{method: True})
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    expected = scores(run_of(tmp_path / "whole", tmp_path / "run", **LORA, **{method: True}))
    done = fusewright("merge", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert "file by file" in done.stdout
    merged = METHODS[method].from_pretrained(tmp_path / "run" / "merged")
    torch.testing.assert_close(scores(merged), expected, rtol=1e-4, atol=1e-6)
    assert merged.config.pad_token_id == 0


def test_a_whole_reward_model_is_loaded_with_its_head(tmp_path: Path) -> None:
    model = run_of(plain_base(tmp_path / "base"), tmp_path / "run", reward_model=True)
    loaded = load_model_of(open_run(tmp_path / "run"))
    assert torch.equal(scores(loaded), scores(model))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert torch.equal(scores(plain), scores(model))


def test_a_reward_model_writes_no_text(tmp_path: Path) -> None:
    run_of(plain_base(tmp_path / "base"), tmp_path / "run", **LORA, reward_model=True)
    said = "holds a model that scores texts and writes none (reward_model); load it with AutoModel"
    assert said in refused("generate", tmp_path / "run", "Why?")
