"""From rows without a chat template to tokens: pieces of text, each trained or not.

Each piece is tokenized by itself, so that the prompt has the tokens that it has at inference, and
the tokens of a trained piece are exactly its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import RecipeError
from ..chat.encoder import one_of, tokenize
from ..sample import Tokens, joined


@dataclass(frozen=True)
class Segments:
    """One row as pieces of text.

    Attributes:
        bos: begin with the token that the tokenizer puts before a text, if it has one.
        eos: end with the tokenizer's end of text, trained if the last piece is.
        divide: cut the tokens into samples of the longest length that there may be.
    """

    where: str
    parts: tuple[tuple[str, bool], ...]
    bos: bool = False
    eos: bool = False
    divide: bool = False


class SegmentEncoder:
    """Tokenizes pieces of text."""

    def __init__(self, tokenizer: Any, everything: bool, longest: int) -> None:
        self.tokenizer, self.everything, self.longest = tokenizer, everything, longest
        self.bos = _bos(tokenizer)
        self.eos = tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self.special = one_of([str(token) for token in added if token.special])

    def encode(self, rows: Sequence[Segments]) -> list[Tokens]:
        """Encode rows; a divided one becomes several samples.

        Raises a RecipeError if a text must end, and the tokenizer has no token for that.
        """
        texts = [text for row in rows for text, _ in row.parts]
        pieces = iter(tokenize(self.tokenizer, texts))
        samples: list[Tokens] = []
        for row in rows:
            whole = self._joined(row, pieces)
            samples += _divided(whole, self.longest) if row.divide else [whole]
        return samples

    def _joined(self, row: Segments, pieces: Any) -> Tokens:
        ids: list[int] = list(self.bos) if row.bos else []
        spans: list[tuple[int, int]] = []
        for _, trained in row.parts:
            begin = len(ids)
            ids += next(pieces).ids
            if (trained or self.everything) and len(ids) > begin:
                spans.append((begin, len(ids)))
        ends = frozenset[int]()
        if row.eos:
            if self.eos is None:
                raise RecipeError(
                    "the tokenizer of base_model has no end-of-text token; name one with "
                    "special_tokens: {eos_token: ...}"
                )
            if not ids or ids[-1] != self.eos:
                ids.append(self.eos)
                if row.parts[-1][1] or self.everything:
                    spans.append((len(ids) - 1, len(ids)))
            ends = frozenset({self.eos})
        if self.everything:
            spans = [(0, len(ids))]
        return Tokens(row.where, ids, joined(spans), ends, self._has_special(row))

    def _has_special(self, row: Segments) -> bool:
        """Whether a prompt has special tokens in it; rows of texts alone bring their own."""
        if self.special is None or row.divide or not (row.bos or row.eos):
            return False
        return any(not trained and self.special.search(text) for text, trained in row.parts)


def _bos(tokenizer: Any) -> list[int]:
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return list(whole[:begin])
    return []


def _divided(row: Tokens, longest: int) -> list[Tokens]:
    pieces = []
    for begin in range(0, len(row.ids), longest):
        end = min(begin + longest, len(row.ids))
        spans = [
            (max(a, begin) - begin, min(b, end) - begin)
            for a, b in row.spans
            if a < end and b > begin
        ]
        ends = row.ends if end == len(row.ids) else frozenset[int]()
        pieces.append(Tokens(row.where, row.ids[begin:end], spans, ends))
    return pieces
