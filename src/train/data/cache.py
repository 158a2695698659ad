"""Prepared rows on disk: written once, and memory-mapped for reading."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .sample import IGNORED, Sample

Array = np.ndarray[Any, Any]

FORMAT = 3
"""Goes up when the same rows would be prepared differently."""

_LIST = pa.list_(pa.int32())
_SCHEMA = pa.schema([("input_ids", _LIST), ("labels", _LIST), ("trained", pa.int32())])
_EXTRA = pa.field("extra", pa.string())


class Lease:
    """Keeps a temporary folder; it is removed when the last reference is gone."""

    def __init__(self, folder: Path) -> None:
        weakref.finalize(self, shutil.rmtree, folder, True)


class Samples(Sequence[Sample]):
    """Samples in a memory-mapped Arrow file.

    Args:
        rows: which of its rows, in which order; None: all.
        lease: keeps the file, if it is a temporary one.
    """

    def __init__(self, path: Path, rows: Array | None = None, lease: Lease | None = None) -> None:
        self.path, self.lease = path, lease
        self._open()
        self.rows = np.arange(self._total) if rows is None else rows

    def _open(self) -> None:
        with pa.memory_map(str(self.path)) as source:
            file = pa.ipc.open_file(source)
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._parts = [
            tuple((c.offsets.to_numpy(), c.values.to_numpy()) for c in batch.columns[:2])
            for batch in batches
        ]
        counts = [batch.num_rows for batch in batches]
        self._extra = [b.column("extra") for b in batches if "extra" in b.schema.names]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._total = int(self._starts[-1])
        empty = np.empty(0, np.int32)
        lengths = [np.diff(part[0][0]) for part in self._parts]
        self._lengths = np.concatenate([empty, *lengths]).astype(np.int32)
        trained = [batch.columns[2].to_numpy() for batch in batches]
        self._trained = np.concatenate([empty, *trained]).astype(np.int32)

    @property
    def lengths(self) -> Array:
        """Tokens of each sample; int32 (N,)."""
        return self._lengths[self.rows]

    @property
    def trained(self) -> Array:
        """Trained tokens of each sample; int32 (N,)."""
        return self._trained[self.rows]

    def has_extra(self) -> bool:
        """Whether any sample of the file has other data."""
        return any(pc.max(pc.binary_length(column)).as_py() for column in self._extra)

    def lacks_extra(self) -> bool:
        """Whether any sample of the file has none."""
        shortest = [pc.min(pc.binary_length(column)).as_py() for column in self._extra]
        return not shortest or 0 in shortest

    def select(self, places: Array | slice) -> Samples:
        """Some of these samples, in this order."""
        some = copy.copy(self)  # of the same mapping
        some.rows = self.rows[places]
        return some

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.select(index)
        row = int(self.rows[index])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        place = row - int(self._starts[part])
        columns = [
            values[offsets[place] : offsets[place + 1]].tolist()
            for offsets, values in self._parts[part]
        ]
        extra = self._extra[part][place].as_py() if self._extra else ""
        return Sample(columns[0], columns[1], extra)

    def __copy__(self) -> Samples:
        some = object.__new__(type(self))
        some.__dict__.update(self.__dict__)
        return some

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "rows": self.rows, "lease": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class ArrowWriter:
    """Writes samples into an Arrow file, as they come; ``extra``: with ``Sample.extra``."""

    def __init__(self, path: Path, extra: bool = False) -> None:
        self.path = path
        self.count = 0
        self._file = pa.OSFile(str(path), "wb")
        self._schema = _SCHEMA.append(_EXTRA) if extra else _SCHEMA
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def add(
        self, ids: Array, labels: Array, lengths: Array, extra: Sequence[str] | None = None
    ) -> None:
        """Write N samples.

        Args:
            ids: the tokens of all, one after the other; int32 (T,).
            labels: their labels; int32 (T,).
            lengths: tokens of each; int (N,), summing up to T.
            extra: ``Sample.extra`` of each; None: nothing.
        """
        if not len(lengths):
            return
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        trained = np.add.reduceat(labels != IGNORED, offsets[:-1]).astype(np.int32)
        lists = pa.py_buffer(offsets)
        columns = [
            pa.ListArray.from_buffers(_LIST, len(lengths), [None, lists], children=[_int32(flat)])
            for flat in (ids, labels)
        ]
        columns.append(_int32(trained))
        if _EXTRA.name in self._schema.names:
            columns.append(_texts(extra or [""] * len(lengths)))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self.count += len(lengths)

    def __enter__(self) -> ArrowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
        self._file.close()


def _int32(values: Array) -> Any:
    # not pa.array(), which imports pandas to look for its types
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])


def _texts(values: Sequence[str]) -> Any:
    parts = [text.encode() for text in values]
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    buffers = (pa.py_buffer(offsets), pa.py_buffer(b"".join(parts)))
    return pa.StringArray.from_buffers(len(parts), *buffers)


class Cache:
    """A folder of prepared rows, named by the hash of everything that they depend on.

    It is written under another name and then renamed, so that it is complete or absent.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.root, self.folder = root, root / fingerprint

    def load(self) -> dict[str, Any] | None:
        """What was stored with the rows; None if they are not there, or damaged."""
        try:
            about: dict[str, Any] = json.loads((self.folder / "about.json").read_text("utf-8"))
            for name, (size, check) in about["files"].items():
                path = self.folder / name
                if path.stat().st_size != size or _checksum(path) != check:
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return about

    def begin(self) -> Path:
        """A new folder to write the rows into."""
        self.root.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".making-", dir=self.root))

    def abandon(self, folder: Path) -> None:
        """Remove a folder that ``begin`` made."""
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()  # if there is nothing else in it

    def finish(self, folder: Path, files: Iterable[str], about: Mapping[str, Any]) -> None:
        """Move a folder that ``begin`` made into its place."""
        sums = {n: ((folder / n).stat().st_size, _checksum(folder / n)) for n in files}
        text = json.dumps({**about, "format": FORMAT, "files": sums}, indent=1)
        (folder / "about.json").write_text(text, encoding="utf-8")
        if self.folder.exists():  # a damaged one
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            os.replace(folder, self.folder)
        except OSError:  # another process was faster
            if self.load() is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)


def _checksum(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total = zlib.crc32(block, total)
    return total
