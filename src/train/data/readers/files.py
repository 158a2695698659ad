"""Reads the rows of one file, each with its place in it.

JSON lines are read here and not by ``datasets``, because that makes one table of them: it needs the
same fields in every row, fills in nulls, and knows no line numbers.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ....errors import DataError, first_line
from ...json_text import BadJsonError, parse_json, row_of
from ...printable import odd_characters
from .bad_rows import Unreadable

Row = tuple[str, Any]
"""File and line, and the row, or what is ``Unreadable`` in its place."""

Progress = Callable[[float], None]
"""Called with the share of a file that has been read."""

_PACKED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_BATCH = 1000
"""Rows that are taken from a table at a time."""

_BYTES = 1 << 26
"""Of a table that are read at a time."""


def read_file(
    path: Path, kind: str | None = None, progress: Progress | None = None
) -> Iterator[Row]:
    """Read a file row by row; it is never in memory as a whole, unless it is one JSON list.

    ``kind`` is one of ``KINDS``, by default the one of the file's suffix; ``progress`` is called
    now and then.

    Raises:
        DataError: it cannot be read, is of no known kind, or is damaged. A line that is no JSON is
            ``Unreadable`` instead, and the next ones follow.
    """
    reader = _READERS.get(kind or kind_of(path) or "")
    if reader is None:
        ends = ", ".join(f".{k}" for k in SUFFIXES)
        raise DataError(
            f"{path}: what kind of file is this? Its name must end in one of {ends}, or the "
            "dataset needs ds_type"
        )
    try:
        yield from reader(path, progress or (lambda share: None))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        damaged = "the compressed file is damaged or incomplete: copy it again"
        if isinstance(error, OSError) and error.errno is not None:
            damaged = first_line(error)
        raise DataError(f"{path}: cannot be read: {damaged}") from None


def kind_of(path: Path) -> str | None:
    """The kind of a file by its name, or None."""
    name = path.with_suffix("") if path.suffix in _PACKED else path
    return SUFFIXES.get(name.suffix.removeprefix(".").lower())


def _lines(path: Path, progress: Progress) -> Iterator[tuple[int, str]]:
    """The lines of a text file, counted from 1, without their line ends."""
    size = max(1, path.stat().st_size)
    opened = _PACKED.get(path.suffix, open)
    with path.open("rb") as raw, opened(raw, "rb") if path.suffix in _PACKED else raw as file:
        for number, line in enumerate(file, start=1):
            try:
                # only a line feed ends a line: JSON may hold other separators of Unicode
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: cannot be read: it is not UTF-8 (byte "
                    f"{error.start + 1} of the line: {error.reason})"
                ) from None
            yield number, text.rstrip("\n").removesuffix("\r")
            if number % _BATCH == 0:
                progress(raw.tell() / size)


def _json_lines(path: Path, progress: Progress) -> Iterator[Row]:
    for number, line in _lines(path, progress):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, parse_json(line)
        except BadJsonError as error:
            column = f" (column {error.column})" if error.column else ""
            is_array = number == 1 and line.lstrip().startswith("[")
            hint = "; a file that is one JSON array is to be named .json" if is_array else ""
            yield where, Unreadable(f"{where}: {error}{column}{hint}")


def _json(path: Path, progress: Progress) -> Iterator[Row]:
    """One list of rows; or, under this name too, a row on every line."""
    text = "\n".join(line for _, line in _lines(path, progress))
    try:
        rows = parse_json(text) if text.strip() else []
    except BadJsonError as error:
        if text.lstrip().startswith("{") and error.begun:
            yield from _json_lines(path, progress)
            return
        at = f", line {error.line}" if error.line else ""
        if not at and (row := row_of(text, error)) is not None:
            at = f", row {row}"
        raise DataError(f"{path}{at}: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: must be a list of rows")
    yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows, start=1))


def _text(path: Path, progress: Progress) -> Iterator[Row]:
    """Every line is a row with the field ``text``; empty lines are skipped."""
    for number, line in _lines(path, progress):
        if line.strip():
            row = {"text": line}
            yield text_in(row, f"{path}, line {number}"), row


def _csv(path: Path, progress: Progress, delimiter: str = ",") -> Iterator[Row]:
    """Rows of text, with the first line as field names."""
    from pyarrow import ArrowInvalid, csv, string

    read = csv.ReadOptions(use_threads=False, block_size=1 << 26)  # else errors have no row
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        with csv.open_csv(path, read, parse) as head:
            names = head.schema.names
        if len(set(names)) < len(names) or "" in names:
            raise DataError(f"{path}, line 1: must name the columns, each differently")
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, string()))
        with csv.open_csv(path, read, parse, convert) as batches:
            yield from _numbered(path, batches, progress)
    except ArrowInvalid as error:
        if "Empty CSV" in str(error):
            return
        reason = first_line(error).removeprefix("CSV parse error: ")
        raise DataError(f"{path}: not valid CSV: {reason}") from None


def _tsv(path: Path, progress: Progress) -> Iterator[Row]:
    yield from _csv(path, progress, "\t")


def _parquet(path: Path, progress: Progress) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            total = file.metadata.num_rows
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
            rows = max(1, min(_BATCH, _BYTES * total // max(1, size)))  # few, where each has images
            yield from _numbered(path, file.iter_batches(rows), progress, total)
    except ArrowException as error:
        raise DataError(
            f"{path}: not a Parquet file, or a damaged one: {first_line(error)}"
        ) from None


def _arrow(path: Path, progress: Progress) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            try:
                reader = pa.ipc.open_file(source)
                count = reader.num_record_batches
                batches: Any = (reader.get_batch(i) for i in range(count))
            except pa.ArrowInvalid:
                source.seek(0)
                batches = pa.ipc.open_stream(source)
            yield from _numbered(path, batches, progress)
    except pa.ArrowException as error:
        raise DataError(
            f"{path}: not an Arrow file, or a damaged one: {first_line(error)}"
        ) from None


def _numbered(
    path: Path, batches: Any, progress: Progress, total: int | None = None
) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for begin in range(0, batch.num_rows, _BATCH):
            try:
                rows = batch.slice(begin, _BATCH).to_pylist()
            except UnicodeDecodeError:
                count = min(batch.num_rows - begin, _BATCH)
                raise DataError(
                    f"{path}: a text in the rows {number + 1} to {number + count} is not UTF-8: "
                    "write the table again from text that is"
                ) from None
            for row in rows:
                number += 1
                yield text_in(row, f"{path}, row {number}"), row
            if total:
                progress(number / total)


def text_in(row: Any, where: str) -> str:
    """``where``, after a check that the texts of a row are text; raises a DataError if not."""
    for at, problem in odd_characters(row):
        field = ".".join(map(str, at))
        raise DataError(f"{where}: {field} {problem}; replace it, or leave it out")
    return where


_READERS: dict[str, Callable[[Path, Progress], Iterator[Row]]] = {
    "jsonl": _json_lines, "json": _json, "csv": _csv, "tsv": _tsv, "parquet": _parquet,
    "arrow": _arrow, "text": _text,
}  # fmt: skip

KINDS = tuple(_READERS)
"""The kinds of files."""

SUFFIXES = {
    "jsonl": "jsonl", "ndjson": "jsonl", "json": "json", "csv": "csv", "tsv": "tsv",
    "parquet": "parquet", "arrow": "arrow", "txt": "text",
}  # fmt: skip
"""The kind of a file by its suffix."""


def hash_file(path: Path) -> bytes:
    """The SHA-256 of a file; raises a DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
