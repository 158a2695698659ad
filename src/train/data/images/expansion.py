"""What the checkpoint's processor makes of the placeholders of images, each token explained.

A chat template writes a placeholder for each image, and the processor replaces it by as many
tokens as the model has features for: a number that depends on the image's size, with marks around
it and between its rows. The text is expanded here as the processor does it
(``return_text_replacement_offsets``, transformers 5.17), so that it is known which characters stand
for a picture, and only the others can be trained. When a batch is made, the processor tokenizes the
same text together with the images, and must come to the same tokens (``features.py``).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ....errors import DataError, RecipeError, first_line
from .picture import Picture

Span = tuple[int, int]

_MOST = 65_536
"""Sizes of images that are remembered."""

_USUAL = (64, 64)
"""A size that no processor refuses."""


@dataclass(frozen=True)
class Expanded:
    """A text in which placeholders have been replaced.

    Attributes:
        spans: by image, the characters that stand for it.
        moves: by placeholder, its end in the text before, and how far what follows has moved.
    """

    text: str
    spans: list[Span]
    moves: list[tuple[int, int]]

    def place(self, at: int) -> int:
        """Where a character of the text before is now."""
        moved = 0
        for end, by in self.moves:
            if at < end:
                break
            moved = by
        return at + moved


@dataclass
class Expander:
    """Replaces placeholders in rendered texts.

    Args:
        processor: of the checkpoint; its ``image_token`` is the placeholder.
        options: arguments for its image processor, such as limits of sizes.

    Attributes:
        reserved: tokens that stand for images, videos and sound, and may be in no text.

    Raises:
        RecipeError: the processor has no placeholder, or does not say what it replaces.
    """

    processor: Any
    options: dict[str, Any] = field(default_factory=dict)
    _known: dict[tuple[int, int], str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        token = getattr(self.processor, "image_token", None)
        name = type(self.processor).__name__
        if not isinstance(token, str) or not token:
            raise RecipeError(
                f"base_model: its {name} names no placeholder for images (image_token): such "
                "models are trained on text only"
            )
        self.token = token
        self._pattern = re.compile(re.escape(token))
        try:
            usual = self._replacement(_USUAL)
        except DataError as error:
            raise RecipeError(f"base_model: {error}") from None
        words = self.processor.tokenizer
        ids = words(usual, add_special_tokens=False)["input_ids"]
        added, named = words.get_added_vocab(), self.processor.all_special_multimodal_tokens
        special = [token for token in ids if token in set(added.values())]
        repeated = Counter(special or ids).most_common(1)[0][0]  # which the model has features for
        self.reserved = {repeated, *(added[token] for token in named if token in added)}

    def expand(self, text: str, pictures: Sequence[Picture], where: str) -> Expanded:
        """Replace the placeholders of ``pictures``, in order.

        Raises a DataError that begins with ``where`` if there are more or fewer, or the processor
        refuses a size.
        """
        places = [match.span() for match in self._pattern.finditer(text)]
        if len(places) != len(pictures):
            raise DataError(
                f"{where}: the row has {number(len(pictures), 'image')}, and the conversation as "
                f"the chat template writes it has {self.token!r} {number(len(places), 'time')}: "
                "each image needs one; remove it from texts, or set a chat_template for images"
            )
        pieces: list[str] = []
        spans: list[Span] = []
        moves: list[tuple[int, int]] = []
        at = moved = 0
        for (begin, end), picture in zip(places, pictures, strict=True):
            try:
                new = self._replacement(picture.size)
            except DataError as error:
                raise DataError(f"{where}: {picture.path}: {error}") from None
            pieces += [text[at:begin], new]
            spans.append((begin + moved, begin + moved + len(new)))
            moved += len(new) - (end - begin)
            moves.append((end, moved))
            at = end
        return Expanded("".join([*pieces, text[at:]]), spans, moves)

    def require_text(self, ids: Sequence[int], spans: Sequence[Span], where: str) -> None:
        """Raise a DataError if a token outside of ``spans`` would be taken for an image, or so."""
        if not spans and self.reserved.isdisjoint(ids):
            return
        at = 0
        for begin, end in [*spans, (len(ids), len(ids))]:
            odd = next((token for token in ids[at:begin] if token in self.reserved), None)
            if odd is not None:
                raise DataError(
                    f"{where}: a text of the row has {self._shown(odd)} in it, which the model "
                    "takes for an image, a video or sound: remove it, spell it otherwise, or, if no "
                    "row has images, set language_model_only: true"
                )
            at = end

    def _shown(self, token: int) -> str:
        return repr(self.processor.tokenizer.convert_ids_to_tokens(token))

    def _replacement(self, size: tuple[int, int]) -> str:
        """What stands for an image of a size, whatever is on it."""
        from PIL import Image

        if size not in self._known:
            if len(self._known) >= _MOST:
                self._known.clear()
            blank = Image.new("RGB", size)
            try:
                result = self.processor(
                    text=[self.token], images=[[blank]], return_text_replacement_offsets=True,
                    **self.options,
                )  # fmt: skip
                ((only,),) = result["text_replacement_offsets"]
                # many sizes have the same, of up to some 100 kB
                self._known[size] = sys.intern(only["replacement"])
            except Exception as error:  # a processor's code raises anything
                name = type(self.processor).__name__
                raise DataError(
                    f"{name} cannot place an image of {size[0]} x {size[1]} pixels: "
                    f"{first_line(error)}"
                ) from None
        return self._known[size]


def number(count: int, noun: str) -> str:
    """How many there are."""
    return f"{count or 'no'} {noun}{'s' * (count != 1)}"
