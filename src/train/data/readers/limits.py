"""What becomes of rows that are too long, too short, or have nothing to train."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....errors import DataError
from ..sample import IGNORED, Tokens

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Limits:
    """Which samples are kept.

    Attributes:
        longest: tokens of the longest sample.
        shortest: tokens of the shortest sample.
        excess: what happens to longer ones: ``drop``, ``truncate`` or ``raise``.
        watched: tokens of which it is noted whether they are trained.
    """

    longest: int
    shortest: int = 2
    excess: str = "drop"
    watched: frozenset[int] = frozenset()


@dataclass
class Part:
    """Samples, one after the other, and what was left out.

    Attributes:
        ids: their tokens; int32 (T,).
        labels: their labels; int32 (T,).
        lengths: tokens of each; int32 (N,).
        counts: ``rows``, ``too_long`` (also those that were ``truncated``), ``too_short``,
            ``nothing_to_train``, ``special_tokens_in_text``.
        ends: tokens that end a trained turn of these rows.
        trained: tokens of these, and of those that are watched, that are trained at least once.
        extra: what each sample keeps besides its tokens; empty: none keeps anything.
    """

    ids: Array
    labels: Array
    lengths: Array
    counts: Counter[str] = field(default_factory=Counter)
    ends: set[int] = field(default_factory=set)
    trained: set[int] = field(default_factory=set)
    extra: list[str] = field(default_factory=list)


def warnings(counts: Mapping[str, int]) -> list[str]:
    """What to say of rows that are trained, though something is odd about them."""
    said = [
        f"warning: {rows_have(counts[key])} {words}"
        for key, words in _ODD.items()
        if counts.get(key)
    ]
    good, bad = (counts.get(key, 0) for key in ("desirable", "undesirable"))
    if bool(good) != bool(bad):
        kind = "desirable" if good else "undesirable"
        said.append(f"warning: all {good + bad:,} answers are {kind}: KTO compares both kinds")
    return said


_ODD = {
    "special_tokens_in_text": "special tokens in user, tool or prompt text, where they can end or "
    "begin a turn; preprocess --debug shows them",
    "equal_answers": "the same text as chosen and as rejected answer, from which nothing is learnt",
    "empty": "an empty prompt or answer, and are left out",
}


def rows_have(number: int) -> str:
    """So many rows, as the subject of a sentence."""
    return "1 row has" if number == 1 else f"{number:,} rows have"


def keep(rows: Sequence[Tokens], limits: Limits) -> Part:
    """Make samples of rows.

    Raises:
        DataError: a row is too long, and ``excess`` is ``raise``.
    """
    counts: Counter[str] = Counter()
    kept: list[tuple[Tokens, int]] = []
    for row in rows:
        counts["special_tokens_in_text"] += row.specials
        length = len(row.ids)
        if length > limits.longest:
            counts["too_long"] += 1
            if limits.excess == "raise":
                raise DataError(
                    f"{row.where}: {length} tokens, and sequence_len is {limits.longest}"
                )
            if limits.excess == "drop":
                continue
            length = limits.longest
        if length < limits.shortest:
            counts["too_short"] += 1
        elif any(max(a, 1) < min(b, length) for a, b in row.spans):  # the first is never trained
            counts["truncated"] += length < len(row.ids)
            kept.append((row, length))
        else:
            counts["nothing_to_train"] += 1
    return _laid_out(kept, counts, limits.watched)


def _laid_out(
    kept: Sequence[tuple[Tokens, int]], counts: Counter[str], watched: frozenset[int]
) -> Part:
    lengths = np.fromiter((length for _, length in kept), np.int32, len(kept))
    ids = np.empty(int(lengths.sum(dtype=np.int64)), np.int32)
    labels = np.full_like(ids, IGNORED)
    begin = 0
    ends: set[int] = set()
    for row, length in kept:
        ids[begin : begin + length] = row.ids[:length]
        for first, behind in row.spans:
            first, behind = begin + max(first, 1), begin + min(behind, length)
            labels[first:behind] = ids[first:behind]
        ends |= row.ends if length == len(row.ids) else frozenset()  # else it may be cut off
        begin += length
    trained = {token for token in ends | watched if bool((labels == token).any())}
    extra = [row.extra for row, _ in kept if row.extra]
    return Part(ids, labels, lengths, counts, ends, trained, extra)
