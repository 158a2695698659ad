"""A run whose chat template writes the date goes on after midnight, with the day it began on."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers.utils import chat_template_utils

from fusewright.errors import RecipeError
from fusewright.train import run as loop
from fusewright.train import train
from fusewright.train.data import prepare
from fusewright.train.data.chat import date as days
from fusewright.train.recipe.load import load_recipe

from ..conftest import CHATML, make_tokenizer
from ..results import assert_same

QUIET = Console(quiet=True)
DATED = "{{ '<|im_start|>system\n' + strftime_now('%A, %d %b %Y') + '<|im_end|>\n' }}" + CHATML

At = Callable[[int, int], None]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> At:
    """Sets the clock to a day and an hour of October 2026, UTC."""

    def set_clock(day: int, hour: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls(2026, 10, day, hour, 30, tzinfo=tz)

        fake = SimpleNamespace(datetime=Clock, UTC=datetime.UTC)
        monkeypatch.setattr(loop, "datetime", fake)
        monkeypatch.setattr(days, "datetime", Clock)
        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_clock


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [{}, {"streaming": True, "val_set_size": 0, "streaming_multipack_buffer_size": 20}],
    ids=["prepared", "streamed"],
)
def test_a_run_goes_on_after_midnight(
    recipe: dict[str, Any], tmp_path: Path, at: At, changes: dict[str, Any]
) -> None:
    asked = {**recipe, "chat_template_jinja": DATED, "save_steps": 1, "max_steps": 6, **changes}
    at(5, 23)
    train(asked, console=QUIET, output_dir=str(tmp_path / "whole"))
    start = str(tmp_path / "whole" / "checkpoint-2")
    at(7, 1)
    for name in ("second", "third"):
        folder = tmp_path / name
        resumed = train(asked, console=QUIET, output_dir=str(folder), resume_from_checkpoint=start)
        assert (resumed.status, resumed.started[:10]) == ("finished", "2026-10-05")
        assert_same(tmp_path / "whole", folder)
        start = str(folder / "checkpoint-4")  # then from one of the run that had gone on
    train(asked, console=QUIET, output_dir=str(tmp_path / "new"))
    with pytest.raises(AssertionError):  # a run that begins then has its own day
        assert_same(tmp_path / "whole", tmp_path / "new")


def test_prepared_rows_are_those_of_a_day(recipe: dict[str, Any], tmp_path: Path, at: At) -> None:
    kept = str(tmp_path / "kept")
    asked = load_recipe({**recipe, "chat_template_jinja": DATED, "dataset_prepared_path": kept})
    at(5, 23)
    first = prepare(asked, make_tokenizer())
    assert "Monday, 05 Oct 2026" in make_tokenizer().decode(first.train[0].input_ids)
    at(6, 1)
    second = prepare(asked, make_tokenizer())
    assert "Tuesday, 06 Oct 2026" in make_tokenizer().decode(second.train[0].input_ids)
    assert second.fingerprint != first.fingerprint
    assert prepare(asked, make_tokenizer(), day="2026-10-05").fingerprint == first.fingerprint


def test_other_rows_are_still_refused(recipe: dict[str, Any], tmp_path: Path, at: At) -> None:
    asked = {**recipe, "chat_template_jinja": DATED, "save_steps": 2}
    at(5, 23)
    train(asked, console=QUIET, output_dir=str(tmp_path / "whole"))
    rows = Path(recipe["datasets"][0]["path"])
    rows.write_text(rows.read_text().replace("What is 3?", "What is 33?"))
    at(6, 1)
    start = str(tmp_path / "whole" / "checkpoint-2")
    with pytest.raises(RecipeError, match="was trained on other rows"):
        train(asked, console=QUIET, resume_from_checkpoint=start)
