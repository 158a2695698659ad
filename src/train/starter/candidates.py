"""The adapters and sequence lengths to try, in order, and what each length does to the rows."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, RecipeError
from ..data.chat.template import Chat
from ..data.formats.registry import Encoder, format_of
from ..data.images.picture import NoImages
from ..data.images.reading import reader_of
from ..data.readers.limits import blank_tokens, says_nothing
from ..data.sample import Tokens
from ..data.workers import bad_rows
from ..processing import Processing
from ..recipe.recipe import Recipe
from .look import AllRows

# --- lengths of rows -----------------------------------------------------------------------------


_CHARACTERS = 3.5
"""Characters of a token, where there is no tokenizer to ask: of English text; others have less."""

_UNKNOWN = (
    "how many tokens stand for it is known by the model's processor: download the model, and name "
    "its folder with --model"
)

_WHOLE = 1 << 30
"""Longer than any row, so that no text is cut."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row in the sample; ``counted`` with a tokenizer, not estimated.

    ``trained`` is the fraction of them that is trained; None: not known. ``silent`` is the number
    of rows whose answers have no text.
    """

    tokens: np.ndarray[Any, Any]
    trained: float | None
    counted: bool
    silent: int = 0

    def at(self, percent: float) -> int:
        """The length that so many percent of the rows do not exceed."""
        return int(np.percentile(self.tokens, percent, method="higher"))


def processing_of(recipe: Recipe) -> tuple[Processing | None, str]:
    """The tokenizer of the model with its processor, or None and why there is none."""
    from ..model.load import quiet
    from ..model.processor import load_processing

    try:
        with quiet():
            return load_processing(recipe), ""
    except RecipeError as error:
        if Path(recipe.base_model).exists():
            raise
        return None, str(error)


def measure(recipe: Recipe, rows: AllRows, processing: Processing | None) -> Lengths:
    """Count the tokens of the sample as ``recipe`` reads it, or estimate them without a tokenizer.

    Those that stand for images are counted, too.

    Raises:
        DataError: a row is not right, or has what the chat template leaves out, or no row of a
            dataset has an answer with text.
        RecipeError: the tokenizer lacks something.
    """
    samples = list(zip(recipe.datasets, (one.sample for one in rows.each), strict=True))
    if processing is None:
        sizes = []
        for dataset, sample in samples:
            read = format_of(dataset, recipe, None, _WHOLE, NoImages(_UNKNOWN))
            sizes += [_size(read.read(row, where)) for where, row in sample]
        return Lengths(np.array(sizes), None, counted=False)
    lengths: list[int] = []
    trained = silent = 0
    blank = blank_tokens(processing.tokenizer)
    for dataset, sample in samples:
        with tempfile.TemporaryDirectory(prefix="fusewright-init-") as folder:
            images = reader_of(recipe, dataset, processing, Path(folder))
            encoder = Encoder(dataset, recipe, processing.tokenizer, _WHOLE, images=images)
            try:
                encoded = encoder.encode(sample)
            except DataError:
                bad_rows(encoder.encode, sample).raise_any()
                raise  # no row is wrong by itself
        spans = sum(end - begin for one in encoded for begin, end in one.spans)
        if not spans:
            raise DataError(f"{dataset.path}: no row has anything to train")
        without_text = sum(says_nothing(one, blank) for one in encoded)
        if without_text == len(encoded):
            raise DataError(
                f"{dataset.path}: no answer of the {len(encoded):,} rows that were looked at has "
                "any text: a model would learn to say nothing"
            )
        silent += without_text
        lengths += [len(one.ids) for one in encoded]
        trained += spans
    tokens = np.array(lengths)
    return Lengths(tokens, trained / max(1, int(tokens.sum())), counted=True, silent=silent)


def _size(read: Any) -> int:
    if isinstance(read, Tokens):
        return len(read.ids)
    if isinstance(read, Chat):
        texts = [str(message) for message in read.messages]
        return int(sum(map(len, [*texts, str(read.tools or "")])) / _CHARACTERS) + 1
    return int(sum(len(text) for text, _ in read.parts) / _CHARACTERS) + 1


_LEAST, _STEP = 128, 128
"""The shortest ``sequence_len``, and what it is a multiple of."""

_PACK = 1024
"""A pack is at least this long, where there are enough rows, and model and memory allow it."""

STEPS = 20
"""An epoch has at least so many steps, where it has as many rows: few steps train nothing."""

_CONTEXT = 512
"""Few texts are not cut shorter than this, if they are as long."""

_TEXT = 2048
"""Texts are cut to this length."""

_ENOUGH = 0.95
"""A length that keeps this fraction of the rows is long enough: all adapters are tried there before
any shorter length is.
"""

LORA: dict[str, Any] = {
    "adapter": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_linear": True,
}
_QLORA = {**LORA, "adapter": "qlora", "load_in_4bit": True}

LORA_WHY = (
    "lora: trains small matrices beside the frozen weights, which is enough to learn formats and "
    "tasks"
)


@dataclass(frozen=True)
class Candidates:
    """The adapters and lengths to try; ``longest`` is the model's longest text, if known."""

    rows: AllRows
    lengths: Lengths
    longest: int | None

    @property
    def is_text(self) -> bool:
        """Whether rows that are longer than a sequence are cut, and not left out."""
        return self.rows.are_texts

    @property
    def trained(self) -> int:
        """The rows that are not held out."""
        held = self.validation()
        return self.rows.count - (held if isinstance(held, int) else int(held * self.rows.count))

    def validation(self) -> int | float:
        """The ``val_set_size``."""
        count = self.rows.count
        return 0 if count < 20 else max(2, count // 10) if count < 400 else 0.05

    def packs(self, length: int) -> bool:
        """Whether rows are packed into sequences: not if those would be few, nor pairs or images.

        Some models cannot keep the images of a pack apart, which is seen when they are loaded.
        """
        alone = self.rows.are_pairs or self.rows.have_images
        return not alone and (self.is_text or self._packed(length) >= STEPS)

    def sequences(self, length: int) -> int:
        """Sequences of an epoch, among the rows that were read."""
        if self.packs(length):
            return self._packed(length)
        return max(1, int(self.trained * self.coverage(length)))

    def _packed(self, length: int) -> int:
        tokens = self.lengths.tokens
        fitting = tokens if self.is_text else tokens[tokens <= length]
        if not len(fitting):
            return 1
        share = len(fitting) / len(tokens)
        return max(1, int(self.trained * share * float(fitting.mean()) / length * 1.05))

    def in_order(self) -> Iterator[tuple[dict[str, Any], str, int]]:
        """Adapters, with the reason for each, and lengths.

        All adapters are tried at lengths that keep enough rows before any shorter length is: 4-bit
        weights lose less than rows that are left out. Raises a RecipeError if no length keeps a
        row.
        """
        lengths = self.usable()
        enough = [length for length in lengths if self.coverage(length) >= _ENOUGH]
        if self.is_text:  # a shorter length loses context
            enough = lengths[:1]
        for adapter, why in self._adapters():
            yield from ((adapter, why, length) for length in enough)
        for length in lengths:
            if length not in enough:
                yield from ((adapter, why, length) for adapter, why in self._adapters())

    def usable(self) -> list[int]:
        """Lengths that keep a row, the best one first; raises a RecipeError if there is none."""
        best = self._best_length()
        if self.longest is not None:
            best = min(best, self.longest)
        lengths = [best]
        while lengths[-1] > _LEAST:
            lengths.append(_rounded(lengths[-1] // 2))
        if not self.is_text:  # the shortest one that keeps enough
            lengths.append(min(best, _rounded(self.lengths.at(100 * _ENOUGH))))
        usable = sorted({length for length in lengths if self.coverage(length)}, reverse=True)
        if not usable:
            raise RecipeError(
                f"--model: the model reads up to {self.longest:,} tokens, and the shortest row has "
                f"{self.lengths.at(0):,}; choose a model that reads longer texts, or split the rows"
            )
        return usable

    def coverage(self, length: int) -> float:
        """The fraction of the rows that a length keeps."""
        return 1.0 if self.is_text else float((self.lengths.tokens <= length).mean())

    def why(self, length: int) -> str:
        """The reason for a length, with the rows and tokens that it loses."""
        limit = "the positions of the model" if length == self.longest else "memory"
        if self.is_text:
            text = "longer texts become several samples"
            if length < self._best_length():
                text += f", each with LESS CONTEXT than {_TEXT:,} tokens, because of {limit}"
            elif length < min(_TEXT, self.lengths.at(99)):
                text += (
                    f", each with LESS CONTEXT than {_TEXT:,} tokens, because there are few: an "
                    f"epoch has some {STEPS} steps"
                )
            return text
        how = "counted by the tokenizer"
        if not self.lengths.counted:
            how = "ESTIMATED from characters: the tokenizer is not on this disk"
        text = (
            f"half of the rows have up to {self.lengths.at(50):,} tokens, 99% up to "
            f"{self.lengths.at(99):,} ({how})"
        )
        fraction = self.coverage(length)
        if fraction == 1:
            return f"{text}; none is longer"
        cut = f"{1 - fraction:.1%} are longer and are left out"
        if fraction >= _ENOUGH:
            return f"{text}; {cut}"
        tokens = self.lengths.tokens
        share = float(tokens[tokens > length].sum() / tokens.sum())
        return f"{text}. ROWS ARE LOST, because of {limit}: {cut}, with {share:.1%} of all tokens"

    def _adapters(self) -> Iterator[tuple[dict[str, Any], str]]:
        if self.is_text:
            yield (
                {},
                "no adapter: texts teach knowledge, for which training all weights works better",
            )
        yield LORA, LORA_WHY
        if has_bitsandbytes():
            yield _QLORA, "qlora: LoRA on 4-bit weights, because 16-bit weights do not fit"

    def _best_length(self) -> int:
        """The length that is best for the rows, whatever the model and the memory allow."""
        least = _rounded(self.lengths.at(99))
        best = _TEXT if self.is_text else least
        packs = self.is_text or self.lengths.at(50) <= best // 2 or best < _PACK
        if self.rows.are_pairs or not packs:
            return best
        best = max(best, _PACK)
        least = min(least, _CONTEXT) if self.is_text else least
        while best > least and self._packed(best) < STEPS:
            best = max(least, _rounded(best // 2))
        return best


def has_bitsandbytes() -> bool:
    """Whether the recipe can ask for weights of 4 bits."""
    return importlib.util.find_spec("bitsandbytes") is not None


def _rounded(length: int) -> int:
    return max(_LEAST, -(-length // _STEP) * _STEP)
