"""What a checkpoint keeps besides the weights: written, read, compared, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch

from fusewright.errors import RecipeError
from fusewright.train import preflight
from fusewright.train.checkpoint import resume
from fusewright.train.checkpoint.output_folder import check_output
from fusewright.train.recipe.load import load_recipe

NEEDED = ("optimizer.pt", "scheduler.pt", "trainer_state.json")


def _checkpoint(folder: Path, recipe: dict[str, Any], **changes: Any) -> Path:
    """A checkpoint of a recipe; ``changes`` are to its keys, once they are filled in."""
    folder.mkdir(parents=True)
    for name in NEEDED:
        (folder / name).write_text("{}")
    keys = {**load_recipe(recipe).recorded(), **changes}
    resume.Saved(keys, "rows", 2, {"seconds": [1.5]}, 0.25, 1, {"a": 1}).write(folder)
    return folder


@pytest.fixture
def made(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A checkpoint of the recipe."""
    return _checkpoint(tmp_path / "checkpoint-2", recipe)


def _refused(made: Path, change: Callable[[Path], Any]) -> str:
    change(made)
    with pytest.raises(RecipeError) as error:
        resume.Saved.read(made)
    return str(error.value)


def _edited(**changes: Any) -> Callable[[Path], None]:
    """Change fields of the record; None removes one."""

    def edit(folder: Path) -> None:
        path = folder / "fusewright.json"
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return edit


# ----------------------------------------------------------------------------- written and read


def test_what_is_written_is_read(made: Path) -> None:
    found = resume.Saved.read(made)
    assert (found.data, found.step, found.meter) == ("rows", 2, {"seconds": [1.5]})
    assert (found.pending_loss, found.last_logged, found.carried) == (0.25, 1, {"a": 1})
    assert found.recipe["lora_r"] == 4
    text = (made / "fusewright.json").read_text()
    assert text.endswith("}\n")
    assert len(text.splitlines()) > 10  # one can read it
    assert json.loads(text)["format"] == 1  # as in the checkpoints that there are


@pytest.mark.parametrize("name", NEEDED)
def test_a_file_that_is_missing(made: Path, name: str) -> None:
    said = _refused(made, lambda p: (p / name).unlink())
    assert said == (
        f"{made} cannot be resumed from: it has no {name} (save_only_model: true leaves that out)"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda p: (p / "fusewright.json").write_text("{"),
        lambda p: (p / "fusewright.json").write_bytes(b"\xff"),
        _edited(step="2"),
        _edited(recipe=["lora_r"]),
        _edited(step=None),
        _edited(more=1),
    ],
)
def test_a_record_that_is_damaged(made: Path, change: Callable[[Path], Any]) -> None:
    said = _refused(made, change)
    assert said.startswith(f"{made} cannot be resumed from: its fusewright.json is damaged; name")


@pytest.mark.parametrize(
    "change",
    [_edited(format=2), _edited(format=None), lambda p: (p / "fusewright.json").write_text("[1]")],
)
def test_a_record_of_another_version(made: Path, change: Callable[[Path], Any]) -> None:
    assert "another version wrote its fusewright.json" in _refused(made, change)


def test_no_record(made: Path) -> None:
    said = _refused(made, lambda p: (p / "fusewright.json").unlink())
    assert "it has no fusewright.json, so this version did not write it" in said


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "pytorch_model.bin", "more.json"]
)
def test_another_file_that_is_damaged(made: Path, name: str) -> None:
    assert f"{name} is empty; name an earlier" in _refused(
        made, lambda p: (p / name).write_text("")
    )


def test_files_that_are_none_of_its_own_are_not_looked_at(made: Path) -> None:
    (made / "notes.txt").write_text("")
    (made / "folder.json").mkdir()
    assert resume.Saved.read(made).step == 2


# ------------------------------------------------------------------------------------ which one


def _find(recipe: dict[str, Any], **changes: Any) -> Path | None:
    return resume.find(load_recipe({**recipe, **changes}))


