"""Prepared samples to look at: every token, and whether it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..terminal import say
from .cache import Samples
from .chat.encoder import standing_for, tokenize
from .images.expansion import Expander
from .images.features import Featurizer, Illustrated
from .images.picture import Resizing, load
from .readers.limits import warnings
from .sample import IGNORED, Sample

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from .prepare import PreparedData

MARK = "▸"
"""Marks a trained token, so that it is visible without colour."""

_COLUMNS, _ROWS = 32, 12
"""The most that a thumbnail takes of a terminal."""


class Stretch(NamedTuple):
    """Tokens that stand for an image, half-open, and what they are called."""

    begin: int
    end: int
    name: str


def summary(prepared: PreparedData, console: Console) -> None:
    """Print the counts of rows and where the prepared ones are stored."""
    from rich.table import Table

    table = Table("", "number", box=None)
    table.columns[1].justify = "right"
    for name, number in prepared.counts.items():
        if not number:  # of what may be odd with rows, nothing is
            continue
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


def show(
    samples: Iterable[Sample],
    tokenizer: Any,
    console: Console,
    featurizer: Featurizer | None = None,
) -> None:
    """Print samples, token by token; where the model reads images, ``featurizer`` makes features.

    An image is shown small where the terminal has colours for it.
    """
    from rich.text import Text

    legend = Text.assemble((f"{MARK}trained", "bold green"), "/id  ", ("not trained", "dim"), "/id")
    console.print(legend)
    for number, sample in enumerate(samples, start=1):
        say(console, f"\nsample {number}: {len(sample.input_ids)} tokens, {sample.trained} trained")
        illustrated = None if featurizer is None else Illustrated.of(sample)
        if featurizer is None or illustrated is None:
            say(console, shown(sample, tokenizer))
            continue
        expander = Expander(featurizer.processor, featurizer.options)
        stretches = _stretches(sample, illustrated, expander, tokenizer)
        say(console, shown(sample, tokenizer, stretches))
        for count, picture in enumerate(illustrated.pictures, start=1):
            say(console, f"image {count}: {picture.path}")
            if console.color_system in ("256", "truecolor") and not console.no_color:
                console.print(_thumbnail(load(picture, Resizing(), illustrated.where)))


def shown(sample: Sample, tokenizer: Any, images: Sequence[Stretch] = ()) -> Text:
    """One sample: each token's text and id, trained ones green and marked; images by name."""
    from rich.text import Text

    text, at = Text(), 0
    for begin, end, name in [*images, Stretch(len(sample.input_ids), len(sample.input_ids), "")]:
        for token, label in zip(sample.input_ids[at:begin], sample.labels[at:begin], strict=True):
            trained = label != IGNORED
            piece = tokenizer.decode([token])
            style = "bold green" if trained else "dim"
            text.append((MARK if trained else "") + piece.replace("\n", "⏎"), style)
            text.append(f"/{token} ", "cyan" if trained else "dim")
            if "\n" in piece:
                text.append("\n")
        if name:
            trained = any(label != IGNORED for label in sample.labels[begin:end])
            text.append(f"{MARK if trained else ''}<{name}> ", "bold green" if trained else "cyan")
        at = end
    return text


def _stretches(
    sample: Sample, illustrated: Illustrated, expander: Expander, tokenizer: Any
) -> list[Stretch]:
    """The tokens of a sample that stand for its images."""
    expanded = expander.expand(illustrated.text, illustrated.pictures, illustrated.where)
    (encoding,) = tokenize(tokenizer, [expanded.text])
    spans = standing_for(expanded, encoding)
    if sample.input_ids[: spans[-1][1]] != encoding.ids[: spans[-1][1]]:
        return []  # of another version of the processor: each token is shown as it is
    return [
        Stretch(
            begin, end,
            f"image: {Path(picture.path).name}, {picture.size[0]} x {picture.size[1]}, "
            f"{end - begin:,} tokens",
        )
        for picture, (begin, end) in zip(illustrated.pictures, spans, strict=True)
    ]  # fmt: skip


def _thumbnail(image: Any) -> Text:
    """A small image: each character has two pixels, one above the other."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    image.thumbnail((_COLUMNS, 2 * _ROWS))
    width, height = image.size

    def colour(x: int, y: int) -> Color | None:
        return Color.from_rgb(*image.getpixel((x, y))) if y < height else None

    lines = [
        Text.assemble(
            *(("▀", Style(color=colour(x, y), bgcolor=colour(x, y + 1))) for x in range(width))
        )
        for y in range(0, height, 2)
    ]
    return Text("\n").join(lines)
