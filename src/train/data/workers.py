"""Encoding in batches of bounded size, in this process or in several, always in order."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import DataError
from .readers.bad_rows import BadRows, require_readable
from .readers.files import Row
from .readers.limits import Limits, Part

_ROWS = 512
_CHARACTERS = 1 << 22
"""A batch ends after so many rows, or so much text or bytes of images."""

_TOKENIZED, _READ = 20, 2000
"""Batches after the first with a bad row: of so many, the rows are still tokenized, which finds all
that is wrong; of so many in all, their fields are read, which is quick and finds most of it."""


class RowEncoder(Protocol):
    """Turns the rows of one dataset into samples."""

    watched: frozenset[int]
    """Tokens of which it is noted whether they are trained."""
    settings: dict[str, Any]
    """What the tokens depend on besides the dataset's own keys and the tokenizer."""

    def read(self, rows: Sequence[Row]) -> Sequence[Any]:
        """The fields of rows, not tokenized; raises a DataError for one that lacks some."""
        ...

    def part(self, rows: Sequence[Row], limits: Limits) -> Part:
        """The samples of rows that can be trained on; raises a DataError for one that is wrong."""
        ...

    def check_ends(self, path: str, ends: set[int], trained: set[int]) -> None:
        """See that the model learns to stop; raises a DataError where it does not."""
        ...


@dataclass(frozen=True)
class Work:
    """What is done to the rows of one dataset; goes to other processes as a whole."""

    encoder: RowEncoder
    limits: Limits

    def part(self, rows: list[Row]) -> Part:
        """Encode a batch and keep what can be trained on; raises a DataError for a wrong row."""
        for _, row in rows:
            require_readable(row)
        part = self.encoder.part(rows, self.limits)
        part.counts["rows"] = len(rows)
        return part

    def read(self, rows: list[Row]) -> None:
        """Read the fields of rows; raises a DataError for a wrong one."""
        for _, row in rows:
            require_readable(row)
        self.encoder.read(rows)


def batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in lists of bounded size."""
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += _characters(row[1])
        if len(batch) >= _ROWS or size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def parts(work: Work, rows: Iterable[Row], processes: int, bad: BadRows) -> Iterator[Part]:
    """Encode rows; raises a DataError if a file cannot be read, or a process died.

    Rows that are not right go to ``bad``, which also says how many batches were looked at before.
    After the first of them, more are looked at, so that one run names all that are wrong; ``bad``
    says which were not.

    No more than a few batches per process are in memory. In one process, the tokenizer's own
    threads use all cores.
    """
    last = ""
    for where, result in _results(work, rows, processes, bad):
        if bad.enough or bad.further > _READ:
            bad.rest = f"none after {last} was looked at" if last else "no row was looked at"
            break
        if bad.further > _TOKENIZED and not bad.rest:
            those = f"those after {last}" if last else "the rows"
            bad.rest = f"{those} were read, but not tokenized"
        if isinstance(result, BadRows):
            bad.extend(result)
        elif not bad.searching:
            yield result
        bad.further += bad.searching
        last = where


def _results(
    work: Work, rows: Iterable[Row], processes: int, bad: BadRows
) -> Iterator[tuple[str, Part | BadRows]]:
    """The place where each batch ends, and its result; ``bad``: what those before have."""
    if processes <= 1:
        for batch in batches(rows):
            yield batch[-1][0], _part_of(work, batch, bad.further > _TOKENIZED)
        return
    # spawned, because a fork would copy the threads of torch and of the tokenizer in any state
    context = multiprocessing.get_context("spawn")
    waiting: deque[tuple[str, Future[Part | BadRows]]] = deque()
    with ProcessPoolExecutor(processes, context, _begin, (work,)) as pool:
        try:
            for batch in batches(rows):
                future = pool.submit(_part, batch, bad.further > _TOKENIZED)
                waiting.append((batch[-1][0], future))
                if len(waiting) > 2 * processes:
                    where, future = waiting.popleft()
                    yield where, future.result()
            while waiting:
                where, future = waiting.popleft()
                yield where, future.result()
        except BrokenProcessPool:
            raise DataError(
                "a worker process exited at startup: with dataset_processes, a script that "
                'trains needs `if __name__ == "__main__":` around it; or memory was short, then '
                "set dataset_processes to fewer"
            ) from None
        finally:
            for _, future in waiting:
                future.cancel()


_WORK: list[Work] = []
"""The work of a process of the pool; empty in the main process."""


def _begin(work: Work) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process
    _WORK.append(work)


def _part(batch: list[Row], reads: bool) -> Part | BadRows:
    return _part_of(_WORK[-1], batch, reads)


def _part_of(work: Work, batch: list[Row], reads: bool) -> Part | BadRows:
    """The samples of a batch, or which of its rows are not right; ``reads``: only the latter."""
    if reads:
        return bad_rows(work.read, batch)
    try:
        return work.part(batch)
    except DataError:
        bad = bad_rows(work.part, batch)
        if not bad.count:  # it is not a row by itself
            raise
        return bad


def bad_rows(look: Callable[[list[Row]], Any], batch: Sequence[Row]) -> BadRows:
    """Those rows of a batch for which ``look`` raises a DataError."""
    bad = BadRows()
    for row in batch:
        try:
            look([row])
        except DataError as error:
            bad.add(row[0], str(error))
    return bad


def _characters(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1
