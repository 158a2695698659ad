"""Checkpoints that cannot be gone on from: damaged, of another run, or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from fusewright.train import train

from ..conftest import chat, small_recipe
from .box import ROW, Bad, Box, Make, check, keys


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of a run that was to take four steps."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "rows.jsonl").write_text(f"{ROW}\n" * 12)
    recipe = small_recipe(base, folder / "rows.jsonl", folder / "out")
    train({**recipe, "save_steps": 2, "max_steps": 4}, console=Console(quiet=True))
    return folder / "out" / "checkpoint-2"


def resumed(change: Callable[[Path], Any], **changed: Any) -> Make:
    """Going on from a changed copy of the checkpoint."""

    def make(box: Box) -> list[str]:
        folder = box.folder / "checkpoint-2"
        change(folder)
        return box.recipe(save_steps=2, resume_from_checkpoint=str(folder), **changed)

    return make


def cut(name: str, size: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def holds(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def no_step(folder: Path) -> None:
    path = folder / "fusewright.json"
    content = json.loads(path.read_text())
    del content["step"]
    path.write_text(json.dumps(content))


def other_groups(folder: Path) -> None:
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["param_groups"] = state["param_groups"] * 3
    torch.save(state, folder / "optimizer.pt")


def wider(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {k: torch.cat([v, v]) for k, v in tensors.items()}, folder / "adapter_model.safetensors"
    )


def other_rows(folder: Path) -> None:
    (folder.parent / "rows.jsonl").write_text(f"{json.dumps(chat('other', 'rows'))}\n" * 12)


def nothing(folder: Path) -> None:
    pass


EARLIER = "name an earlier checkpoint in resume_from_checkpoint, or start from the beginning"
CASES = {
    "no checkpoint": Bad(
        keys(overwrite_output_dir=None, resume_from_checkpoint=True),
        "resume_from_checkpoint", "there is no checkpoint in",
    ),
    "no folder": Bad(
        keys(resume_from_checkpoint="checkpoint-9"), "resume_from_checkpoint", "there is no check"
    ),
    "another folder": Bad(
        keys(resume_from_checkpoint="out"), "resume_from_checkpoint", "there is no checkpoint"
    ),
    "not ours": Bad(
        resumed(without("fusewright.json")), "it has no fusewright.json", "for its weights alone se"
    ),
    "a broken record": Bad(resumed(holds("fusewright.json", "{")), "its fusewright.json", EARLIER),
    "half a record": Bad(resumed(no_step), "its fusewright.json is damaged", EARLIER),
    "no optimizer": Bad(
        resumed(without("optimizer.pt")), "it has no optimizer.pt", "save_only_model: true leaves"
    ),
    "half an optimizer": Bad(
        resumed(cut("optimizer.pt", 2000)), "optimizer.pt is damaged: its end is missing", EARLIER
    ),
    "an optimizer of another run": Bad(
        resumed(other_groups), "checkpoint-2 cannot be resumed from: ", EARLIER, late=True
    ),
    "half of the weights": Bad(
        resumed(cut("adapter_model.safetensors", 9000)), "adapter_model.safetensors is dam", EARLIER
    ),
    "weights of another size": Bad(resumed(wider), "size mismatch for", EARLIER, late=True),
    "a broken state": Bad(
        resumed(holds("trainer_state.json", "{oops")), "trainer_state.json is not valid", EARLIER
    ),
    "another state": Bad(
        resumed(holds("trainer_state.json", '{"x": 1}')), "checkpoint-2 cannot", EARLIER, late=True
    ),
    "half of the random state": Bad(
        resumed(cut("rng_state.pth", 500)), "rng_state.pth is damaged", EARLIER
    ),
    "another recipe": Bad(
        resumed(nothing, learning_rate=1e-3),
        "was made by another recipe: learning_rate was 0.01 and is 0.001", "set it back, or start",
    ),
    "a key inside another": Bad(
        resumed(nothing, datasets=[{"path": "rows.jsonl", "train_on_eos": "last"}]),
        'datasets.0.train_on_eos was "turn" and is "last"', "set it back, or start",
    ),
    "other rows": Bad(
        resumed(other_rows), "was trained on other rows", "restore them, or start a new run"
    ),
    "no state to go on from": Bad(
        keys(resume_from_checkpoint=True, save_only_model=True, overwrite_output_dir=None),
        "resume_from_checkpoint", "needs save_only_model: false",
    ),
}  # fmt: skip


@pytest.fixture
def box(base: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "checkpoint-2")
    record = tmp_path / "checkpoint-2" / "fusewright.json"
    rows = str(checkpoint.parent.parent / "rows.jsonl")
    record.write_text(record.read_text().replace(rows, str(tmp_path / "rows.jsonl")))
    return Box(tmp_path, base)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_refused(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], box, monkeypatch)


def test_the_checkpoint_can_be_gone_on_from(box: Box) -> None:
    from ..commands import fusewright

    result = fusewright(*resumed(nothing)(box))
    assert result.exit_code == 0, result.output
