"""Sizes at which a test of some rows meets every edge."""

from __future__ import annotations

import pytest
import torch

from fusewright.kernels.loss import head_strips, head_tiles


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of at most 16 rows of 300 classes in bf16, strips of 3 rows, dW by 128 classes."""
    monkeypatch.setattr(head_tiles, "TILE_BYTES", 16 * 300 * 2)
    monkeypatch.setattr(head_tiles, "TILE_ROWS", 1)
    monkeypatch.setattr(head_strips, "STRIP_ELEMENTS", 900 // torch.get_num_threads())
    monkeypatch.setattr(head_tiles, "CHUNK_CLASSES", 128)
