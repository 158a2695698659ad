"""Resuming with another number of processes: only where a step trains as many batches."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.checkpoint import resume
from fusewright.train.processes.world import World
from fusewright.train.recipe.load import load_recipe
from fusewright.train.trainer.engine import FineTuner

from .ranks import values


def _checkpoint(
    folder: Path, recipe: dict[str, Any], processes: int | None, **changes: Any
) -> Path:
    """A checkpoint that so many processes have made; None: by a version that knew only one."""
    folder.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (folder / name).write_text("{}")
    keys = {**load_recipe(recipe).recorded(), **changes}
    resume.Saved(keys, "rows", 2, {}, 0.0, 1, {}, processes or 1).write(folder)
    if processes is None:
        record = folder / "fusewright.json"
        content = json.loads(record.read_text())
        del content["processes"]
        record.write_text(json.dumps(content))
    return folder


def _refused(made: Path, recipe: dict[str, Any], processes: int) -> str:
    with pytest.raises(RecipeError) as error:
        resume.load(made, load_recipe(recipe), processes)
    return str(error.value)


FITTING = [
    # made by, with so many passes each; resumed by, with so many
    (1, 4, 2, 2),
    (1, 4, 4, 1),
    (2, 2, 1, 4),
    (2, 3, 2, 3),
    (2, 3, 3, 2),
    (4, 1, 2, 2),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize(("made_by", "then", "here", "now"), FITTING)
def test_a_number_of_passes_that_makes_up_for_the_processes(
    recipe: dict[str, Any], tmp_path: Path, made_by: int, then: int, here: int, now: int
) -> None:
    recipe["gradient_accumulation_steps"] = then
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, made_by)
    assert json.loads((made / "fusewright.json").read_text())["processes"] == made_by
    fitting = load_recipe({**recipe, "gradient_accumulation_steps": now})
    assert resume.load(made, fitting, here).processes == made_by
    # the dry run does not know how many there will be
    assert resume.load(made, fitting, None).step == 2


@pytest.mark.parametrize(
    ("made_by", "then", "here", "now", "said"),
    [
        (
            2, 1, 1, 1,
            "by 2 processes with 2 forward passes per step in all, and here are 1 with 1 each; "
            "set gradient_accumulation_steps: 2",
        ),
        (
            1, 4, 2, 4,
            "by 1 process with 4 forward passes per step in all, and here are 2 with 4 each; "
            "set gradient_accumulation_steps: 2",
        ),
        (2, 2, 2, 1, "set gradient_accumulation_steps: 2"),
        (2, 2, 3, 1, "use a number of processes that divides 4"),
        (1, 1, 2, 1, "use a number of processes that divides 1"),
    ],
)  # fmt: skip
def test_a_number_of_passes_that_does_not(
    recipe: dict[str, Any], tmp_path: Path, made_by: int, then: int, here: int, now: int, said: str
) -> None:
    recipe["gradient_accumulation_steps"] = then
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, made_by)
    message = _refused(made, {**recipe, "gradient_accumulation_steps": now}, here)
    assert message.startswith(f"{made} was made by ")
    assert message.endswith(said)
    assert len(message.splitlines()) == 1
    if "gradient_accumulation_steps: " in said:  # then it does fit
        fitting = {**recipe, "gradient_accumulation_steps": int(said.rpartition(" ")[2])}
        assert resume.load(made, load_recipe(fitting), here).step == 2


def test_one_process_is_compared_key_by_key(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, 1)
    message = _refused(made, {**recipe, "gradient_accumulation_steps": 2}, 1)
    assert "gradient_accumulation_steps was 1 and is 2" in message


def test_by_the_size_of_the_whole_batch(recipe: dict[str, Any], tmp_path: Path) -> None:
    """``batch_size`` is that of one process; it says how many passes there are."""
    recipe |= {"batch_size": 4, "micro_batch_size": 2}
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, 2)
    assert resume.load(made, load_recipe(recipe), 2).step == 2
    assert resume.load(made, load_recipe({**recipe, "batch_size": 8}), 1).step == 2
    assert resume.load(made, load_recipe({**recipe, "batch_size": 2}), 4).step == 2
    assert "with 4 forward passes per step in all" in _refused(made, recipe, 1)


def test_other_keys_count_as_before(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, 2)
    fitting = {**recipe, "gradient_accumulation_steps": 2}
    assert "learning_rate was 0.01 and is 0.5" in _refused(
        made, {**fitting, "learning_rate": 0.5}, 1
    )
    # the number of rows in a forward pass is not made up for by anything
    assert "micro_batch_size was 2 and is 1" in _refused(
        made, {**fitting, "micro_batch_size": 1}, 1
    )


def test_another_strategy_is_no_other_recipe(recipe: dict[str, Any], tmp_path: Path) -> None:
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, 2)
    for keys in (
        {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"offload_params": True}},
        {"fsdp": True, "dp_replicate_size": 2},
        {"deepspeed": "deepspeed_configs/zero3.json"},
        {"ddp_find_unused_parameters": True},
    ):
        assert resume.load(made, load_recipe({**recipe, **keys}), 2).step == 2


def test_a_record_of_a_version_that_knew_one_process(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["gradient_accumulation_steps"] = 2
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, None)
    assert resume.load(made, load_recipe(recipe), 1).processes == 1
    one = {**recipe, "gradient_accumulation_steps": 1}
    assert resume.load(made, load_recipe(one), 2).processes == 1
    message = _refused(made, recipe, 2)
    assert "by 1 process with 2 forward passes per step in all, and here are 2" in message


@pytest.mark.parametrize("name", ["sequence_parallel_degree", "context_parallel_size"])
def test_a_record_with_keys_of_another_version(
    name: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    old = _checkpoint(tmp_path / "checkpoint-2", recipe, None, **{name: 1})
    assert resume.load(old, load_recipe(recipe), 1).step == 2
    assert resume.load(old, load_recipe({**recipe, name: 1}), 1).step == 2
    two = _checkpoint(tmp_path / "checkpoint-4", recipe, 2, **{name: 1})
    assert resume.load(two, load_recipe({**recipe, "gradient_accumulation_steps": 2}), 1)


def test_a_record_whose_number_of_processes_is_damaged(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    made = _checkpoint(tmp_path / "checkpoint-2", recipe, 2)
    record = made / "fusewright.json"
    content = json.loads(record.read_text())
    for wrong in ("2", None, 0, -1, 1.5, True):
        record.write_text(json.dumps({**content, "processes": wrong}))
        assert "its fusewright.json is damaged" in _refused(made, recipe, 2), wrong


def test_masters_of_deepspeed_do_not_stay_where_nothing_trains_them(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Its next run would take them for the weights."""
    keys = {**recipe, "save_steps": 2}
    train(keys)
    first = Path(recipe["output_dir"]) / "checkpoint-2" / "optimizer.pt"
    state = torch.load(first, weights_only=True)
    for own in state["state"].values():
        own["master"] = torch.zeros_like(own["exp_avg"])
    torch.save(state, first)
    train({**keys, "output_dir": str(tmp_path / "b"), "resume_from_checkpoint": str(first.parent)})
    last = torch.load(tmp_path / "b" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {len(values) for values in last["state"].values()} == {3}


def _states(world: World, folder: str) -> float:
    """The next random number, of two processes that train the same batch."""
    world.share_batches(2)
    torch.manual_seed(world.rank)
    trainer: Any = object.__new__(FineTuner)
    trainer.world = world
    trainer.args = SimpleNamespace(world_size=2, process_index=world.rank, parallel_mode=None)
    trainer._save_rng_state(folder)
    trainer._load_rng_state(folder)
    return torch.rand(()).item()


@pytest.mark.long
def test_processes_of_a_group_draw_the_same_whatever_a_checkpoint_has(tmp_path: Path) -> None:
    """One of data parallelism has other random states for each."""
    first, second = values(_states, str(tmp_path))
    assert first == second
