"""Whole runs that save their checkpoints in shards: resumed anywhere, and read by every command."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fusewright.train.checkpoint.files import checkpoints, step_of
from fusewright.train.inference.load_run import load_run
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge import MergeOptions, merge
from fusewright.train.model.files import FOLDER, LIST

from ..results import difference, same, weights
from .runs import STRATEGIES, Run, Runs
from .test_runs import DEEPSPEED, FULL, SAVING, assert_as_one

pytestmark = pytest.mark.slow

SHARDED: dict[str, Any] = {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
METHODS: dict[str, dict[str, Any]] = {"LoRA": {}, "full": FULL}


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("sharded"))


def saved_by_four(runs: Runs, method: str) -> Run:
    """A run of four processes that has saved after half of its steps, and at its end."""
    keys = {**SAVING, **METHODS[method], **SHARDED, "save_steps": 4}
    return runs.several(f"four, {method}", 4, **keys)


@pytest.mark.parametrize("method", METHODS)
def test_its_files(runs: Runs, method: str) -> None:
    run = saved_by_four(runs, method)
    place = run.folder / "checkpoint-4"
    names = {p.name for p in place.iterdir()}
    assert {FOLDER, LIST, "scheduler.pt", "trainer_state.json", "rng_state_3.pth"} <= names
    assert not {"optimizer.pt", "model.safetensors", "adapter_model.safetensors"} & names
    config = "config.json" if method == "full" else "adapter_config.json"
    assert config in names
    shards = sorted((place / FOLDER).iterdir())
    assert {p.name[:11] for p in shards} == {f"shard-{rank:05d}" for rank in (1, 2, 3, 4)}
    stored = {name for path in shards for name in load_file(path) if name.startswith("weights/")}
    assert all("lora_" in name for name in stored) == (method == "LoRA")
    result = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (run.folder / result).is_file()
    assert not (run.folder / FOLDER).exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("fsdp", 4), ("fsdp", 2), ("whole", 2), ("copies", 4), ("ddp", 2), ("alone", 1),
        pytest.param("zero1", 2, marks=DEEPSPEED), pytest.param("zero3", 2, marks=DEEPSPEED),
    ],
)  # fmt: skip
def test_any_number_of_processes_and_any_strategy_resumes(
    runs: Runs, method: str, name: str, processes: int
) -> None:
    first, passes = saved_by_four(runs, method), 4 // processes
    keys = {**SAVING, **METHODS[method], "save_steps": 4, "gradient_accumulation_steps": passes,
            "resume_from_checkpoint": str(first.folder / "checkpoint-4")}  # fmt: skip
    if name == "alone":
        del keys["gradient_accumulation_steps"]
        run = runs.alone(passes, **keys)
    else:
        own = {"fsdp": SHARDED, "whole": STRATEGIES["fsdp"],
               "copies": {**SHARDED, "dp_replicate_size": 2}}  # fmt: skip
        run = runs.several(f"{method}, {name}, {processes}", processes, **keys, **(
            own.get(name) or STRATEGIES[name])
        )  # fmt: skip
    assert run.json["resumed_from"] == 4
    assert_as_one(run, first)
    if (name, processes) == ("fsdp", 4):  # as if it had not been stopped
        assert same(run.weights(), first.weights())
    assert difference(run.weights(), first.weights()) < 1e-5
    left = run.folder / f"checkpoint-{run.json['steps']}"
    assert (left / FOLDER).is_dir() == (name in ("fsdp", "copies"))


def test_shards_of_what_one_process_has_saved(runs: Runs) -> None:
    """A checkpoint of whole tensors is resumed from as before."""
    first = runs.alone(**{**SAVING, "save_steps": 4})
    start = {"resume_from_checkpoint": str(first.folder / "checkpoint-4")}
    run = runs.several("from whole", **{**SAVING, "save_steps": 4}, **SHARDED, **start)
    assert_as_one(run, first)
    assert (run.folder / "checkpoint-8" / FOLDER).is_dir()


@pytest.mark.parametrize("method", METHODS)
def test_the_commands_read_it(runs: Runs, method: str, tmp_path: Path) -> None:
    """They make of the last checkpoint what they make of the result."""
    run = saved_by_four(runs, method)
    place = checkpoints(run.folder)[-1]
    assert step_of(place) == run.json["steps"]
    ids = torch.arange(12)[None]
    logits = []
    for folder in (run.folder, place):
        model, _ = load_run(folder)
        logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
    merge(open_run(place), MergeOptions(output=tmp_path / "merged"))
    merged = weights(tmp_path / "merged")
    if method == "LoRA":
        merge(open_run(run.folder), MergeOptions(output=tmp_path / "result"))
        assert same(merged, weights(tmp_path / "result"))
    else:
        assert same(merged, run.weights())


def test_the_best_checkpoint_is_loaded_from_shards(runs: Runs) -> None:
    """The largest loss counts as the best, which is that of the first checkpoint."""
    keys = {"save_steps": 4, "eval_steps": 4, "load_best_model_at_end": True,
            "greater_is_better": True}  # fmt: skip
    run = runs.several("best", 2, **keys, **SHARDED)
    losses = {step: loss for step, loss in run.curve("eval_loss") if step}
    best = max(losses, key=lambda step: losses[step])
    assert best < run.json["steps"]
    found = stored_adapter(run.folder / f"checkpoint-{best}")
    assert same(found, run.weights())
    assert run.json["val_loss_after"] == pytest.approx(losses[best], rel=1e-5)


def stored_adapter(place: Path) -> dict[str, Tensor]:
    """The adapter in the shards of a checkpoint, put together by hand."""
    listed = json.loads((place / LIST).read_text())
    parts: dict[str, list[Tensor]] = {}
    for file in sorted(listed["files"]):
        for name, value in load_file(place / FOLDER / file).items():
            parts.setdefault(name, []).append(value)
    return {key: torch.cat(parts[f"weights/{name}"]) for key, name in listed["adapter"].items()}


def test_a_process_that_is_killed_while_it_saves(runs: Runs) -> None:
    """Every step saves; whatever is called a checkpoint is whole, and the result is the same."""
    keys = {**SAVING, **SHARDED, "save_steps": 1, "auto_resume_from_checkpoints": True}
    whole = runs.several("not killed", **keys)
    name = "killed"
    process = runs.start(name, "--nproc", "2", **keys)
    folder, end = runs.folder / name, time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if list(folder.glob(".checkpoint-*/shards/*")) and len(checkpoints(folder)) > 2:
            break
        time.sleep(0.001)
    _kill(process.pid, rank=1)
    run = runs.end(name, process)
    assert run.code == 137, run.text
    last = runs.end(name, runs.start(name, "--nproc", "2", **keys))
    assert last.code == 0, last.text
    assert last.json["resumed_from"] >= 3
    assert same(last.weights(), whole.weights())


def _kill(launcher: int, rank: int) -> None:
    children = {int(c.environ()["RANK"]): c for c in psutil.Process(launcher).children()}
    children[rank].kill()


def test_a_shard_that_is_cut_is_named(runs: Runs, tmp_path: Path) -> None:
    run = saved_by_four(runs, "LoRA")
    place = tmp_path / "checkpoint-4"
    shutil.copytree(run.folder / "checkpoint-4", place)
    shard = sorted((place / FOLDER).iterdir())[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    keys = {**SAVING, **SHARDED, "save_steps": 4, "resume_from_checkpoint": str(place)}
    failed = runs.end("cut", runs.start("cut", "--nproc", "4", **keys))
    assert failed.code == 2, failed.text
    assert failed.err.count(f"{shard} is damaged: it should have") == 1
    assert "Traceback" not in failed.text