def test_which_checkpoint_is_meant(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    auto = {"auto_resume_from_checkpoints": True}
    assert _find(recipe) is None
    assert _find(recipe, **auto) is None
    with pytest.raises(RecipeError, match="there is no checkpoint in"):
        _find(recipe, resume_from_checkpoint=True)
    for step in (2, 10, 9):
        (out / f"checkpoint-{step}").mkdir(parents=True)
    assert _find(recipe) is None
    for wanted in (auto, {"resume_from_checkpoint": True}):
        assert _find(recipe, **wanted) == out / "checkpoint-10"
    assert _find(recipe, **auto, overwrite_output_dir=True) is None
    named = str(out / "checkpoint-9")
    assert _find(recipe, resume_from_checkpoint=named) == Path(named)
    assert _find(recipe, resume_from_checkpoint=str(out)) == out / "checkpoint-10"
    # it names where to begin; what is in output_dir may go
    over = {"resume_from_checkpoint": named, "overwrite_output_dir": True}
    assert _find(recipe, **over) == Path(named)


def test_a_run_that_has_ended_says_how_it_goes_on(recipe: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text('{"status": "finished", "steps": 2}')
    with pytest.raises(RecipeError, match=r"there is no .*; to train its weights further in a new"):
        _find(recipe, resume_from_checkpoint=True)
    for name, changes, lost, said in (
        ("any", {}, (), " goes on from checkpoint-2, with more max_steps or num_epochs; to begin"),
        ("fixed", {"lr_scheduler": "one_cycle", "warmup_steps": None}, (),
         "it cannot be trained further with lr_scheduler: one_cycle; to begin anew"),
        ("weights", {"save_only_model": True}, NEEDED, "it has no optimizer.pt (save_only_model: "),
    ):  # fmt: skip
        shutil.rmtree(out / "checkpoint-2", ignore_errors=True)
        made = _checkpoint(out / "checkpoint-2", {**recipe, **changes})
        for file in lost:
            (made / file).unlink()
        with pytest.raises(
            RecipeError, match=r"already holds a run .* that has finished; "
        ) as ended:
            check_output(out, overwrite=False)
        assert said in str(ended.value), name
        assert ("goes on from" in str(ended.value)) == (name == "any")


def test_a_checkpoint_is_read_once_before_a_run(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _checkpoint(tmp_path / "out" / "checkpoint-2", recipe)
    reads: list[Path] = []
    read = resume.Saved.read
    monkeypatch.setattr(resume.Saved, "read", lambda folder: reads.append(folder) or read(folder))
    longer = load_recipe({**recipe, "resume_from_checkpoint": True, "max_steps": 9})
    assert list(preflight._output(longer, 1)) == []
    assert len(reads) == 1


def test_both_at_once(recipe: dict[str, Any]) -> None:
    asked = load_recipe(recipe).model_copy(
        update={"resume_from_checkpoint": True, "overwrite_output_dir": True}
    )
    with pytest.raises(RecipeError, match="set only one"):
        resume.find(asked)


def test_a_name_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "checkpoint-3").write_text("no folder")
    (tmp_path / "empty").mkdir()
    for name in ("file", "checkpoint-3", "empty", "nowhere"):
        with pytest.raises(RecipeError, match=f"there is no checkpoint {tmp_path / name}"):
            resume._named(tmp_path / name)


# ------------------------------------------------------------------------------ whether it fits


def test_the_same_recipe_fits(recipe: dict[str, Any], made: Path) -> None:
    found = resume.Resumed(made, resume.load(made, load_recipe(recipe)))
    resume.require_same_data(found, "rows")
    with pytest.raises(RecipeError, match="was trained on other rows"):
        resume.require_same_data(found, "other rows")


def test_one_key_that_is_another(recipe: dict[str, Any], made: Path) -> None:
    with pytest.raises(RecipeError) as error:
        resume.load(made, load_recipe({**recipe, "learning_rate": 0.5}))
    assert str(error.value) == (
        f"{made} was made by another recipe: learning_rate was 0.01 and is 0.5; set it back, or "
        "start a new run from its weights, with lora_model_dir (or base_model)"
    )


def test_fewer_steps(recipe: dict[str, Any], made: Path) -> None:
    (made / "trainer_state.json").write_text('{"max_steps": 1234}')
    with pytest.raises(RecipeError) as error:
        resume.load(made, load_recipe({**recipe, "max_steps": 1}))
    said = (
        f"{made} was made by another recipe: max_steps was {recipe['max_steps']} and is 1\n"
        "The run was planned for 1,234 steps, and is not planned anew for fewer. It can be stopped "
        "earlier (Ctrl-C saves it), and it can be made longer.\n"
        "Set it back, or start a new run from its weights"
    )
    assert str(error.value).startswith(said)


def test_fewer_and_more_steps_than_epochs_had(recipe: dict[str, Any], made: Path) -> None:
    by_rows = {**recipe, "max_steps": None, "num_epochs": 2}
    resume.Saved(load_recipe(by_rows).recorded(), "rows", 2, {}, 0.25, 1, {}).write(made)
    (made / "trainer_state.json").write_text('{"max_steps": 12}')
    with pytest.raises(RecipeError, match=r"max_steps was \S+ and is 3\n.* planned for 12 steps"):
        resume.load(made, load_recipe({**by_rows, "max_steps": 3}))
    longer = load_recipe({**by_rows, "max_steps": 13})
    assert resume.load(made, longer).longer_keys(longer) == {"max_steps"}


def test_several_keys_that_are_others(recipe: dict[str, Any], made: Path) -> None:
    with pytest.raises(RecipeError) as error:
        resume.load(made, load_recipe({**recipe, "learning_rate": 0.5, "lora_r": 8}))
    lines = str(error.value).splitlines()
    assert lines[0] == f"{made} was made by another recipe:"
    assert lines[1:3] == ["  learning_rate was 0.01 and is 0.5", "  lora_r was 4 and is 8"]
    assert lines[3].startswith("Set them back; or start a new run")


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": "elsewhere"}, {"save_steps": 3}, {"logging_steps": 7},
        {"eval_steps": 3, "eval_batch_size": 7}, {"memory": "min"}, {"dataloader_num_workers": 1},
    ],
)  # fmt: skip
def test_keys_that_change_nothing_of_what_is_trained(
    recipe: dict[str, Any], made: Path, changes: dict[str, Any]
) -> None:
    assert resume.load(made, load_recipe({**recipe, **changes})).step == 2


