"""What the judge says of models whose step cannot be planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fusewright.errors import ModelError
from fusewright.train.recipe.load import check
from fusewright.train.starter import choose
from fusewright.train.starter.choose import PlanJudge, positions_of

from ..commands import fusewright
from ..conftest import write_rows
from .conftest import ROWS


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelError("no such model"), "not checked: no such model"),
        (KeyError("heads"), "not checked: KeyError: 'heads'"),
        (ZeroDivisionError(), "not checked: ZeroDivisionError"),
        (RuntimeError("first\nsecond"), "not checked: RuntimeError: first"),
    ],
)
def test_any_error_of_planning_is_said_and_raised_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    calls = []

    def fails(*_: Any) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(choose, "make_job", fails)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    values = {"base_model": str(model), "datasets": [{"path": str(rows), "type": "chat_template"}]}
    recipe = check({**values, "adapter": "lora", "lora_target_linear": True}).recipe
    judge = PlanJudge()
    for _ in range(3):
        verdict = judge(recipe, 10**9)
        assert (verdict.fits, verdict.note) == (None, said)
    assert len(calls) == 1


def test_a_recipe_is_written_where_planning_fails(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise IndexError("of the model's own code")

    monkeypatch.setattr(choose, "make_job", fails)
    write_rows(tmp_path / "rows.jsonl", ROWS["completion"])
    result = fusewright("init", "rows.jsonl", "--model", str(model), "--memory", "24GB")
    assert result.exit_code == 0, result.output
    text = result.stdout.replace("\n# ", " ")
    assert "Memory: not checked: IndexError: of the model's own code" in text
    assert yaml.safe_load(result.stdout)["adapter"] == "lora"


def test_positions_of_a_configuration_that_raises(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: Any) -> None:
        raise ValueError("several decoders")

    monkeypatch.setattr(choose, "positions", fails)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    values = {"base_model": str(model), "datasets": [{"path": str(rows), "type": "chat_template"}]}
    assert positions_of(check(values).recipe) is None
