"""A folder for each case."""

from __future__ import annotations

from pathlib import Path

import pytest

from .box import Box


@pytest.fixture
def box(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.chdir(tmp_path)
    return Box(tmp_path, base)
