"""A run that was stopped goes on bit by bit as if it had not been."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.checkpoint import files as checkpoint
from fusewright.train.checkpoint import resume
from fusewright.train.recipe.keys.base import resumable
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.recipe import Recipe

from ..results import assert_same, curves, stop_at

QUIET = Console(quiet=True)


@pytest.fixture
def long(recipe: dict[str, Any]) -> dict[str, Any]:
    """Twelve steps: nearly two epochs, with dropout, momentum, a schedule and sparse logging."""
    return {
        **recipe,
        "max_steps": 12,
        "lora_dropout": 0.2,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "gradient_accumulation_steps": 2,
        "micro_batch_size": 1,
        "weight_decay": 0.1,
        "logging_steps": 3,
        "eval_steps": 4,
    }


@pytest.mark.long("4-on_evaluate", "8-on_step_begin")
@pytest.mark.parametrize(
    ("step", "event"),
    [
        (5, "on_substep_end"),  # in the middle of a step, which is not finished
        (7, "on_step_end"),
        (8, "on_step_begin"),
        (4, "on_evaluate"),
    ],
)
def test_a_signal_and_going_on(
    long: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, event: str
) -> None:
    whole = train(long, console=QUIET, output_dir=str(tmp_path / "whole"))
    assert whole.status == "finished"
    with monkeypatch.context() as patched:
        stop_at(patched, step, event)
        stopped = train(long, console=QUIET)
    assert (stopped.status, stopped.exit_code) == ("interrupted", 143)
    assert stopped.steps == step
    assert stopped.checkpoint == str(tmp_path / "out" / f"checkpoint-{stopped.steps}")
    assert stopped.val_loss_after is None
    goes_on = rf"that was stopped; .*goes on from checkpoint-{step}; to begin anew, choose"
    with pytest.raises(RecipeError, match=rf"already holds a run \(run.json\) {goes_on}"):
        train(long, console=QUIET)
    resumed = train(long, console=QUIET, resume_from_checkpoint=True)
    assert (resumed.status, resumed.resumed_from) == ("finished", stopped.steps)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert curves(resumed) == curves(whole)
    assert [e["step"] for e in resumed.history if "loss" in e] == [1, 3, 6, 9, 12]
    for name in ("val_loss_before", "val_loss_after", "tokens", "trained_tokens", "loss_first"):
        assert getattr(resumed, name) == getattr(whole, name)


@pytest.mark.long("lr_scheduler-warmup_steps0")
@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": None, "lora_target_linear": False, "neftune_noise_alpha": 5},
        {"lr_scheduler": "reduce_lr_on_plateau", "warmup_steps": None},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"optimize": True, "codegen": "eager"},
                {"optimizer": "adamw_bnb_8bit"},
                {"lr_scheduler": "one_cycle", "warmup_steps": None},
                {"group_by_length": True, "sample_packing": False},
                {"loraplus_lr_ratio": 16, "cosine_min_lr_ratio": 0.1},
            )
        ),
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
def test_whatever_has_state_goes_on(
    long: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """From a checkpoint in the middle of the first epoch, and from one of the second."""
    if "adapter" in changes:
        long = {k: v for k, v in long.items() if not k.startswith("lora")}
    asked = {**long, **changes, "max_steps": 12, "val_set_size": 8}
    train(asked, console=QUIET, output_dir=str(tmp_path / "whole"), save_steps=5)
    for step in (5, 10):
        start = tmp_path / "whole" / f"checkpoint-{step}"
        folder = str(tmp_path / str(step))
        train(asked, console=QUIET, output_dir=folder, resume_from_checkpoint=str(start))
        assert_same(tmp_path / "whole", tmp_path / str(step))


def test_the_log_has_the_rates_of_its_own_steps(recipe: dict[str, Any], tmp_path: Path) -> None:
    """An entry's rate is that of the steps since the one before, which another process may have
    made; without the step in which a process compiles."""
    asked = {**recipe, "max_steps": 7, "logging_steps": 3, "save_steps": 1}
    train(asked, console=QUIET, output_dir=str(tmp_path / "whole"))
    start = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(asked, console=QUIET, resume_from_checkpoint=start)
    kept = json.loads((tmp_path / "out" / "checkpoint-6" / "fusewright.json").read_text())["meter"]
    assert kept["compiling"] == [0, 4]
    rates = {e["step"]: e["trained_tokens_per_s"] for e in resumed.history if "loss" in e}
    for step, since in ((3, (1, 2)), (6, (3, 5))):
        trained, seconds = (sum(kept[name][i] for i in since) for name in ("trained", "seconds"))
        assert rates[step] == pytest.approx(trained / seconds)


@pytest.mark.slow
def test_compiled_blocks_go_on(long: dict[str, Any], tmp_path: Path) -> None:
    asked = {**long, "optimize": True, "codegen": "inductor", "max_steps": 6}
    train(asked, console=QUIET, output_dir=str(tmp_path / "whole"), save_steps=3)
    start = str(tmp_path / "whole" / "checkpoint-3")
    train(asked, console=QUIET, resume_from_checkpoint=start)
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_auto_resume(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    asked = {**recipe, "auto_resume_from_checkpoints": True, "save_steps": 2}
    train(asked, console=QUIET)  # nothing to go on from: it begins
    with pytest.raises(RecipeError, match="already holds a run"):
        train(asked, console=QUIET)  # it has finished
    weights = (folder / "adapter_model.safetensors").read_bytes()
    # killed after the last checkpoint, while the results were written
    (folder / "run.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(weights[:100])
    (folder / ".checkpoint-4.part").mkdir()
    (folder / ".checkpoint-2.old").mkdir()
    again = train(asked, console=QUIET)
    assert (again.status, again.steps, again.resumed_from) == ("finished", 4, 4)
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    assert [e["step"] for e in again.history if "loss" in e] == [1, 2, 3, 4]
    assert not list(folder.glob(".*"))
    # overwriting begins anew
    assert train(asked, console=QUIET, overwrite=True).resumed_from is None


@pytest.mark.long("linear")
@pytest.mark.parametrize("scheduler", ["constant", "linear"])
def test_a_finished_run_is_trained_further(
    recipe: dict[str, Any], tmp_path: Path, scheduler: str
) -> None:
    """With rates that do not depend on its length, it is the run of all steps in one go."""
    asked = {**recipe, "lr_scheduler": scheduler, "save_steps": 2, "warmup_ratio": 0}
    first = train(asked, console=QUIET)
    assert not (Path(str(first.checkpoint)) / "README.md").exists()  # PEFT's, which says nothing
    with pytest.raises(RecipeError) as refused:
        train(asked, console=QUIET, resume_from_checkpoint=True)
    assert str(refused.value) == (
        f"output_dir: {tmp_path / 'out'} already holds a run (run.json) that has finished; "
        "resume_from_checkpoint: true (--resume_from_checkpoint) goes on from checkpoint-4, with "
        "more max_steps or num_epochs; to begin anew, choose another folder, or pass --overwrite "
        "(overwrite_output_dir: true)"
    )
    steps = first.steps + 3  # beyond an epoch, too
    start = load_recipe({**asked, "max_steps": 3})
    with pytest.raises(RecipeError, match="max_steps was 4 and is 3\nThe run was planned for 4"):
        resume.load(Path(str(first.checkpoint)), start)
    with pytest.raises(RecipeError, match="max_steps was 4 and is 3\nThe run was planned for 4"):
        train(asked, console=QUIET, resume_from_checkpoint=True, max_steps=3)
    for keys in (
        {"resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2"), "max_steps": steps},
        {"resume_from_checkpoint": True, "num_epochs": 9},  # `max_steps` decides
    ):
        with pytest.raises(RecipeError, match="already holds a run"):
            train(asked, console=QUIET, **keys)
    longer = train(asked, console=QUIET, resume_from_checkpoint=True, max_steps=steps)
    assert (longer.status, longer.steps, longer.resumed_from) == ("finished", steps, first.steps)
    rates = {e["step"]: e["learning_rate"] for e in longer.history if "loss" in e}
    if scheduler == "linear":  # falls to 0 again, from where a run of this length has it
        lr = recipe["learning_rate"]
        assert [rates[s] for s in (5, 6, 7)] == pytest.approx([lr * n / steps for n in (3, 2, 1)])
        return
    whole = train(asked, console=QUIET, output_dir=str(tmp_path / "whole"), max_steps=steps)
    assert_same(tmp_path / "whole", tmp_path / "out")
    assert curves(longer) == curves(whole)


@pytest.mark.long
def test_a_run_that_was_stopped_early_is_not_trained_further(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    asked = {
        **recipe, "learning_rate": 0.3, "max_steps": 40, "eval_steps": 1, "save_steps": 1,
        "early_stopping_patience": 1, "save_total_limit": 1,
    }  # fmt: skip
    whole = train(asked, console=QUIET)
    assert whole.steps < 40
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert whole.reason == "early stopping, as eval_loss did not improve at the last validation"
    said = "ended by early stopping.* goes on from .*with a higher early_stopping_patience; to"
    for more in ({}, {"resume_from_checkpoint": True, "max_steps": 50}):
        with pytest.raises(RecipeError, match=said):
            train({**asked, **more}, console=QUIET)
    (tmp_path / "out" / "run.json").unlink()  # killed while the results were written
    out = io.StringIO()
    resumed = train(asked, console=Console(file=out, width=120), resume_from_checkpoint=True)
    assert (resumed.status, resumed.steps) == ("finished", whole.steps)
    told = " ".join(out.getvalue().split())
    further = "(a higher early_stopping_patience would train further)"
    assert f"early stopping ended training at step {whole.steps} {further}; saving the" in told
    assert f"Ended at step {whole.steps} of 40: {whole.reason}." in told
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == weights
    assert curves(resumed) == curves(whole)
    longer = {"resume_from_checkpoint": True, "early_stopping_patience": 2}
    assert train(asked, console=QUIET, **longer).steps > whole.steps


def test_what_cannot_be_resumed(recipe: dict[str, Any], rows: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no checkpoint in"):
        train(recipe, console=QUIET, resume_from_checkpoint=True)
    with pytest.raises(RecipeError, match="not both"):
        train(recipe, console=QUIET, overwrite=True, resume_from_checkpoint=True)
    with pytest.raises(RecipeError, match=r"resume_from_checkpoint: there is no .*nowhere"):
        train(recipe, console=QUIET, resume_from_checkpoint=str(tmp_path / "nowhere"))
    done = tmp_path / "done"
    train(recipe, console=QUIET, output_dir=str(done), save_steps=2)
    start = str(done / "checkpoint-2")
    with pytest.raises(RecipeError, match=r"another recipe: learning_rate was 0.01 and is 0.5"):
        train(recipe, console=QUIET, resume_from_checkpoint=start, learning_rate=0.5)
    text = rows.read_text(encoding="utf-8")
    rows.write_text(text.replace("What is 3?", "What is 33?"), encoding="utf-8")
    with pytest.raises(RecipeError, match="was trained on other rows"):
        train(recipe, console=QUIET, resume_from_checkpoint=start)
    rows.write_text(text, encoding="utf-8")
    (done / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(RecipeError, match=r"checkpoint-4 cannot be .* it has no optimizer\.pt"):
        train(recipe, console=QUIET, resume_from_checkpoint=str(done))
    (done / "checkpoint-2" / "fusewright.json").unlink()
    with pytest.raises(RecipeError, match=r"it has no fusewright\.json"):
        train(recipe, console=QUIET, resume_from_checkpoint=start)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_found_by_its_name(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = {**recipe, "resume_from_checkpoint": "checkpoint-2"}
    out = tmp_path / "out"
    with pytest.raises(RecipeError, match=f"there is no checkpoint-2 in {tmp_path} or {out}$"):
        load_recipe(asked)
    (out / "checkpoint-2").mkdir(parents=True)
    assert resume.find(load_recipe(asked)) == out / "checkpoint-2"
    (tmp_path / "checkpoint-2").mkdir()  # the current folder comes first
    assert resume.find(load_recipe(asked)) == tmp_path / "checkpoint-2"
    assert resume.find(load_recipe({**asked, "resume_from_checkpoint": "out"})) == (
        out / "checkpoint-2"
    )


def test_a_stream_needs_as_many_workers(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Each worker reads a share of the rows, so that another number would repeat or skip some."""
    streamed = {**recipe, "val_set_size": 0, "streaming": True}
    for asked, refused in ((recipe, False), (streamed, True)):
        folder = tmp_path / str(refused)
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
            (folder / name).write_text("{}")  # an empty one is damaged
        keys = load_recipe(asked).model_dump(mode="json")
        resume.Saved(keys, "", 2, {}, 0.0, 2, {}).write(folder)
        other = load_recipe({**asked, "dataloader_num_workers": 2})
        if not refused:
            assert resume.load(folder, other).step == 2
            continue
        with pytest.raises(RecipeError, match="dataloader_num_workers was 0 and is 2"):
            resume.load(folder, other)


