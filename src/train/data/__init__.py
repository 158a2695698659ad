"""Rows, from a recipe's datasets to the tensors of a batch.

In processing order: ``readers`` (where rows are, and reading them) → ``formats`` (what a row means)
→ ``chat`` (text, tokens and exact masks), in batches by ``workers`` → ``cache`` (on disk) →
``packing`` (sequences and batches), in the order of ``order``. ``prepare`` runs these steps, holds
rows out, and streams rows; ``preview`` prints samples.
"""

from __future__ import annotations

from .cache import Samples
from .packing import Pack, Packs, collate, count, pack
from .prepare import PreparedData, prepare
from .sample import IGNORED, Sample

__all__ = [
    "IGNORED", "Pack", "Packs", "PreparedData", "Sample", "Samples", "collate", "count", "pack",
    "prepare",
]  # fmt: skip
