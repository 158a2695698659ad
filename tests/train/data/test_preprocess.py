"""``fusewright preprocess``: what it keeps, and what it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ..commands import fusewright


@pytest.fixture
def file(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_rows_are_kept_and_taken_by_the_run(file: Path, tmp_path: Path) -> None:
    done = fusewright("preprocess", str(file))
    assert done.exit_code == 0, done.output
    assert "cached in" in done.stdout
    assert [w for w in done.stdout.split("\n") if w.split() == ["rows", "40"]]
    assert "too short" not in done.stdout  # none is
    (folder,) = (tmp_path / "last_run_prepared").iterdir()
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert len(before) == 2
    assert fusewright("train", str(file), "--max_steps", "1").exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert list((tmp_path / "last_run_prepared").iterdir()) == [folder]


def test_debug_shows_tokens_with_marks(file: Path, tmp_path: Path) -> None:
    done = fusewright(
        "preprocess", str(file), "--debug", "--debug_num_examples=1", "--limit", "1",
        "--val_set_size", "0",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "not cached" in done.stdout
    assert not (tmp_path / "last_run_prepared").exists()
    text = done.stdout[done.stdout.index("sample 1:") :]
    assert "<|im_start|>/1 u/87 s/85" in text
    assert "▸I/43 ▸t/86" in text
    assert "▸<|im_end|>/2 ⏎/201" in text
    assert text.count("▸") == int(text.split("tokens, ")[1].split()[0])


def test_a_stream_shows_its_first_samples(file: Path) -> None:
    done = fusewright(
        "preprocess", str(file), "--streaming", "true", "--val_set_size", "0", "--debug",
        "--debug-num-examples", "2", "--streaming_multipack_buffer_size", "8",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "a stream" in done.stdout
    assert "sample 2:" in done.stdout
    assert "sample 3:" not in done.stdout
