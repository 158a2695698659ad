"""What a folder holds, and what is said of one that is of no use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusewright.errors import ModelError
from fusewright.train.inference.load_run import load_run
from fusewright.train.inference.run_folder import open_run
from fusewright.train.model.precision import dtype_for_training

from ..commands import refused
from ..conftest import make_adapter


def test_a_run_says_everything(trained: Path, base: Path) -> None:
    run = open_run(trained)
    assert (run.adapter, run.base_model, run.tokenizer) == (True, str(base), trained)
    assert run.recipe["lora_r"] == 4
    assert run.facts["steps"] == 4


def test_a_checkpoint_asks_its_run(trained: Path, base: Path) -> None:
    run = open_run(trained / "checkpoint-2")
    assert run.folder.name == "checkpoint-2"
    assert run.base_model == str(base)
    assert run.recipe["lora_r"] == 4
    last, earlier = load_run(trained)[0], load_run(run)[0]
    ids = torch.tensor([[1, 7, 45]])
    assert not torch.equal(last(ids).logits, earlier(ids).logits)


def test_plain_folders(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    run = open_run(adapter)
    assert (run.adapter, run.recipe) == (True, {})
    assert (run.base_model, run.tokenizer) == (str(tmp_path / "base"), None)
    assert load_run(run)[0].get_base_model().dtype is dtype_for_training("auto")
    assert load_run(run, dtype=torch.float32)[0].get_base_model().dtype is torch.float32
    whole = open_run(tmp_path / "base")
    assert (whole.adapter, whole.base_model) == (False, str(tmp_path / "base"))
    model, tokenizer = load_run(whole)
    assert model.dtype is torch.float32  # as it is stored
    assert not model.training
    assert tokenizer.chat_template


def test_a_relative_base_is_looked_for_here_and_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(tmp_path)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["base_model_name_or_path"] = "../base"
    file.write_text(json.dumps(config))
    monkeypatch.chdir(adapter)
    assert open_run(adapter).base_model == str(tmp_path / "base")
    monkeypatch.chdir("/")
    assert open_run(adapter).base_model == str(tmp_path / "base")


def test_a_base_that_has_moved(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    said = refused("generate", adapter, "hello")
    assert "the base model is missing" in said
    assert "--base-model BASE says where it is now" in said
    assert load_run(open_run(adapter, str(tmp_path / "elsewhere")))


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    from ..conftest import make_model

    make_model(hidden_size=16).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "base" / "tokenizer.json", tmp_path / "other")
    shutil.copy(tmp_path / "base" / "tokenizer_config.json", tmp_path / "other")
    assert config["hidden_size"] == 32
    said = refused("generate", adapter, "hello", "--base_model", tmp_path / "other")
    assert "the adapter does not match the base model: " in said


@pytest.mark.parametrize("command", ["eval", "generate", "chat", "merge"])
def test_folders_of_no_use(tmp_path: Path, command: str) -> None:
    def said(folder: Path) -> str:
        return refused(command, folder, *(["hello"] if command == "generate" else []))

    assert "nowhere is not there; name the output_dir" in said(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    assert "file is not a folder" in said(file)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is neither a run nor a model" in said(empty)
    (empty / "run.json").write_text("{}")
    assert "neither an adapter nor a model: nothing was saved" in said(empty)
    (empty / "run.json").write_text("{oops")
    assert "run.json is not valid JSON: " in said(empty)
    (empty / "run.json").write_text("[]")
    assert "run.json is damaged: it is not a JSON object" in said(empty)
    (empty / "run.json").unlink()
    (empty / "checkpoint-9").mkdir()
    (empty / "checkpoint-10").mkdir()
    assert f"name one of them: {empty / 'checkpoint-10'}" in said(empty)
    (empty / "adapter_config.json").write_text("{}")
    assert "has adapter_config.json but no adapter_model.safetensors" in said(empty)
    (empty / "adapter_model.safetensors").write_bytes(b"")
    assert "does not name the base model; --base-model does" in said(empty)


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    files = ("run.json", "run.json", "checkpoint-2", "adapter_config.json")
    for number, (name, file) in enumerate(zip("abcd", files, strict=True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        os.utime(tmp_path / name, (number, number))
    with pytest.raises(ModelError) as refused:
        open_run(tmp_path)
    last = ", ".join(str(tmp_path / name) for name in "dcb")  # first
    assert str(refused.value) == (
        f"{tmp_path} contains runs but is not a run itself; name one of them: {last}, ..."
    )


def test_a_model_without_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has a model but no config.json"):
        open_run(tmp_path)


def test_no_base_for_a_whole_model(base: Path) -> None:
    assert "has no base: no --base-model" in refused("eval", base, "--base_model", base)


@pytest.mark.parametrize("arguments", [["--help"], ["nowhere"]], ids=str)
@pytest.mark.parametrize("command", ["eval", "generate", "chat", "merge"])
def test_what_needs_no_model_loads_none(command: str, arguments: list[str]) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from fusewright.cli.main import app; "
        f"print(CliRunner().invoke(app, {[command, *arguments]}).exit_code, "
        "[m for m in ('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{0 if arguments == ['--help'] else 2} []\n"
