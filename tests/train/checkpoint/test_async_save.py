"""Checkpoints that a thread writes while the next steps run are those that were due."""

from __future__ import annotations

import errno
import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fusewright.train import train
from fusewright.train.checkpoint import snapshot, write
from fusewright.train.checkpoint.files import checkpoints
from fusewright.train.trainer.engine import EngineMixin

from ..conftest import make_model
from ..results import assert_same, curves, stop_at

QUIET = Console(quiet=True)


@pytest.fixture
def asked(recipe: dict[str, Any]) -> dict[str, Any]:
    return {
        **recipe, "max_steps": 6, "save_steps": 2, "lora_dropout": 0.2, "lr_scheduler": "cosine",
        "gradient_accumulation_steps": 2, "micro_batch_size": 1, "logging_steps": 4,
    }  # fmt: skip


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Let the thread write once the next step is done; which steps those were, and if it waited."""
    steps: list[tuple[int, bool]] = []
    done = threading.Event()

    def on_step_end(trainer: EngineMixin) -> None:
        ended(trainer)
        done.set()

    def save(model: Any, tokenizer: Any, part: Path, *rest: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            step = int(part.name.split("-")[1].partition(".")[0])
            steps.append((step, step < 6 and done.wait(60)))  # none comes after the last one
        original(model, tokenizer, part, *rest)

    def begin(checkpoints: write.Checkpoints, step: int) -> None:
        done.clear()
        began(checkpoints, step)

    ended, original, began = EngineMixin.on_step_end, write.save, write.Checkpoints._begin
    monkeypatch.setattr(EngineMixin, "on_step_end", on_step_end)
    monkeypatch.setattr(write, "save", save)
    monkeypatch.setattr(write.Checkpoints, "_begin", begin)
    return steps


def _content(folder: Path) -> dict[str, Any]:
    """What a checkpoint has, without what depends on the clock and on its key."""
    state = json.loads((folder / "trainer_state.json").read_text())
    kept = json.loads((folder / "fusewright.json").read_text())
    history = [{k: e[k] for k in ("step", "loss", "grad_norm") if k in e}
               for e in state["log_history"]]  # fmt: skip
    return {
        "files": sorted(p.name for p in folder.iterdir()),
        "history": history,
        "step": kept["step"],
        "pending": kept["pending_loss"],
        **{n: torch.load(folder / n, weights_only=False)
           for n in ("optimizer.pt", "scheduler.pt", "rng_state.pth")},
    }  # fmt: skip


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool((torch.as_tensor(one) == torch.as_tensor(other)).all()
                if hasattr(one, "shape") else one == other)  # fmt: skip


@pytest.mark.long("lora")
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
def test_checkpoints_and_the_run_are_the_same_bit_by_bit(
    asked: dict[str, Any], tmp_path: Path, late: list[tuple[int, bool]], whole: bool
) -> None:
    if whole:
        asked = {k: v for k, v in asked.items() if not k.startswith("lora")} | {"adapter": None}
    at_once, later = tmp_path / "at once", tmp_path / "later"
    expected = train(asked, console=QUIET, output_dir=str(at_once))
    assert late == []
    result = train(asked, console=QUIET, output_dir=str(later), async_save=True)
    assert late == [(2, True), (4, True), (6, False)]  # in the thread, after another step
    assert (result.status, curves(result)) == ("finished", curves(expected))
    assert_same(at_once, later)
    assert [p.name for p in checkpoints(later)] == [p.name for p in checkpoints(at_once)]
    for one, other in zip(checkpoints(at_once), checkpoints(later), strict=True):
        assert_same(one, other)
        assert _equal(_content(one), _content(other))
        if whole:
            for name in ("config.json", "generation_config.json"):
                assert (one / name).read_text() == (other / name).read_text()
    resumed = train(
        asked, console=QUIET, output_dir=str(tmp_path / "resumed"), async_save=True,
        resume_from_checkpoint=str(later / "checkpoint-2"), save_total_limit=1,
    )  # fmt: skip
    assert resumed.resumed_from == 2
    assert_same(at_once, tmp_path / "resumed")
    assert [p.name for p in checkpoints(tmp_path / "resumed")] == ["checkpoint-6"]
    assert not list((tmp_path / "resumed").glob(".*"))


def test_a_full_disk_ends_the_run_with_the_checkpoint_before(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: Any, tokenizer: Any, part: Path, *rest: Any) -> None:
        if part.name.startswith(".checkpoint-4"):
            (part / "begun").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")
        original(model, tokenizer, part, *rest)

    original, out = write.save, io.StringIO()
    monkeypatch.setattr(write, "save", save)
    result = train(asked, console=Console(file=out, width=200), async_save=True, max_steps=20)
    assert (result.status, result.exit_code) == ("disk full", 1)
    assert 4 <= result.steps <= 6  # at the latest where the next one was due
    assert result.checkpoint == str(tmp_path / "out" / "checkpoint-2")
    said = out.getvalue()
    assert "The last checkpoint could not be written: the disk is full." in said
    assert "saved checkpoint-2" in said
    assert "saved checkpoint-4" not in said
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert not list((tmp_path / "out").glob(".*"))


def test_any_other_error_ends_the_run_as_it_is(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*args: Any) -> None:
        raise ZeroDivisionError("in the thread")

    monkeypatch.setattr(write, "save", save)
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        train(asked, console=QUIET, async_save=True)
    assert not list((tmp_path / "out").glob("*checkpoint*"))


@pytest.mark.long
def test_a_signal_while_one_is_written(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends after the step, and has a checkpoint of that; nothing is left half written."""

    def save(*args: Any) -> None:
        time.sleep(0.3)
        original(*args)

    original = write.save
    train(asked, console=QUIET, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        patched.setattr(write, "save", save)
        stop_at(patched, 3, "on_step_end")
        stopped = train(asked, console=QUIET, async_save=True)
    assert (stopped.status, stopped.steps) == ("interrupted", 3)
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    assert not list((tmp_path / "out").glob(".*"))
    train(asked, console=QUIET, async_save=True, resume_from_checkpoint=True)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_without_room_for_a_copy_they_are_written_at_once(
    asked: dict[str, Any], tmp_path: Path, late: list[tuple[int, bool]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = io.StringIO()
    monkeypatch.setattr(snapshot.Meter, "host", lambda _: 1000)
    train(asked, console=Console(file=out, width=200), async_save=True, val_set_size=0)
    assert late == []
    assert [p.name for p in checkpoints(tmp_path / "out")] == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6",
    ]  # fmt: skip
    assert out.getvalue().count("async_save: checkpoints are written at once: a copy takes") == 1


def test_a_copy_has_nothing_of_what_changes() -> None:
    state = {"state": {0: {"step": torch.tensor(1.0), "m": torch.ones(3)}}, "groups": [{"lr": 1}]}
    copied = snapshot.to_host(state)
    state["state"][0]["m"] += 1
    state["groups"][0]["lr"] = 2
    assert copied["state"][0]["m"].tolist() == [1.0, 1.0, 1.0]
    assert copied["groups"] == [{"lr": 1}]


def test_tied_weights_stay_one() -> None:
    model = make_model(tie_word_embeddings=True)
    shadow, weights = snapshot.snapshot(model)
    head, embeddings = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    assert head is embeddings
    assert head.data_ptr() != model.lm_head.weight.data_ptr()
    assert shadow.config is not model.config
    assert shadow.model is model.model
