"""The loss of a run: the one that its training reported, and that of other rows."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fusewright.train import train
from fusewright.train.inference.evaluate import _reading
from fusewright.train.inference.run_folder import RunFolder
from fusewright.train.recipe.recipe import Recipe

from ..commands import fusewright, refused
from ..conftest import chat, write_rows

QUIET = Console(quiet=True)


def test_the_same_as_at_the_end_of_the_training(trained: Path) -> None:
    done = fusewright("eval", trained)
    assert done.exit_code == 0, done.output
    found = json.loads((trained / "eval.json").read_text())
    recorded = json.loads((trained / "run.json").read_text())
    figures = found["results"]["validation"]
    assert figures["loss"] == pytest.approx(recorded["val_loss_after"], rel=1e-6)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))
    assert figures["samples"] == recorded["data"]["validation_samples"] == 8
    assert figures["tokens"] == recorded["data"]["validation_tokens"]
    assert figures["trained_tokens"] == recorded["data"]["validation_trained_tokens"]
    assert found["recorded_val_loss"] == recorded["val_loss_after"]
    assert f"{figures['loss']:.4f}" in done.stdout
    assert f"{figures['perplexity']:.3f}" in done.stdout
    assert f"written to {trained / 'eval.json'}" in done.stdout


def test_a_checkpoint_has_another_loss(trained: Path) -> None:
    checkpoint = trained / "checkpoint-2"
    assert fusewright("eval", checkpoint).exit_code == 0
    early = json.loads((checkpoint / "eval.json").read_text())["results"]["validation"]["loss"]
    late = json.loads((trained / "run.json").read_text())["val_loss_after"]
    assert early > late + 0.01


def test_other_files_one_by_one(trained: Path, tmp_path: Path) -> None:
    for name, count in (("few", 2), ("many", 7)):
        lines = [chat(f"What is {i}?", "No idea.") for i in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", lines)
    files = ("--data", tmp_path / "few.jsonl", "--data", tmp_path / "many.jsonl")
    validated = trained / "eval.json"
    validated.write_text("the validation's")
    done = fusewright("eval", trained, *files, "--json")
    found = json.loads(done.stdout)
    assert validated.read_text() == "the validation's"
    assert list(found["results"]) == [str(tmp_path / "few.jsonl"), str(tmp_path / "many.jsonl")]
    assert [r["samples"] for r in found["results"].values()] == [2, 7]
    assert found["recorded_val_loss"] is None
    few, many = found["results"].values()
    tokens = [few["trained_tokens"], many["trained_tokens"]]
    mean = (few["loss"] * tokens[0] + many["loss"] * tokens[1]) / sum(tokens)
    assert found["loss"] == pytest.approx(mean)
    (file,) = trained.glob("eval-few-*.json")
    assert json.loads(file.read_text()) == found
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "many.jsonl", tmp_path / "other/few.jsonl")  # of the same name
    assert fusewright("eval", trained, "--data", tmp_path / "other/few.jsonl").exit_code == 0
    assert json.loads(file.read_text()) == found
    assert len(list(trained.glob("eval-few-*.json"))) == 2


def test_the_mean_is_over_tokens_that_are_trained(trained: Path, tmp_path: Path) -> None:
    from fusewright.train.inference.load_run import load_run

    rows = [chat("What is 1?", "A"), chat("What is 2?", "It is a longer answer than the other.")]
    file = tmp_path / "two.jsonl"
    write_rows(file, rows)
    assert fusewright("eval", trained, "--data", file).exit_code == 0
    model, tokenizer = load_run(trained)
    total, count = 0.0, 0
    for row in rows:
        before = tokenizer.apply_chat_template(
            row["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        text = before + row["messages"][1]["content"] + "<|im_end|>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        skipped = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0, skipped - 1 : -1]
        total -= float(scores.gather(1, ids[0, skipped:, None]).sum())
        count += ids.shape[1] - skipped
    (written,) = trained.glob("eval-two-*.json")
    figures = json.loads(written.read_text())["results"][str(file)]
    assert figures["trained_tokens"] == count
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.long("{'optimize': True, 'codegen': 'eager'}")
@pytest.mark.parametrize(
    "changes", [{"adapter": None, "bf16": True}, {"optimize": True, "codegen": "eager"}], ids=str
)
def test_other_runs(recipe: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    result = train(recipe, console=QUIET, **changes)
    assert fusewright("eval", tmp_path / "out").exit_code == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    loss = found["results"]["validation"]["loss"]
    assert loss == pytest.approx(result.val_loss_after, rel=2e-3 if "bf16" in changes else 1e-5)


def test_what_is_refused(trained: Path, base: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    assert "its validation rows are unknown; name a dataset" in refused("eval", base)
    missing = tmp_path / "no.jsonl"
    assert refused("eval", trained, "--data", missing) == f"{missing}: file not found"
    file = tmp_path / "bad.jsonl"
    file.write_text("{oops\n")
    assert "bad.jsonl, line 1: not valid JSON" in refused("eval", trained, "--data", file)
    file.write_text(json.dumps(chat("q", "long " * 200)) + "\n")
    assert "bad.jsonl: no row is left to train on: of 1, 1 are longer than 128" in refused(
        "eval", trained, "--data", file
    )
    train(recipe, console=QUIET, val_set_size=0, max_steps=1)
    assert "held out no rows (val_set_size: 0)" in refused("eval", tmp_path / "out")


def test_rows_are_read_before_the_model_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(run: RunFolder) -> None:
        raise AssertionError(f"{run.folder} is loaded")

    monkeypatch.setattr("fusewright.train.inference.evaluate.load_model_of", load)
    file = tmp_path / "bad.jsonl"
    file.write_text("{oops\n")
    assert "bad.jsonl, line 1: not valid JSON" in refused("eval", trained, "--data", file)


def test_a_recipe_that_this_version_does_not_know(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(trained, folder)
    run = json.loads((folder / "run.json").read_text())
    run["recipe"]["val_set_size"] = "many"
    (folder / "run.json").write_text(json.dumps(run))
    said = refused("eval", folder)
    assert "run.json was written by another version: this version does not know" in said
    run["recipe"] |= {"val_set_size": 8, "lora_rr": 3}
    (folder / "run.json").write_text(json.dumps(run))
    assert "know its recipe's lora_rr" in refused("generate", folder, "hello")


def test_other_rows_are_read_as_those_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("{}\n")

    def first(**keys: Any) -> Any:
        recipe = {"base_model": "x", "max_steps": 1, **keys}
        run = RunFolder(tmp_path, True, "x", None, Recipe(**recipe).model_dump(mode="json"), {})
        return _reading(run, tmp_path / "other.jsonl").datasets[0]

    assert first(datasets=[{"path": "a", "skip": 5}]).skip == 0
    streamed = first(pretraining_dataset=[{"path": "a", "text_column": "body"}])
    assert (streamed.type, streamed.field) == ("pretrain", "body")
    assert first(pretraining_dataset=[{"path": "a"}]).type == "pretrain"
