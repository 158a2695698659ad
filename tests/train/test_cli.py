"""The command: exit codes, messages on standard error, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusewright.errors import RecipeError
from fusewright.train.processes.signals import Interrupts, Stopped
from fusewright.train.recipe.overrides import parse_overrides
from fusewright.train.report import progress

from .commands import fusewright, refused_run
from .conftest import chat


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_a_run_and_what_is_refused_afterwards(file: Path, tmp_path: Path) -> None:
    done = fusewright("train", str(file), "--max_steps", "2", "--lora-r=2")
    assert done.exit_code == 0, done.output
    run = tmp_path / "out" / "run.json"
    assert json.loads(run.read_text())["recipe"]["lora_r"] == 2
    assert "already holds a run (run.json)" in refused_run(tmp_path, str(file))
    again = fusewright("train", str(file), "--overwrite", "--max_steps=1")
    assert again.exit_code == 0, again.output
    assert "training for 1 step\n" in again.stdout + again.stderr
    assert json.loads(run.read_text())["steps"] == 1


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "no.yaml")
    assert refused_run(tmp_path, missing) == f"{missing}: file not found"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--lora_rank", "4"],
            "override: lora_rank: is not a key of a recipe; did you mean lora_r?",
        ),
        (["--max_steps", "many"], "override: max_steps: must be a whole number, not 'many'"),
        (["--datasets.0.path", "no.jsonl"], "override: datasets.0.path: there is no no.jsonl in"),
        (["--max_steps"], "--max_steps needs a value"),
        (["5"], "unexpected argument '5'; write --key value"),
        (["--console", "1"], "override: console: is not a key of a recipe"),
    ],
)
def test_bad_overrides(file: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refused_run(tmp_path, str(file), *arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": the dataset is empty"),
        (json.dumps(chat("q", "a")) + "\n{oops\n", ", line 2: not valid JSON"),
        (
            json.dumps(chat("q", "a")) + '\n{"text": ""}\n',
            ", line 2: the field 'messages' is missing",
        ),
    ],
)
def test_bad_rows(file: Path, rows: Path, tmp_path: Path, text: str, said: str) -> None:
    rows.write_text(text, encoding="utf-8")
    assert refused_run(tmp_path, str(file)).startswith(f"{rows}{said}")


def test_an_output_that_is_a_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "out is not a folder" in refused_run(tmp_path, str(file))
    assert "out is not a folder" in refused_run(tmp_path, str(file), "--overwrite")


def test_overrides() -> None:
    assert parse_overrides(["--a-b", "1", "--c=[x]", "--d", "-3"]) == {
        "a_b": 1,
        "c": ["x"],
        "d": -3,
    }
    with pytest.raises(RecipeError):
        parse_overrides(["a"])


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_signal_leaves_the_adapter_of_the_last_step(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    name: str,
) -> None:
    def third_step(watch: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(watch, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), number)

    original = progress.ProgressCallback.on_step_begin
    monkeypatch.setattr(progress.ProgressCallback, "on_step_begin", third_step)
    result = fusewright("train", str(file), "--max_steps", "9")
    assert result.exit_code == code, result.output
    assert "Stopped at step 3 of 9; the adapter of that step is in" in result.stdout
    assert f"Stopped by {name}." in result.stdout
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["status"], run["signal"], run["steps"]) == ("interrupted", int(number), 3)
    stopped = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # a constant learning rate, so that three steps are the first three of nine
    fusewright("train", str(file), "--overwrite", "--max_steps", "3")
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)


@pytest.mark.long
def test_ctrl_c_on_the_command(file: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fusewright.cli",
        "train",
        str(file),
        "--max_steps",
        "100000",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "step 1/100000" in line:
                process.send_signal(signal.SIGINT)
        assert process.wait() == 130, "".join(said)
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    text = "".join(said)
    assert "Stopping after this step and saving" in text
    assert "Traceback" not in text
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(bool(t.any()) for name, t in adapter.items() if "lora_B" in name)  # B begins at 0


def test_signals_wait_only_where_they_must(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signal == signal.SIGTERM
        interrupts.signal = None
        with interrupts.deferring_signals():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.signal == signal.SIGINT
            assert "press Ctrl-C again to quit without saving" in capfd.readouterr().err
            with pytest.raises(Stopped):
                os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_stopped_before_the_first_step(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("fusewright.train.run.load_processing", stop)
    result = fusewright("train", str(file))
    assert result.exit_code == 130
    assert "nothing more was saved" in result.stderr
    assert not (tmp_path / "out").exists()
