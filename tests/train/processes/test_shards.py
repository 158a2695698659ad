"""Checkpoints in shards: any number of processes reads them, and nothing in them is ever run."""

from __future__ import annotations

import errno
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fusewright.errors import RecipeError
from fusewright.train.checkpoint import sharded
from fusewright.train.checkpoint.files import CheckpointWriteError, checkpoints
from fusewright.train.checkpoint.resume import Saved
from fusewright.train.checkpoint.write import write_collectively
from fusewright.train.model.files import FOLDER, LIST, Shards, in_shards, shards_problem
from fusewright.train.processes.gather import names_by_group
from fusewright.train.processes.world import World

from .ranks import alone, values

# --- written by some processes, read by others ---------------------------------------------------


def _trained(world: World, seed: int, steps: int, copies: int) -> tuple[nn.Module, Any, Any]:
    """A model whose tensors cannot be shared evenly, its optimizer, and the names of both."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(3, 1))
    model.register_buffer("scale", torch.tensor([1.0 + seed]))
    model[2].weight.requires_grad_(False)
    if world.several:
        shape = (copies, world.size // copies) if copies > 1 else (world.size,)
        names = ("copies", "shards") if copies > 1 else ("shards",)
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": trained[1:]}, {"params": []}, {"params": trained[:1], "betas": (0.5, 0.75)}],
        lr=0.125,
    )
    for _ in range(steps):
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, names_by_group(model, optimizer)


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor().tolist()
    if isinstance(value, Tensor):
        return [str(value.dtype), value.item()] if value.ndim == 0 else value.tolist()
    if isinstance(value, dict):
        return {name: _whole(entry) for name, entry in value.items()}
    return value


def _state(model: nn.Module, optimizer: Any, names: Any) -> dict[str, Any]:
    """All that there is, in a form that can be compared and sent."""
    weights = {
        n: (v.full_tensor() if isinstance(v, DTensor) else v).tolist()
        for n, v in model.state_dict().items()
    }
    state = sharded.named_state(optimizer, names)
    groups = [{**group} for group in state["param_groups"]]
    return {"weights": weights, "state": _whole(state["state"]), "groups": groups}


def _save(world: World, folder: str, copies: int = 1) -> dict[str, Any]:
    model, optimizer, names = _trained(world, 0, 3, copies)

    def write(part: Path) -> None:
        kept = sharded.named_state(optimizer, names)
        files, rest = sharded.write_shards(part, world, model, kept)
        if world.main:
            Shards(part, files, None, rest).write()

    write_collectively(world, Path(folder), 3, write)
    return _state(model, optimizer, names)


def _load(world: World, folder: str, copies: int = 1) -> dict[str, Any]:
    """What another model has once it has read a checkpoint."""
    model, optimizer, names = _trained(world, 1, 1, copies)
    place = Path(folder, "checkpoint-3")
    sharded.load_weights(place, model)
    if world.several:
        sharded.load_optimizer(place, model, optimizer, names)
    else:
        optimizer.load_state_dict(sharded.read_optimizer(place, names))
    return _state(model, optimizer, names)


@pytest.mark.long("1", "2")
@pytest.mark.parametrize("copies", [1, 2])
def test_any_number_of_processes_reads_what_four_have_written(copies: int, tmp_path: Path) -> None:
    (saved, *_) = values(_save, str(tmp_path), copies, size=4)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert saved["state"]["0.weight"]["step"] == ["torch.float32", 3.0]
    assert "2.weight" not in saved["state"]
    for size, read_by in ((2, 1), (4, copies)):
        for found in values(_load, str(tmp_path), read_by, size=size):
            assert found == saved
    found = _load(alone(), str(tmp_path))
    assert found == saved


@pytest.mark.long
def test_no_process_writes_the_share_of_another(tmp_path: Path) -> None:
    (saved, *_) = values(_save, str(tmp_path), size=4)
    place = tmp_path / "checkpoint-3"
    found = Shards.read(place)
    assert {name[:11] for name in found.files} == {f"shard-{rank:05d}" for rank in (1, 2, 3, 4)}
    rows = [
        [len(load_file(path)[f"{kind}/0.weight"]) for path in sorted((place / FOLDER).iterdir())
         if f"{kind}/0.weight" in load_file(path)]
        for kind in ("weights", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    ]  # fmt: skip
    assert rows == [[2, 2, 2, 1]] * 3
    assert {p.suffix for p in (place / FOLDER).iterdir()} == {".safetensors"}
    assert found.weights().keys() == saved["weights"].keys()


def _save_on_a_full_disk(world: World, folder: str, full: int) -> list[Any]:
    if world.rank == full:

        def create_stream(*_: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        filesystem.FileSystem.create_stream = create_stream  # type: ignore[method-assign]
    try:
        _save(world, folder)
    except CheckpointWriteError as error:
        return [str(error), world.sums([1.0])]  # both have ended, and go on together
    return []


@pytest.mark.long("0")
@pytest.mark.parametrize("full", [0, 1])
def test_a_disk_that_is_full_for_one_of_them(full: int, tmp_path: Path) -> None:
    found = values(_save_on_a_full_disk, str(tmp_path), full)
    assert found == [["the disk is full", [2.0]]] * 2
    assert list(tmp_path.iterdir()) == []


# --- damaged, missing and planted files ----------------------------------------------------------


def _made(folder: Path) -> Path:
    """A checkpoint in shards, of a weight that two processes share, and its state."""
    place = folder / "checkpoint-3"
    (place / FOLDER).mkdir(parents=True)
    files = {}
    for rank in range(2):
        own = {f"{kind}/w": torch.full((2, 3), float(rank)) for kind in ("weights", "optimizer.m")}
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        offsets = {key: {"saved_offsets": [2 * rank, 0]} for key in own}
        save_file(own, place / FOLDER / name, {"DCP_SHARDING_INFO": json.dumps(offsets)})
        files[name] = (place / FOLDER / name).stat().st_size
    state = {"state": {"w": {"step": {"tensor": 3.0, "dtype": "float32"}}},
             "param_groups": [{"betas": {"tuple": [0.5, 0.75]}, "params": ["w"]}]}  # fmt: skip
    Shards(place, files, {"w.key": "w"}, state).write()
    for name in ("scheduler.pt", "trainer_state.json"):
        (place / name).write_text("{}")
    Saved({}, "rows", 3, {}, 0.0, 3, {}, 2).write(place)
    return place


WHOLE = [[0.0] * 3] * 2 + [[1.0] * 3] * 2


def test_what_is_read_from_it(tmp_path: Path) -> None:
    place = _made(tmp_path)
    assert in_shards(place)
    assert not in_shards(tmp_path)
    assert shards_problem(place) is None
    assert Saved.read(place).step == 3
    shards = Shards.read(place)
    assert {n: v.tolist() for n, v in shards.adapter_weights().items()} == {"w.key": WHOLE}
    state = sharded.read_optimizer(place, [["w"]])
    assert state["param_groups"] == [{"betas": (0.5, 0.75), "params": [0]}]
    assert state["state"][0]["m"].tolist() == WHOLE
    assert state["state"][0]["step"].dtype is torch.float32


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def _grown(path: Path) -> None:
    """As long as its header says, which is not as long as it was."""
    save_file({"weights/w": torch.zeros(9, 9)}, path)


SHARD = f"{FOLDER}/shard-00002-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (SHARD, Path.unlink, "is not there"),
        (SHARD, _cut, "is damaged: it should have"),
        (SHARD, _grown, "is damaged: it should have"),
        (SHARD, lambda path: path.write_bytes(b""), "is empty"),
        (SHARD, lambda path: path.write_bytes(pickle.dumps([1] * 99)), "does not start like a"),
        (f"{FOLDER}/other.safetensors", _grown, f"is not one of the files that {LIST} lists"),
        (LIST, lambda path: path.write_text("{"), "is not valid JSON"),
        (LIST, lambda path: path.write_text('{"format": 2}'), "was written by another version"),
        (LIST, lambda path: path.write_text('{"format": 1, "files": {}}'), "does not list"),
        (LIST, lambda path: path.write_text('{"format": 1, "files": {"../x": 1}}'), "in another"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(name: str, damage: Any, said: str, tmp_path: Path) -> None:
    place = _made(tmp_path)
    damage(place / name)
    found = shards_problem(place)
    assert found is not None
    assert said in found
    with pytest.raises(RecipeError) as error:
        Saved.read(place)
    message = str(error.value)
    assert message.startswith(f"{place} cannot be resumed from: ")
    assert said in message
    assert Path(name).name in message or "../x" in message
    assert len(message.splitlines()) == 1
    with pytest.raises(ValueError, match=r"shard"):
        sharded.read_optimizer(place, [["w"]])


def test_a_checkpoint_without_its_list(tmp_path: Path) -> None:
    place = _made(tmp_path)
    (place / LIST).unlink()
    with pytest.raises(RecipeError, match=rf"{LIST} is not there"):
        Saved.read(place)


def test_shards_that_lack_a_weight(tmp_path: Path) -> None:
    place, model = _made(tmp_path), nn.Module()
    model.w, model.other = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match="its shards have no other"):
        sharded.load_weights(place, model)
    del model.other
    sharded.load_weights(place, model)
    assert model.w.tolist() == WHOLE


class _Code:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_planted_code_is_not_run(tmp_path: Path) -> None:
    """PyTorch's other form has its metadata in a pickle of this name."""
    place, mark = _made(tmp_path), tmp_path / "mark"
    for name in (f"{FOLDER}/.metadata", "optimizer.pt", f"{FOLDER}/__0_0.distcp"):
        (place / name).write_bytes(pickle.dumps(_Code(mark)))
    assert sharded.read_optimizer(place, [["w"]])["state"][0]["m"].tolist() == WHOLE
    assert Shards.read(place).weights()["w"].tolist() == WHOLE
    assert Saved.read(place).step == 3
    assert not mark.exists()
    pickle.loads((place / "optimizer.pt").read_bytes())  # it would have been seen
    assert mark.exists()
