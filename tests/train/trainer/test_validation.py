"""Validations of whole runs: when they are made, and what they decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.trainer.engine import FineTuner
from fusewright.train.trainer.evaluation import require_figure

QUIET = Console(quiet=True)


@pytest.mark.long
def test_the_best_checkpoint_and_stopping_early(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A learning rate at which the loss soon only trembles."""
    result = train(
        recipe, console=QUIET, learning_rate=0.3, max_steps=40, eval_steps=1, save_steps=1,
        save_total_limit=1, load_best_model_at_end=True, early_stopping_patience=3,
    )  # fmt: skip
    losses = {e["step"]: e["eval_loss"] for e in result.history if "eval_loss" in e and e["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert result.steps == best + 3 < 40
    assert result.status == "finished"
    assert result.val_loss_after == pytest.approx(losses[best], rel=1e-5)
    there = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert there == sorted({f"checkpoint-{best}", f"checkpoint-{result.steps}"})


def test_the_best_of_the_checkpoints_and_of_a_moved_run(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    """The best validation has no checkpoint of its own; the best of those that have one counts.

    The learning rate falls below zero after the seventh step: from there on the loss grows, by far
    more than processors round differently.
    """
    asked = {
        **recipe, "learning_rate": 0.02, "lr_scheduler": "polynomial", "max_steps": 10,
        "lr_scheduler_kwargs": {"power": 1, "lr_end": -0.0108}, "eval_steps": 1, "save_steps": 4,
        "load_best_model_at_end": True,
    }  # fmt: skip
    whole = train(asked, console=QUIET)
    losses = {e["step"]: e["eval_loss"] for e in whole.history if "eval_loss" in e}
    assert min(losses, key=lambda step: losses[step]) == 7
    best = min((4, 8, 10), key=lambda step: losses[step])
    assert best == 8
    assert whole.val_loss_after == pytest.approx(losses[best], rel=1e-5)
    (tmp_path / "out").rename(tmp_path / "moved")
    for step in (8, 10):  # the last one leaves nothing to train
        start = str(tmp_path / "moved" / f"checkpoint-{step}")
        folder = str(tmp_path / f"from {step}")
        resumed = train(asked, console=QUIET, output_dir=folder, resume_from_checkpoint=start)
        assert resumed.val_loss_after == whole.val_loss_after


def test_a_figure_that_no_validation_has(recipe: dict[str, Any], tmp_path: Path) -> None:
    """It is noticed before there is a model, not at the first validation."""
    judged = {**recipe, "eval_steps": 2, "early_stopping_patience": 1}
    with pytest.raises(RecipeError, match="best_model: validation has no eval_f1; it has eval_l"):
        train(judged, console=QUIET, metric_for_best_model="eval_f1")
    assert not (tmp_path / "out").exists()
    for name in ("loss", "eval_loss", "eval_one_loss", "two_loss", None):
        require_figure(name, ["one", "two"])
    with pytest.raises(RecipeError, match=r"it has eval_loss$"):
        require_figure("eval_one_loss", ["one"])


def test_several_sets_to_validate_on(recipe: dict[str, Any], rows: Path, tmp_path: Path) -> None:
    del recipe["val_set_size"]
    sets = []
    for i in range(2):
        part = tmp_path / f"part{i}.jsonl"
        part.write_text("".join(rows.read_text().splitlines(True)[i * 5 : i * 5 + 5]))
        sets.append({"path": str(part)})
    result = train(recipe, console=QUIET, test_datasets=sets, eval_steps=2)
    entry = next(e for e in result.history if e.get("step") == 2 and "eval_loss" in e)
    parts = entry["eval_test_1_loss"], entry["eval_test_2_loss"]
    assert min(parts) < entry["eval_loss"] < max(parts)
    assert result.val_loss_after is not None


@pytest.mark.parametrize(
    ("keys", "times"),
    [
        ({"eval_steps": 2}, 1), ({}, 2),
        ({"eval_steps": 1, "early_stopping_patience": 1, "learning_rate": 0.3, "max_steps": 40}, 1),
    ],
)  # fmt: skip
def test_the_last_step_is_validated_once(
    recipe: dict[str, Any], keys: dict[str, Any], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the loop, which validates at its end too where it validates at all, or after it.

    The first validation is before training.
    """
    called = []

    def counted(self: Any) -> dict[str, float]:
        called.append(self.state.global_step)
        return figures(self)

    figures = FineTuner.figures
    monkeypatch.setattr(FineTuner, "figures", counted)
    result = train(recipe, console=QUIET, **{"max_steps": 3, **keys})
    assert called == [e["step"] for e in result.history if "eval_loss" in e and e["step"]]
    assert (len(called) == 1) == (times == 2)
    assert result.val_loss_before is not None
    assert result.steps == 3 or result.steps < result.steps_planned
    last = next(e for e in result.history if e["step"] == result.steps and "eval_loss" in e)
    assert result.val_loss_after == last["eval_loss"]
