"""Rows with drawn images, and what the data side makes of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from fusewright.train.data.chat.encoder import ChatEncoder
from fusewright.train.data.formats.conversation import Conversation
from fusewright.train.data.images.expansion import Expander
from fusewright.train.data.images.features import Featurizer
from fusewright.train.data.images.picture import Gallery
from fusewright.train.data.readers.limits import Limits, keep
from fusewright.train.data.sample import Sample, Tokens
from fusewright.train.recipe.recipe import Dataset

from .families import FAMILIES

SIZES = {"a.png": (24, 32), "b.png": (48, 24), "c.png": (40, 40)}


def draw(folder: Path, sizes: dict[str, tuple[int, int]] = SIZES) -> Path:
    """A coloured square on each image, another one on each."""
    for k, (name, size) in enumerate(sizes.items()):
        image = Image.new("RGB", size, "white")
        colour = (40 * k % 256, 90 * k % 256, 200 - 30 * k % 200)
        ImageDraw.Draw(image).rectangle((4, 4, 14, 16), fill=colour)
        image.save(folder / name)
    return folder


@functools.cache
def processor_of(family: str) -> Any:
    """The family's processor, with tokenizer and chat template."""
    return FAMILIES[family].make()[1]


class DataSide:
    """Reads rows as a dataset of this family's checkpoint.

    Args:
        folder: the images are there.
        keys: of the dataset.
    """

    def __init__(self, family: str, folder: Path, **keys: Any) -> None:
        self.processor = processor_of(family)
        self.tokenizer = self.processor.tokenizer
        gallery = Gallery(folder, folder / "copies")
        template = self.tokenizer.chat_template
        self.conversation = Conversation(Dataset(path="x", **keys), template, None, gallery)
        self.encoder = ChatEncoder(self.tokenizer, expander=Expander(self.processor))
        self.featurizer = Featurizer(self.processor)

    def tokens(self, rows: Sequence[Any]) -> list[Tokens]:
        """Rows as tokens, with the trained spans."""
        chats = [
            self.conversation.read(row, f"rows.jsonl, line {i}") for i, row in enumerate(rows, 1)
        ]
        return self.encoder.encode(chats)

    def samples(self, rows: Sequence[Any]) -> list[Sample]:
        """Rows as they are stored; none may be left out."""
        part = keep(self.tokens(rows), Limits(100_000))
        ends = part.lengths.cumsum().tolist()
        extra = part.extra or [""] * len(ends)
        assert len(ends) == len(rows)
        return [
            Sample(part.ids[b:e].tolist(), part.labels[b:e].tolist(), more)
            for b, e, more in zip([0, *ends], ends, extra, strict=False)
        ]


def message(role: str, *parts: str) -> dict[str, Any]:
    """A message; a part that ends in .png is an image."""
    content = [
        {"type": "image", "path": p} if p.endswith(".png") else {"type": "text", "text": p}
        for p in parts
    ]
    return {"role": role, "content": content}
