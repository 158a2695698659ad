"""What the steps of a run took."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Meter:
    """What the steps so far took.

    Attributes:
        seconds: of each step.
        tokens: of each step, without padding.
        trained: of each step, the tokens with a label.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)

    def add(self, tokens: int, trained: int) -> None:
        """Count a batch of the step that is going on."""
        if len(self.tokens) == len(self.seconds):
            self.tokens.append(0)
            self.trained.append(0)
        self.tokens[-1] += tokens
        self.trained[-1] += trained

    def rate(self, counts: Sequence[int], last: int | None = None) -> float:
        """``counts`` per second, over the ``last`` steps; all but the first, which compiles."""
        pairs = list(zip(counts, self.seconds, strict=False))
        pairs = pairs[1:] or pairs
        pairs = pairs[-last:] if last else pairs
        spent = sum(s for _, s in pairs)
        return sum(n for n, _ in pairs) / spent if spent else 0.0

    def median_step(self) -> float:
        """Seconds of the median step, the first left out."""
        return statistics.median(self.seconds[1:] or self.seconds or [0.0])

    def whole(self) -> dict[str, list[Any]]:
        """What a checkpoint keeps: the steps that are done, without one that is going on."""
        done = len(self.seconds)
        return {name: values[:done] for name, values in asdict(self).items()}

    def restore(self, kept: dict[str, list[Any]]) -> None:
        """Go on from what a checkpoint kept."""
        for name, values in kept.items():
            setattr(self, name, list(values))