def test_keys_that_only_one_version_has(recipe: dict[str, Any], tmp_path: Path) -> None:
    old = _checkpoint(tmp_path / "old", recipe, gone=3, save_gone=4)
    with pytest.raises(RecipeError, match="gone was 3 and is null"):
        resume.load(old, load_recipe(recipe))
    lacking = tmp_path / "lacking"
    _checkpoint(lacking, recipe)
    recorded = json.loads((lacking / "fusewright.json").read_text())
    del recorded["recipe"]["lora_r"]
    (lacking / "fusewright.json").write_text(json.dumps(recorded))
    with pytest.raises(RecipeError, match="lora_r was null and is 4"):
        resume.load(lacking, load_recipe(recipe))


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        (1, 1, []),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ["k.b was 2 and is 3"]),
        ({"a": 1}, {"b": 1}, ["k.a was 1 and is null", "k.b was null and is 1"]),
        ([1, 2, 3], [1, 5, 6], ["k.1 was 2 and is 5", "k.2 was 3 and is 6"]),
        ([1, 2], [1], ["k was [1, 2] and is [1]"]),
        ([{"path": "a"}], [{"path": "b"}], ['k.0.path was "a" and is "b"']),
        ({"a": 1}, [1], ['k was {"a": 1} and is [1]']),
        ([1], {"a": 1}, ['k was [1] and is {"a": 1}']),
        (None, "x", ['k was null and is "x"']),
    ],
)
def test_what_is_not_as_it_was(then: Any, now: Any, lines: list[str]) -> None:
    assert list(resume._differences(then, now, "k")) == lines


# -------------------------------------------------------------------------------- foreign code


class _Anything:
    """No tensor."""


def _unreadable(path: Path | None) -> None:
    with resume.without_code(path):
        raise UnpicklingError("no")


def test_which_file_holds_more_than_tensors(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"a": _Anything()}, tmp_path / "b.pth")
    torch.save({"a": _Anything()}, tmp_path / "c.pt")
    with pytest.raises(RecipeError, match=r"b\.pth is damaged, or holds foreign code"):
        _unreadable(tmp_path)
    (tmp_path / "b.pth").unlink()
    with pytest.raises(RecipeError, match=r"c\.pt is damaged, or holds foreign code"):
        _unreadable(tmp_path)
    (tmp_path / "c.pt").unlink()
    with pytest.raises(RecipeError, match="one of its files is damaged"):
        _unreadable(tmp_path)
    with pytest.raises(UnpicklingError):
        _unreadable(None)
    with resume.without_code(tmp_path):
        pass
