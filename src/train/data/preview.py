"""Prepared samples to look at: every token, and whether it is trained."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..terminal import say
from .cache import Samples
from .readers.limits import warnings
from .sample import IGNORED, Sample

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from .prepare import PreparedData

MARK = "▸"
"""Marks a trained token, so that it is visible without colour."""


def summary(prepared: PreparedData, console: Console) -> None:
    """Print the counts of rows and where the prepared ones are stored."""
    from rich.table import Table

    table = Table("", "number", box=None)
    table.columns[1].justify = "right"
    for name, number in prepared.counts.items():
        table.add_row(name.replace("_", " "), f"{number:,}")
    console.print(table)
    for line in warnings(prepared.counts, prepared.first):
        say(console, line)
    if isinstance(prepared.train, Samples):
        where = "not cached" if prepared.train.lease else f"cached in {prepared.train.path.parent}"
        say(console, where)
    else:
        say(console, "a stream: its rows are prepared during training")


def first(prepared: PreparedData, number: int) -> list[Sample]:
    """The first samples to train on."""
    if isinstance(prepared.train, Samples):
        return list(prepared.train[:number])
    packs = islice(prepared.train, number)
    return [sample for pack in packs for sample in pack][:number]


def show(samples: Iterable[Sample], tokenizer: Any, console: Console) -> None:
    """Print samples, token by token."""
    from rich.text import Text

    legend = Text.assemble((f"{MARK}trained", "bold green"), "/id  ", ("not trained", "dim"), "/id")
    console.print(legend)
    for number, sample in enumerate(samples, start=1):
        say(console, f"\nsample {number}: {len(sample.input_ids)} tokens, {sample.trained} trained")
        say(console, shown(sample, tokenizer))


def shown(sample: Sample, tokenizer: Any) -> Text:
    """One sample: each token's text and id, trained ones green and marked."""
    from rich.text import Text

    text = Text()
    for token, label in zip(sample.input_ids, sample.labels, strict=True):
        trained = label != IGNORED
        piece = tokenizer.decode([token])
        style = "bold green" if trained else "dim"
        text.append((MARK if trained else "") + piece.replace("\n", "⏎"), style)
        text.append(f"/{token} ", "cyan" if trained else "dim")
        if "\n" in piece:
            text.append("\n")
    return text
