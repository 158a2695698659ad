"""Human-readable figures: times, amounts of memory, smoothed curves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def duration(seconds: float) -> str:
    """A length of time in at most eight characters: ``48 s``, ``3:05``, ``12:03:04``, ``3d 04h``.

    ``-`` for what is not a number or below zero.
    """
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60, whole // 3600
    if hours < 24:
        clock = f"{minutes % 60:02}:{whole % 60:02}"
        return f"{hours}:{clock}" if hours else clock.removeprefix("0")
    return f"{hours // 24}d {hours % 24:02}h"


def memory(mib: float) -> str:
    """An amount of memory: ``870 MiB``, ``3.2 GiB``."""
    return f"{mib:,.0f} MiB" if mib < 1000 else f"{mib / 1024:,.1f} GiB"


def rate(per_second: float) -> str:
    """A number a second: ``1,234``, and ``0.42`` where whole numbers would say nothing."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def millions(count: float) -> str:
    """A large number: ``870``, ``4.88M``, ``139M``, ``7.24B``."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return f"{count:,.0f}"


def parameter_counts(trained: float, total: float, adapter: bool) -> str:
    """The number of parameters, and where (``adapter``) or how many the trained ones are."""
    if adapter:
        return f"{millions(total - trained)} in the base model, {millions(trained)} in the adapter"
    return (
        f"{millions(total)}, {f'{millions(trained)} of them' if trained < total else 'all'} trained"
    )


class Smooth:
    """A running mean in which a value's weight fades to a tenth within some twenty steps.

    Values that are not numbers are left out, so that one of them does not hide all that follow.
    ``decay`` is the part of a value's weight that is left after one more value.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.sum, self.weight = decay, 0.0, 0.0

    def add(self, value: float) -> None:
        """Take in the next value."""
        if math.isfinite(value):
            self.sum = self.decay * self.sum + value
            self.weight = self.decay * self.weight + 1.0

    @property
    def value(self) -> float:
        """The mean; NaN before the first value."""
        return self.sum / self.weight if self.weight else math.nan


def loss_ends(losses: Iterable[float]) -> tuple[float, float, str] | None:
    """The first and the last of the logged losses, and what they are; None if none is finite.

    Each is the mean of a tenth of the finite ones, because that of one batch says little.
    """
    losses = list(filter(math.isfinite, losses))
    if not losses:
        return None
    count = max(1, len(losses) // 10)
    first, last = (sum(some) / count for some in (losses[:count], losses[-count:]))
    of = f"means of {count} logged values" if count > 1 else "first and last logged value"
    return first, last, of


def resumption(recipe: Mapping[str, Any]) -> str:
    """What the recipe of a stopped run needs in order to resume; empty: nothing."""
    checkpoint = recipe.get("resume_from_checkpoint")
    if checkpoint is True or (recipe.get("auto_resume_from_checkpoints") and not checkpoint):
        return " without overwrite_output_dir" if recipe.get("overwrite_output_dir") else ""
    return " with resume_from_checkpoint: true"


def rows_message(data: dict[str, int]) -> str:
    """A line on the rows of a run."""
    if not data.get("rows"):
        validation = data.get("validation_samples", 0)
        return "data: a stream" + (f"; {validation:,} rows for validation" if validation else "")
    dropped = {
        "too_long": "too long",
        "too_short": "too short",
        "nothing_to_train": "with nothing to train",
        "empty": "with an empty prompt or answer",
        "duplicates": "duplicates",
    }
    left_out = [f"{data[k]:,} {words}" for k, words in dropped.items() if data.get(k)]
    if "train_sequences" not in data:
        return ", ".join([f"data: {data['rows']:,} rows of the stream were read", *left_out])
    trained = data.get("train_trained_tokens", 0)
    return (
        f"data: {data['rows']:,} rows, {data.get('validation_samples', 0):,} for "
        f"validation; {data.get('train_sequences', 0):,} sequences, "
        f"{data.get('train_tokens', 0):,} tokens"
        + (f", {trained:,} trained" if trained else "")  # of prompts, none are
        + (f"; {data['images']:,} images" if data.get("images") else "")
        + (f"; {', '.join(left_out)}" if left_out else "")
    )


def change(before: float, after: float) -> str:
    """The difference of two figures as they are shown, with three digits."""
    return f"{round(after, 3) - round(before, 3):+z.3f}"


def finite(value: Any) -> Any:
    """Infinity and NaN as text, because JSON has neither; other values as they are."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value
