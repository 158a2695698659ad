"""A checkpoint that two processes write: it is there whole for both of them, or for none."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fusewright.train.checkpoint import files
from fusewright.train.checkpoint.files import CheckpointWriteError, checkpoints
from fusewright.train.checkpoint.write import write_collectively
from fusewright.train.processes.launchers import Placement
from fusewright.train.processes.world import World

from .ranks import run_ranks, values

FULL = OSError(errno.ENOSPC, "No space left on device")


def _save(world: World, folder: str, full: list[int], step: int = 3) -> dict[str, Any]:
    """Write a checkpoint, on a disk that is full for some of the processes."""
    place = files.place(Path(folder), step)
    early: list[bool] = []

    def write(part: Path) -> None:
        world.most(0)  # as the weights are brought together
        (part / f"of-{world.rank}").write_text("x")
        if world.rank in full:
            raise FULL
        time.sleep(0.2 * world.rank)
        early.append(place.exists())

    error = None
    try:
        write_collectively(world, Path(folder), step, write)
    except CheckpointWriteError as raised:
        error = str(raised)
    # both have ended, and go on together
    return {"error": error, "early": early, "sum": world.sums([1.0])}


def _there(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_both_write_into_it(tmp_path: Path) -> None:
    for found in values(_save, str(tmp_path), []):
        assert found == {"error": None, "early": [False], "sum": [2.0]}
    assert _there(tmp_path) == ["checkpoint-3", "checkpoint-3/of-0", "checkpoint-3/of-1"]


@pytest.mark.parametrize("full", [[0], [1], [0, 1]])
def test_a_disk_that_is_full_for_one_of_them(full: list[int], tmp_path: Path) -> None:
    for found in values(_save, str(tmp_path), full):
        assert (found["error"], found["sum"]) == ("the disk is full", [2.0])
    assert _there(tmp_path) == []


def _twice(world: World, folder: str) -> list[Any]:
    return [_save(world, folder, full, step)["error"] for full, step in (([1], 3), ([], 4))]


def test_the_next_one_may_have_room_again(tmp_path: Path) -> None:
    assert values(_twice, str(tmp_path)) == [["the disk is full", None]] * 2
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-4"]


def test_a_folder_that_rank_0_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for found in values(_save, str(tmp_path / "file" / "out"), []):
        assert found == {"error": "Not a directory", "early": [], "sum": [2.0]}
    assert _there(tmp_path) == ["file"]


def _full_at_the_end(world: World, folder: str) -> dict[str, Any]:
    def to_disk(path: Path) -> None:
        raise FULL

    files._to_disk = to_disk
    return _save(world, folder, [])


def test_a_disk_that_is_full_when_all_have_written(tmp_path: Path) -> None:
    for found in values(_full_at_the_end, str(tmp_path)):
        assert (found["error"], found["sum"]) == ("the disk is full", [2.0])
    assert _there(tmp_path) == []


def _slow(world: World, folder: str) -> list[float]:
    def write(part: Path) -> None:
        if world.main:
            time.sleep(4.0)

    write_collectively(world, Path(folder), 3, write)
    return world.sums([1.0])


@pytest.mark.long
def test_writing_takes_as_long_as_it_takes(tmp_path: Path) -> None:
    """Rank 0 writes a whole model, and the others nothing: no collective waits for it."""
    assert values(_slow, str(tmp_path), timeout=2.0) == [[2.0]] * 2
    assert _there(tmp_path) == ["checkpoint-3"]


def _broken(world: World, folder: str, which: int) -> None:
    def write(part: Path) -> None:
        if world.rank == which:
            raise KeyError("unforeseen")

    write_collectively(world, Path(folder), 3, write)


@pytest.mark.parametrize("which", [0, 1])
def test_any_other_error_ends_both(which: int, tmp_path: Path) -> None:
    ended = run_ranks(_broken, str(tmp_path), which)
    assert ended[which].error == "KeyError"
    assert ended[1 - which].error in ("ProcessLostError", "SystemExit")
    assert _there(tmp_path) == []


def test_one_process_writes_alone(tmp_path: Path) -> None:
    def write(part: Path) -> None:
        (part / "a").write_text("x")

    write_collectively(World(), tmp_path, 2, write)
    assert _there(tmp_path) == ["checkpoint-2", "checkpoint-2/a"]

    def full(part: Path) -> None:
        raise FULL

    with pytest.raises(CheckpointWriteError, match="the disk is full"):
        write_collectively(World(), tmp_path, 3, full)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-2"]


class _Trainer(SimpleNamespace):
    """Notes what it is asked for; what begins with ``all`` needs all processes."""

    def __init__(self, rank: int, only_model: bool) -> None:
        self.calls: list[str] = []

        def noted(name: str) -> Any:
            return lambda *_: self.calls.append(name)

        super().__init__(
            world=World(Placement(rank, 2, rank, 2)),
            state=SimpleNamespace(save_to_json=noted("state"), stateful_callbacks={}),
            args=SimpleNamespace(save_only_model=only_model),
            sharding=SimpleNamespace(
                writes_shards=False,
                whole_state=noted("all: weights"), optimizer_state=noted("all: optimizer"),
                schedule_state=noted("schedule"),
            ),
            store_flos=noted("all: operations"),
            _save_scaler=noted("scaler"), _save_rng_state=noted("random state"),
            model=None, context=SimpleNamespace(tokenizer=None, recipe=None),
            callback_handler=SimpleNamespace(callbacks=[]),
        )  # fmt: skip


@pytest.mark.parametrize("only_model", [False, True])
def test_what_needs_all_of_them_comes_before_what_a_full_disk_can_stop(
    only_model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others would wait for a process that has met a full disk."""
    from fusewright.train.checkpoint import write

    together = []
    for rank in range(2):
        trainer = _Trainer(rank, only_model)
        monkeypatch.setattr(write, "save", lambda *_, calls=trainer.calls: calls.append("weights"))
        saved: Any = SimpleNamespace(write=lambda _, calls=trainer.calls: calls.append("record"))
        write.write_checkpoint(trainer, tmp_path, saved, None)
        kinds = [call.startswith("all") for call in trainer.calls]
        assert kinds == sorted(kinds, reverse=True), trainer.calls
        assert any(kinds)
        assert ("weights" in trainer.calls) == ("record" in trainer.calls) == (rank == 0)
        assert ("random state" in trainer.calls) == (not only_model)
        together.append([call for call in trainer.calls if call.startswith("all")])
    assert together[0] == together[1]
