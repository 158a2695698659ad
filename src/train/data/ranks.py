"""Shards the sequences over processes: all have as many batches, none is repeated.

The batches of an epoch are numbered as one process would train them; process r of N takes those
with the numbers r, r + N, r + 2N, … So N processes with one forward pass per step train what one
process trains with N of them. Where the batches do not divide evenly, a process gets one without
labels: it takes part in the collectives of the step, and adds nothing to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, Sampler

from .order import Order
from .packing import Pack
from .sample import IGNORED, Sample

_FILLER = 8
"""Tokens of a sequence that only fills a batch."""


class RankBatches(Sampler[list[int]]):
    """The batches of one process, as lists of indices; ``Fillable`` reads them.

    Args:
        drop_last: leave out a batch that is not full.
    """

    def __init__(self, order: Order, size: int, rank: int, ranks: int, drop_last: bool) -> None:
        self.order, self.size, self.rank, self.ranks = order, size, rank, ranks
        self.drop_last = drop_last

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0."""
        self.order.set_epoch(epoch)

    def _whole(self) -> int:
        return (len(self.order) + (0 if self.drop_last else self.size - 1)) // self.size

    def __len__(self) -> int:
        return -(-self._whole() // self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        order, number = list(self.order), self._whole()
        for first in range(0, number, self.ranks):
            index = first + self.rank
            at = index * self.size
            # ~i: the sequence i, of which nothing is trained
            yield order[at : at + self.size] if index < number else [~order[0]]


class Fillable(Sequence[Pack]):
    """Sequences by their index; those by an inverted index (``~i``) are short and untrained."""

    def __init__(self, packs: Sequence[Pack]) -> None:
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: Any) -> Any:
        return self.packs[index] if index >= 0 else filler(self.packs[~index])


def filler(pack: Pack) -> Pack:
    """A short sequence of the same kind, of which nothing is trained."""
    first = pack[0]
    # placeholders of images are never trained
    ids = [t for t in first.labels if t != IGNORED] if first.extra else first.input_ids
    ids = ids[:_FILLER]
    return [Sample(ids, [IGNORED] * len(ids))]


class RankStream(IterableDataset[Pack]):
    """The sequences of one process from an endless stream that every process reads."""

    def __init__(self, packs: IterableDataset[Pack], size: int, rank: int, ranks: int) -> None:
        self.packs, self.size, self.rank, self.ranks = packs, size, rank, ranks

    def __iter__(self) -> Iterator[Pack]:
        packs, at = iter(self.packs), self.rank * self.size
        while group := list(islice(packs, self.size * self.ranks)):
            yield from group[at : at + self.size]
