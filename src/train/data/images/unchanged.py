"""Whether the images of prepared rows are still those that the rows were prepared with.

Rows in the cache name the files of their images. When they are used again, a file that has another
time or size is hashed: if its content is another one, the rows are prepared anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ....errors import DataError
from ..readers.files import hash_file

_FILE = "images.json"


class ImageRecord:
    """The images of rows that are being written."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[str, int, int]] = {}

    def add(self, extras: Iterable[str]) -> None:
        """Note the images of samples, by their ``extra``."""
        for extra in filter(None, extras):
            for picture in json.loads(extra).get("pictures", ()):
                path = picture["path"]
                if path not in self._files:
                    self._files[path] = (picture["digest"], *_stamp(path))

    def save(self, folder: Path) -> None:
        """Write them beside the rows, if there are any."""
        if self._files:
            (folder / _FILE).write_text(json.dumps(self._files), encoding="utf-8")


def unchanged(folder: Path) -> bool:
    """Whether all images of the rows in a folder are as they were."""
    return all(
        _stamp(path) == (size, time) or _digest(path) == digest
        for path, (digest, size, time) in _read(folder).items()
    )


def with_images(fingerprint: str, folder: Path) -> str:
    """A hash that also depends on what is in the images of the rows in a folder, if any."""
    digests = sorted(digest for digest, _, _ in _read(folder).values())
    text = "".join([fingerprint, *digests])
    return hashlib.sha256(text.encode()).hexdigest()[:32] if digests else fingerprint


def _read(folder: Path) -> dict[str, tuple[str, int, int]]:
    path = folder / _FILE
    files: dict[str, tuple[str, int, int]] = {}
    if path.exists():
        files = json.loads(path.read_text("utf-8"))
    return files


def _stamp(path: str) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        about = Path(path).stat()
        return about.st_size, about.st_mtime_ns
    return -1, -1


def _digest(path: str) -> str:
    with contextlib.suppress(DataError):
        return hash_file(Path(path)).hex()
    return ""