def test_a_checkpoint_is_there_whole_or_not(tmp_path: Path) -> None:
    with checkpoint.writing(tmp_path, 3) as part:
        (part / "a").write_text("new")
        assert checkpoint.checkpoints(tmp_path) == []
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["checkpoint-3"]

    def fails(error: BaseException) -> None:
        with checkpoint.writing(tmp_path, 3) as part:
            (part / "a").write_text("newer")
            raise error

    with pytest.raises(checkpoint.CheckpointWriteError, match="the disk is full"):
        fails(OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fails(KeyboardInterrupt())
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())
    assert (tmp_path / "checkpoint-3" / "a").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-3"]
    with checkpoint.writing(tmp_path, 3) as part:  # another one of the same step takes its place
        (part / "a").write_text("newest")
    assert (tmp_path / "checkpoint-3" / "a").read_text() == "newest"


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "checkpoint-x")  # none of ours
    best, new = tmp_path / "checkpoint-1", tmp_path / "checkpoint-20"
    checkpoint.rotate(tmp_path, None, {best, new})
    assert len(checkpoint.checkpoints(tmp_path)) == 4
    checkpoint.rotate(tmp_path, 3, {best, new})
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [1, 10, 20]
    checkpoint.rotate(tmp_path, 1, {best, new})
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [1, 20]
    assert (tmp_path / "checkpoint-x").exists()


