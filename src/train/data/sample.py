"""One row as tokens and labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IGNORED = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True)
class Sample:
    """One row as tokens.

    ``labels`` are the tokens where they are trained, else ``IGNORED`` (always so for the first,
    which has nothing to be predicted from). ``extra`` is other data of the row, as JSON or empty.
    """

    input_ids: list[int]
    labels: list[int]
    extra: str = ""

    @property
    def trained(self) -> int:
        """How many tokens are trained."""
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Tokens:
    """A row as tokens.

    Attributes:
        spans: the trained ranges, half-open and in order.
        ends: the special tokens that end the trained turns, trained or not.
        specials: whether the text of a user, a tool or a prompt has special tokens in it.
        whole: it must not be cut: some tokens belong to features, which would be left over.
        images: how many it has.
    """

    where: str
    ids: list[int]
    spans: list[tuple[int, int]]
    ends: frozenset[int] = frozenset()
    specials: bool = False
    extra: str = ""
    whole: bool = False
    images: int = 0


def joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, overlapping and touching ones as one, empty ones left out."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def without(
    spans: Iterable[tuple[int, int]], others: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """What is left of ``spans`` outside of ``others``; both are in order and do not overlap."""
    rest = []
    for begin, end in spans:
        for first, last in others:
            if first < end and last > begin:
                rest.append((begin, first))
                begin = max(begin, last)
        rest.append((begin, end))
    return joined(rest)
