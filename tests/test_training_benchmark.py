"""The benchmark of whole training runs: all engines train the same; no figure is judged here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .test_benchmarks import BENCHMARKS, run

ENGINES = ("stock", "stock+gc", "stock-packed", "trl", "trl-nogc", "fusewright")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The objects that a run of all engines of ``training.py`` writes, by engine."""
    pytest.importorskip("trl")
    from tests.train.conftest import make_model, make_tokenizer, numbers, write_rows

    folder = tmp_path_factory.mktemp("training")
    make_model().save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    data = write_rows(folder / "rows.jsonl", numbers(14))
    sizes = ("--rows", "10", "--validation-rows", "3", "--sequence-len", "160", "--batch", "4")
    done = run(
        "training.py", "--engines", ",".join(ENGINES), "--base", folder / "base", "--data", data,
        *sizes, "--dtype", "float32", "--json", folder / "training.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation losses agree within 1.0%" in done.stdout
    assert "fusewright against trl-nogc: " in done.stdout
    rows = json.loads((folder / "training.json").read_text())
    return {row["engine"]: row for row in rows}


@pytest.mark.slow
def test_all_engines_train_the_same_tokens(training: dict[str, dict[str, Any]]) -> None:
    assert set(training) == set(ENGINES)
    wanted = training["stock"]["rows_trained_tokens"]
    for row in training.values():
        assert row["error"] is None
        assert row["trained_tokens"] == sum(row["all_trained"]) == wanted > 0
        assert len(row["all_step_s"]) == len(row["losses"]) == row["steps"] == 3
        assert row["validation_loss"] < row["base_validation_loss"]
        assert row["peak_rss_mb"] >= row["loaded_rss_mb"] > 0
        assert row["trained_tokens_per_s"] > 0
        assert row["first_step_s"] > 0
        assert {"commit", "cpu", "threads", "date", "command", "peak_rss_from"} <= set(row)
    assert training["stock"]["tokens_per_s"] > training["stock"]["trained_tokens_per_s"]


def test_training_judges_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from training import judge

    def row(engine: str, rate: float, peak: float, loss: float, trained: int) -> dict[str, Any]:
        return {
            "engine": engine, "error": None, "trained_tokens_per_s": rate, "peak_rss_mb": peak,
            "validation_loss": loss, "trained_tokens": trained,
        }  # fmt: skip

    stock, trl = row("stock", 90, 1100, 2.0, 50), row("trl-nogc", 200, 500, 2.0, 50)
    text, agreed = judge([stock, trl, row("fusewright", 230, 420, 2.019, 50)], 0.01)
    assert agreed
    assert "2.56 x trained tokens/s (aim 2.5: met), 38% of its peak (aim 40%: met)" in text
    assert "1.15 x trained tokens/s (aim 1.3: MISSED), 84% of its peak (aim 40%: MISSED)" in text
    for loss, trained in ((2.03, 50), (2.0, 49), (float("nan"), 50)):
        text, agreed = judge([stock, row("fusewright", 230, 420, loss, trained)], 0.01)
        assert not agreed
        assert "NOT THE SAME TRAINING: fusewright and stock" in text


def test_an_unknown_engine_of_training_is_named_with_the_known_ones() -> None:
    done = run("training.py", "--engines", "stock,trll")
    assert done.returncode == 2
    assert "unknown engine 'trll'; known: stock, " in done.stderr
    assert "of other environments unsloth, " in done.stderr
