"""Where the rows of a dataset come from: the package, a builder, a file, a folder, or the hub."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ....errors import DataError, first_line
from ...consent import must_build, refused_builder
from ...recipe.locate import meant_file
from ...recipe.recipe import Dataset
from ...user_functions import PackageRows, is_package_rows
from .bad_rows import require_readable
from .files import Progress, Row, hash_file, kind_of, read_file, text_in

_READERS_OF_CODE = frozenset({"pandas", "generator", "spark", "sql", "cache", "eval", "iceberg"})
"""Names under which ``datasets`` reads pickles, or imports what a file names, in some version."""

_SPLIT = re.compile(r"(?P<name>[\w.-]+)(\[(?P<begin>-?\d+%?)?:(?P<end>-?\d+%?)?\])?")


@dataclass(frozen=True)
class DataSource:
    """The location of one dataset's rows, which are not read yet.

    Attributes:
        files: the files that hold its rows, in order.
        table: a table, or a stream, of the ``datasets`` library that holds them instead.
        unread: data files of its folder that belong to no split.
    """

    dataset: Dataset
    files: tuple[Path, ...] = ()
    table: Any = None
    limit: int | None = None
    unread: tuple[Path, ...] = ()

    def rows(self, progress: Progress | None = None) -> Iterator[Row]:
        """Yield the rows that the recipe asks for; raises a DataError if one cannot be read."""
        for where, row in self.rows_and_faults(progress):
            require_readable(row)
            yield where, row

    def rows_and_faults(self, progress: Progress | None = None) -> Iterator[Row]:
        """As ``rows``, with what is ``Unreadable`` in the place of single rows.

        Raises a DataError if a file cannot be read as a whole.
        """
        rows_of_all = self._every(progress or (lambda share: None))
        rows = self._sliced(rows_of_all)
        if self.dataset.skip:
            rows = islice(rows, self.dataset.skip, None)
        if self.dataset.shards:
            rows = islice(rows, self.dataset.shards_idx, None, self.dataset.shards)
        yield from islice(rows, self.limit)

    def left_out(self) -> str | None:
        """What is to be said about the files of its folder that are not read, if there are any."""
        if not self.unread:
            return None
        folder = Path(self.dataset.path)
        root = folder.resolve()  # datasets resolves links, too

        def listed(files: Sequence[Path]) -> str:
            names = [os.path.relpath(f.parent.resolve() / f.name, root) for f in files[:3]]
            return ", ".join([*names, *["..."] * bool(files[3:])])

        return (
            f"warning: {folder}: {len(self.files)} of its files are read ({listed(self.files)}), "
            f"and {len(self.unread)} are not ({listed(self.unread)}): name those that you mean in "
            "data_files"
        )

    def digest(self) -> str:
        """A hash of the content, and of the files' suffixes."""
        if self.table is not None:
            return str(self.table._fingerprint)
        parts = (hash_file(path) + path.suffix.lower().encode() for path in self.files)
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def _every(self, progress: Progress) -> Iterator[Row]:
        if self.table is not None:
            name = f"{self.dataset.path}, row"
            total = len(self.table) if hasattr(self.table, "__len__") else 0
            for i, row in enumerate(_stored(self.table), start=1):
                if total and i % 1000 == 0:
                    progress(i / total)
                yield text_in(row, f"{name} {i}"), row
            return
        ds_type = self.dataset.ds_type
        for index, path in enumerate(self.files):
            # `ds_type: json` may also mean JSON lines
            kind = None if ds_type == "json" and kind_of(path) in ("json", "jsonl") else ds_type
            yield from read_file(path, kind, partial(_forward, progress, index, len(self.files)))

    def _sliced(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The requested part of the split; ends are counted only where they must be."""
        match = _SPLIT.fullmatch(self.dataset.split or "train")
        begin, end = (match["begin"], match["end"]) if match else (None, None)
        if begin is None and end is None:
            yield from rows
            return
        if all(x is None or x.isdigit() for x in (begin, end)):
            yield from islice(rows, int(begin or 0), int(end) if end else None)
            return
        everything = list(rows)
        yield from everything[_place(begin, len(everything)) : _place(end, len(everything))]


def _stored(table: Any) -> Iterator[Any]:
    """The rows of a table; images as they are stored, not opened, which is done by the encoder."""
    if "Image(" not in str(getattr(table, "features", None)):
        yield from table
        return
    for batch in table.with_format("arrow").iter(batch_size=_WITH_IMAGES):
        yield from batch.to_pylist()


_WITH_IMAGES = 32
"""Rows that are taken at a time from a table with images."""


def find(
    dataset: Dataset,
    key: str = "datasets",
    limit: int | None = None,
    streaming: bool = False,
    allow_builders: bool = False,
) -> DataSource:
    """Find a dataset; if it is missing, has a builder and ``allow_builders``, build it.

    ``key`` is its place in the recipe, for messages. A dataset of the hub is not downloaded as a
    whole with ``streaming``. Raises a DataError if it is not there, or its builder fails or is not
    allowed.
    """
    path, packaged = Path(dataset.path), is_package_rows(dataset.path)
    if dataset.builder and not packaged and must_build(dataset.builder, path):
        if not allow_builders:
            raise DataError(f"{key}: builder: {refused_builder(dataset.builder, path)}")
        _build(Path(dataset.builder), path)
    split = _SPLIT.fullmatch(dataset.split or "train")
    if split is None:
        raise DataError(
            f"{key}: split: {dataset.split!r} is not a split; write train, train[:100] or "
            "train[:10%]"
        )
    if packaged:
        _require_train(path, split["name"])
        return DataSource(dataset, table=PackageRows(dataset.path), limit=limit)
    if path.is_dir():
        return replace(_in_folder(dataset, path, split["name"]), limit=limit)
    if path.exists() or path.is_absolute() or dataset.ds_type:
        if not path.exists():
            raise DataError(f"{path}: file not found")
        if not packaged and not path.is_file():
            raise DataError(f"{path}: is a pipe or a device: save its rows in a file first")
        _require_train(path, split["name"])
        return DataSource(dataset, (path,), limit=limit)
    return DataSource(dataset, table=_on_hub(dataset, split["name"], streaming), limit=limit)


def _require_train(path: Path, split: str) -> None:
    if split != "train":
        raise DataError(f"{path}: split: a file has only the split 'train', not {split!r}")


def _forward(progress: Progress, done: int, files: int, share: float) -> None:
    progress((done + share) / files)


def _place(at: str | None, total: int) -> int | None:
    if at is None:
        return None
    return round(int(at[:-1]) * total / 100) if at.endswith("%") else int(at)


def _build(builder: Path, path: Path) -> None:
    """Run a builder in another process, so that what it imports does not stay here."""
    process = subprocess.run(
        [sys.executable, str(builder), str(path)], capture_output=True, text=True, check=False
    )
    if process.returncode or not path.exists():
        output = (process.stderr or process.stdout).strip().splitlines()
        raise DataError(
            f"{builder}: did not build {path} (exit code {process.returncode})"
            + (f": {output[-1]}" if output else "")
        )


def _in_folder(dataset: Dataset, path: Path, split: str) -> DataSource:
    saved = any((path / n).is_file() for n in ("dataset_dict.json", "state.json"))
    if saved:
        return DataSource(dataset, table=_saved(path, split))
    from datasets import load_dataset_builder

    patterns = dataset.data_files
    try:
        if patterns is not None:
            files = {"train": _named(path, [patterns] if isinstance(patterns, str) else patterns)}
        else:  # file names say which split a file belongs to, as everywhere
            by_split = load_dataset_builder(str(path)).config.data_files or {}
            files = {str(k): [Path(f) for f in v] for k, v in by_split.items()}
    except (OSError, ValueError) as error:  # EmptyDatasetError and DataFilesNotFoundError, too
        raise DataError(f"{path}: no data files are in this folder: {first_line(error)}") from None
    except RuntimeError as error:
        raise DataError(
            f"{path}: cannot be read: {first_line(error)}. Nothing of this folder is run; name its "
            "data files in `data_files`, or the Python file that writes them in `builder`"
        ) from None
    if split not in files:
        raise DataError(f"{path}: there is no split {split!r}, only {', '.join(files)}")
    unread: tuple[Path, ...] = ()
    if patterns is None:
        taken = {file.resolve() for each in files.values() for file in each}
        rows = (f for f in path.rglob("*") if kind_of(f) and f.name not in _NO_ROWS)
        seen = (f for f in rows if not _is_hidden(f.relative_to(path)))
        unread = tuple(sorted(f for f in seen if f.resolve() not in taken))
    return DataSource(dataset, tuple(files[split]), unread=unread)


_NO_ROWS = frozenset({
    "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "requirements.txt",
    "state.json",
})  # fmt: skip
"""Files beside data, under names of data."""


def _is_hidden(path: Path) -> bool:
    """Whether ``datasets`` passes by a file on purpose, such as those of git, or of a cache."""
    return path.name.startswith(".") or any(
        part.startswith((".", "__")) for part in path.parent.parts
    )


def _named(folder: Path, names: list[str]) -> list[Path]:
    files: list[Path] = []
    for name in names:
        matches = sorted(folder.glob(name))
        if not matches:
            raise DataError(f"{folder}: data_files: there is no {name} in this folder")
        files += matches
    return files


def _saved(path: Path, split: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        table = load_from_disk(str(path))
    except Exception as error:
        # Arrow's, JSON's and the library's errors: it depends on which part is damaged
        raise DataError(f"{path}: cannot be read by datasets: {first_line(error)}") from None
    if not isinstance(table, DatasetDict):
        return table
    if split not in table:
        raise DataError(f"{path}: there is no split {split!r}, only {', '.join(table)}")
    return table[split]


def _on_hub(dataset: Dataset, split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    if dataset.path in _READERS_OF_CODE:
        raise DataError(
            f"{dataset.path}: this is a file format of the datasets library, not a dataset, and "
            "loading it can run code; convert the file to .jsonl or .parquet"
        )
    files = dataset.data_files
    try:
        return load_dataset(
            dataset.path, dataset.name, split=split, revision=dataset.revision,
            data_files=[files] if isinstance(files, str) else files, streaming=streaming,
        )  # fmt: skip
    except Exception as error:
        # no network, no such dataset, no permission, a bad split: each raises another class
        meant = meant_file(dataset.path, [Path.cwd()])
        raise DataError(
            f"{dataset.path}: cannot be loaded from the hub: {first_line(error)}; there is no "
            "local file or folder of this name either" + (f"; {meant}" if meant else "")
        ) from None
