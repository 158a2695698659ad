"""Packs of rows that are read during training: for data that is larger than memory or disk.

Rows are read in batches, from all datasets in turn, and from the beginning again when they end.
``streaming_multipack_buffer_size`` samples are collected, shuffled, packed and handed out; no more
than that, and the batch that is being read, is ever in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...errors import DataError
from ..recipe.recipe import Dataset, Recipe
from .packing import Pack, pack
from .readers import sources
from .readers.files import Row
from .readers.limits import Part
from .readers.sources import DataSource
from .sample import Sample
from .workers import Work, batches

Array = np.ndarray[Any, Any]


class StreamedPacks(IterableDataset[Pack]):
    """An endless stream of packs, the same for the same seed.

    Args:
        found: the datasets.
        work: how the rows of each become samples.
        recipe: length and size of packs, buffer, seed.

    Attributes:
        counts: of the rows that this process read so far, as in ``PreparedData.counts``; a row
            that is read again counts again.
    """

    def __init__(self, found: Sequence[DataSource], work: Sequence[Work], recipe: Recipe) -> None:
        self.found, self.work, self.recipe = found, work, recipe
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Pack]:
        size = self.recipe.streaming_multipack_buffer_size
        draw = np.random.default_rng(self.recipe.seed)
        while True:
            samples, kept = self._samples(), 0
            while buffer := list(islice(samples, size)):
                kept += len(buffer)
                if self.recipe.shuffle_merged_datasets and not self.recipe.curriculum_sampling:
                    buffer = [buffer[i] for i in draw.permutation(len(buffer))]
                for group in self._groups(buffer, draw):
                    yield [Sample(buffer[i][0].tolist(), buffer[i][1].tolist()) for i in group]
            if not kept:
                paths = ", ".join(source.dataset.path for source in self.found)
                raise DataError(f"{paths}: no row of the stream can be trained on")

    def _groups(
        self, buffer: Sequence[tuple[Array, Array]], draw: np.random.Generator
    ) -> Iterable[Sequence[int]]:
        """Packs of the buffer's samples, in any order: best fit would put the long ones first."""
        if not self.recipe.packs():
            return ([i] for i in range(len(buffer)))
        lengths = np.array([len(ids) for ids, _ in buffer])
        groups = pack(lengths, self.recipe.sequence_len, self.recipe.sample_packing_bin_size)
        return (groups[i] for i in draw.permutation(len(groups)))

    def _samples(self) -> Iterator[tuple[Array, Array]]:
        """Tokens and labels of one sample after the other, each once."""
        readers = [
            _Reader(source, work, batches(self._own(source.rows())))
            for source, work in zip(self.found, self.work, strict=True)
        ]
        enough = -(-self.recipe.streaming_multipack_buffer_size // len(readers))
        while readers:
            for reader in list(readers):
                part = reader.part(enough)
                if part is None:
                    readers.remove(reader)
                    continue
                self.counts += part.counts
                if len(part.lengths):
                    cuts = np.cumsum(part.lengths)[:-1]
                    yield from zip(
                        np.split(part.ids, cuts), np.split(part.labels, cuts), strict=True
                    )

    def _own(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows of this process, where a data loader has several."""
        worker = get_worker_info()
        return rows if worker is None else islice(rows, worker.id, None, worker.num_workers)


class _Reader:
    """One dataset, from its beginning to its end."""

    def __init__(self, source: DataSource, work: Work, rows: Iterator[list[Row]]) -> None:
        self.source, self.work, self.rows = source, work, rows
        self.read = self.kept = 0
        self.ends: set[int] = set()
        self.trained: set[int] = set()

    def part(self, enough: int) -> Part | None:
        """The next samples, or None at the end.

        Args:
            enough: after so many rows the model must have begun to learn where turns end, for a
                stream may have no end, where all that is wrong is known.

        Raises:
            DataError: a row is not right, or no end of a turn is ever trained.
        """
        batch = next(self.rows, None)
        encoder, path = self.work.encoder, self.source.dataset.path
        if batch is None:
            if self.kept and (get_worker_info() is None or not self.trained):  # it has a share only
                encoder.check_ends(path, self.ends, self.trained)
            return None
        part = self.work.part(batch)
        before, self.read = self.read, self.read + len(batch)
        self.kept += len(part.lengths)
        self.ends |= part.ends
        self.trained |= part.trained
        if before < enough <= self.read and self.kept and not self.trained:
            encoder.check_ends(path, self.ends, self.trained)
        return part


def stream(recipe: Recipe, make_work: Callable[[Dataset], Work]) -> StreamedPacks:
    """The stream of a recipe's ``pretraining_dataset``, or of its ``datasets``.

    Args:
        recipe: with ``streaming`` or ``pretraining_dataset``.
        make_work: gives the work for a dataset.

    Raises:
        DataError: a dataset is not there, or its first row is not right.
    """
    named = recipe.pretraining_dataset or recipe.datasets
    key = "pretraining_dataset" if recipe.pretraining_dataset else "datasets"
    may_build = recipe.consent.allow_builders
    found = [
        sources.find(d, f"{key}.{i}", streaming=True, allow_builders=may_build)
        for i, d in enumerate(named)
    ]
    work = [make_work(source.dataset) for source in found]
    for source, one in zip(found, work, strict=True):  # what is wrong shall be said now
        first = list(islice(source.rows(), 1))
        if not first:
            raise DataError(f"{source.dataset.path}: the dataset is empty")
        one.part(first)
    return StreamedPacks(found, work, recipe)