def test_the_state_of_a_run_is_written_as_it_is(recipe: dict[str, Any], tmp_path: Path) -> None:
    train(recipe, console=QUIET, save_steps=2, save_total_limit=1)
    folder = tmp_path / "out" / "checkpoint-4"
    kept = json.loads((folder / "fusewright.json").read_text())
    assert kept["step"] == 4
    assert len(kept["meter"]["seconds"]) == 4
    assert kept["recipe"]["lora_r"] == 4
    names = {p.name for p in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert not (tmp_path / "out" / "checkpoint-2").exists()


def test_going_on_elsewhere_spares_another_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    stopped = {**recipe, "save_steps": 2, "output_dir": str(tmp_path / "first")}
    train(stopped, console=QUIET)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "first", other)
    (other / "run.json").unlink()  # as a killed run leaves its folder
    there = sorted(p.name for p in other.iterdir())
    start = str(tmp_path / "first" / "checkpoint-2")
    changed = {**recipe, "output_dir": str(other), "resume_from_checkpoint": start}
    with pytest.raises(RecipeError, match="already holds a run"):
        train(changed, console=QUIET)
    assert sorted(p.name for p in other.iterdir()) == there


def test_a_run_is_not_replaced_by_one_that_is_refused(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    train(recipe, console=QUIET)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(RecipeError, match="do not fill a batch"):
        train(
            {**recipe, "micro_batch_size": 500, "dataloader_drop_last": True},
            overwrite=True, console=QUIET,
        )  # fmt: skip
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("learning_rate", False), ("use_dft", False), ("rl", False), ("sequence_len", False),
        ("wandb_name", True), ("fsdp_config", True), ("save_steps", True), ("memory", True),
        ("gc_collect_steps", True), ("gc_steps", True),  # its older name
        ("gradio_title", True),  # nothing reads it
        ("eval_batch_size", True), ("batch_size", False), ("no_key", False),
    ],
)  # fmt: skip
def test_which_keys_may_have_another_value(key: str, expected: bool) -> None:
    assert resumable(Recipe, key) is expected


def test_a_new_key_of_the_recipe_itself_may_not() -> None:
    class Longer(Recipe):
        new: bool = False
        """A key."""

    assert not resumable(Longer, "new")
    assert resumable(Longer, "save_steps")
