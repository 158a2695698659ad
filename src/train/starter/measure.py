"""How long rows are in tokens: counted as a run would count them, or estimated and said to be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, RecipeError
from ..data.chat.template import Chat
from ..data.formats.registry import Encoder, format_of
from ..data.sample import Tokens
from ..recipe.recipe import Recipe
from .look import RowsRead

_CHARACTERS = 3.5
"""Characters of a token, where there is no tokenizer to ask: of English text; others have less."""

_WHOLE = 1 << 30
"""Longer than any row, so that no text is cut."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows in the sample.

    Attributes:
        tokens: of each row.
        trained: the fraction of them that is trained; None: not known.
        counted: whether a tokenizer has counted them.
    """

    tokens: np.ndarray[Any, Any]
    trained: float | None
    counted: bool

    def at(self, percent: float) -> int:
        """The length that so many percent of the rows do not exceed."""
        return int(np.percentile(self.tokens, percent, method="higher"))


def tokenizer_of(recipe: Recipe) -> tuple[Any, str]:
    """The tokenizer of the model, or None and why there is none."""
    from ..model.load import quiet
    from ..model.tokenizer import load_tokenizer

    try:
        with quiet():
            return load_tokenizer(recipe), ""
    except RecipeError as error:
        if Path(recipe.base_model).exists():
            raise
        return None, str(error)


def measure(recipe: Recipe, rows: RowsRead, tokenizer: Any) -> Lengths:
    """Count the tokens of the sample.

    Args:
        recipe: says how rows are read.
        rows: with the sample.
        tokenizer: of the model, or None.

    Raises:
        DataError: a row is not right, or has what the chat template leaves out.
        RecipeError: the tokenizer lacks something.
    """
    dataset = recipe.datasets[0]
    if tokenizer is None:
        read = format_of(dataset, recipe, None, _WHOLE)
        sizes = [_size(read.read(row, where)) for where, row in rows.sample]
        return Lengths(np.array(sizes), None, counted=False)
    encoder = Encoder(dataset, recipe, tokenizer, _WHOLE)
    found = encoder.encode(rows.sample)
    tokens = np.array([len(one.ids) for one in found])
    trained = sum(end - begin for one in found for begin, end in one.spans)
    if not trained:
        raise DataError(f"{dataset.path}: no row has anything to train")
    return Lengths(tokens, trained / max(1, int(tokens.sum())), counted=True)


def _size(read: Any) -> int:
    """The tokens of a row, estimated by its characters."""
    if isinstance(read, Tokens):
        return len(read.ids)
    if isinstance(read, Chat):
        texts = [str(message) for message in read.messages]
        return int(sum(map(len, [*texts, str(read.tools or "")])) / _CHARACTERS) + 1
    return int(sum(len(text) for text, _ in read.parts) / _CHARACTERS) + 1
