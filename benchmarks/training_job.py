"""What each engine of ``training.py`` is asked to do, the same for all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANK, ALPHA = 16, 32
IGNORED = -100


@dataclass(frozen=True)
class TrainingJob:
    """One engine's training run: one epoch over the same rows.

    Attributes:
        engine: a name in ``training_engines.ENGINES``, or ``fusewright:MEMORY``.
        base: a folder with a plain model in safetensors, and its tokenizer.
        rows: a JSONL file of chats; every one is trained on.
        samples: the same rows as tokens and labels, see ``read_samples``.
        output: where the adapter goes.
        sequence_len: tokens in a pack.
        batch: padded rows of a step (stock).
        packs: packs of a step (the others).
        steps: optimizer steps, about; each engine has its own number of batches.
        learning_rate: the highest one; warm-up over a tenth of the steps, then a cosine.
        dtype: of weights and computation, ``bfloat16`` or ``float32``.
        threads: CPU threads; 0 leaves PyTorch's default.
    """

    engine: str
    base: str
    rows: str
    samples: str
    output: str
    sequence_len: int
    batch: int
    packs: int
    steps: int
    learning_rate: float
    dtype: str
    threads: int = 0

    @property
    def memory(self) -> str:
        """The memory setting of fusewright's engines."""
        return self.engine.partition(":")[2] or "auto"

    @property
    def warmup(self) -> int:
        """Steps of warm-up."""
        return max(1, self.steps // 10)


def write_samples(path: Path, samples: Any) -> None:
    """Write samples as one JSON object a line, with ``input_ids`` and ``labels``."""
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            row = {"input_ids": sample.input_ids, "labels": sample.labels}
            file.write(json.dumps(row) + "\n")


def read_samples(path: str) -> dict[str, list[list[int]]]:
    """Read them back, as the columns of a dataset."""
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    return {name: [row[name] for row in rows] for name in ("input_ids", "labels")}
