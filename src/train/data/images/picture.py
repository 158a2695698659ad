"""Pictures that rows name: where each is, whether it can be read, and its pixels.

A picture is a file, or encoded bytes that a row holds (base64, a column of a table), of which the
prepared rows keep one copy, named by its hash. Pixels are made when a batch is (``opened``), and
are never stored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import http.client
import io
import math
import os
import re
import urllib.request
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....errors import DataError, first_line
from ...consent import URL_SWITCH

_DATA_URL = re.compile(r"data:[\w.+-]*(/[\w.+-]+)?(;[\w=.-]+)*;base64,", re.ASCII)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*", re.ASCII)
"""A text that is no path, unless there is such a file."""

_WEB_URL = re.compile(r"https?://", re.IGNORECASE)

MOST_PIXELS = 100_000_000
"""A picture with more is taken for a mistake, or for an attack: 300 MB as RGB."""

_MOST_BYTES = 100_000_000
"""Of the file of an image."""

_TOO_LARGE = f"is larger than {_MOST_BYTES // 10**6} MB: make it smaller"

_DEEP = re.compile(r"\w+;16[BLNS]")
"""Pillow's name of what a file has: 16 bits a channel."""

_SHOWN = 80
"""Characters of an address or a path in messages."""

_SECONDS = 30
"""For a server's answer."""

_THUMBNAIL, _SIDES = 36_000, (320, 224, 160)
"""Bytes that a thumbnail should have at most, and the longer sides that are tried."""


@dataclass(frozen=True)
class Picture:
    """A picture of a row.

    Attributes:
        path: its file, absolute; empty: it is blank, and stands for no picture of a row.
        digest: of the file's bytes (SHA-256).
        size: width and height, turned as its EXIF data says, and resized.
    """

    path: str
    digest: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Resizing:
    """What is done to the size of each picture before the checkpoint's processor has it.

    Attributes:
        size: width and height; one number: a square, with black bars where the picture has none.
        most: more pixels than that are reduced, with the same proportions.
        least: fewer are enlarged.
        algorithm: Pillow's name of a filter, in lower case.
    """

    size: int | tuple[int, int] | None = None
    most: int | None = None
    least: int | None = None
    algorithm: str = "bilinear"

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """The new size of a picture of a size."""
        if self.size is not None:
            return (self.size, self.size) if isinstance(self.size, int) else self.size
        pixels = width * height
        factor = 1.0
        if self.most is not None and pixels > self.most:
            factor = math.sqrt(self.most / pixels)
        elif self.least is not None and pixels < self.least:
            factor = math.sqrt(self.least / pixels)
        if factor == 1.0:
            return width, height
        fit = math.floor if factor < 1 else math.ceil  # on the right side of the limit
        return max(1, fit(width * factor)), max(1, fit(height * factor))

    def resized(self, image: Any) -> Any:
        """A PIL image of the new size."""
        from PIL import Image, ImageOps

        size = self.size_of(*image.size)
        if size == image.size:
            return image
        filter = Image.Resampling[self.algorithm.upper()]
        if isinstance(self.size, int):
            return ImageOps.pad(image, size, filter)
        return image.resize(size, filter)


@dataclass(frozen=True)
class NoImages:
    """Why the images of rows cannot be read, and what to do; in place of an ``ImageReader``."""

    why: str = "the model reads text only: leave images out, or use a model that reads them"
    expander: ClassVar[None] = None
    settings: ClassVar[None] = None

    @property
    def gallery(self) -> NoImages:
        """What says so where a row has an image."""
        return self


TEXT_ONLY = NoImages()


def is_pil(value: Any) -> bool:
    """Whether it is an image of PIL's, whose class is not imported."""
    return hasattr(value, "save") and hasattr(value, "mode")


def is_encoded(content: bytes) -> bool:
    """Whether bytes begin as a file of an image does."""
    return content.startswith(
        (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
    ) or (content[:4] == b"RIFF" and content[8:12] == b"WEBP")


@dataclass(frozen=True)
class Gallery:
    """Finds the pictures of one dataset.

    Attributes:
        folder: relative paths begin here, and none may lead out of it. None: a user names each
            path, which may be anywhere; relative ones begin in the current folder.
        copies: where the bytes are kept that rows hold.
        may_download: whether addresses of the web are asked.
    """

    folder: Path | None
    copies: Path
    resizing: Resizing = Resizing()
    may_download: bool = False

    def picture(self, value: Any, where: str) -> Picture:
        """The picture that ``value`` names or holds.

        Args:
            value: a path, a data URL, bytes, a PIL image, or an object with one of these.
            where: file and line, for messages.

        Raises:
            DataError: it is not there, cannot be read, or may not be.
        """
        source = self._source(value, where)
        if isinstance(source, Path):
            content, name = _read(source, where), str(source)
        else:
            content, name = source, "the image in the row"
        size = self.resizing.size_of(*opened(content, f"{where}: {name}").size)
        if size[0] * size[1] > MOST_PIXELS:
            raise DataError(
                f"{where}: {name}: becomes {size[0]} x {size[1]} pixels, more than "
                f"{MOST_PIXELS // 10**6} million: lower image_size or image_min_pixels"
            )
        digest = hashlib.sha256(content).hexdigest()
        path = source if isinstance(source, Path) else self._kept(content, digest)
        return Picture(str(path), digest, size)

    def has(self, path: str) -> bool:
        """Whether there is such a file in the folder."""
        try:
            return ((self.folder or Path.cwd()) / path).is_file()
        except (OSError, ValueError):  # too long for a path, or a NUL in it
            return False

    def _source(self, value: Any, where: str) -> Path | bytes:
        if isinstance(value, Mapping):
            return self._of_mapping(value, where)
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if isinstance(value, str):
            return self._of_text(value, where)
        if is_pil(value):
            buffer = io.BytesIO()
            try:
                value.save(buffer, "PNG")
            except (OSError, ValueError) as error:  # a mode that PNG does not have, such as CMYK
                raise DataError(f"{where}: {first_line(error)}: convert the image to RGB") from None
            return buffer.getvalue()
        raise DataError(
            f"{where}: must be a path, base64 text, or an object with 'path', 'bytes', 'base64' or "
            f"'url', not a {type(value).__name__}"
        )

    def _of_mapping(self, value: Mapping[str, Any], where: str) -> Path | bytes:
        for key in ("bytes", "base64", "path", "url", "image", "image_url"):
            inner = value.get(key)
            if inner is None:
                continue
            if key == "base64" and isinstance(inner, str):
                return _decoded(inner.rpartition(",")[2], where)
            if key == "bytes" and isinstance(inner, str):
                return _decoded(inner, where)
            return self._source(inner, where)
        raise DataError(
            f"{where}: has none of the fields 'path', 'bytes', 'base64', 'url' with something in "
            f"it: {', '.join(map(repr, value)) or 'it is empty'}"
        )

    def _of_text(self, text: str, where: str) -> Path | bytes:
        if match := _DATA_URL.match(text):
            return _decoded(text[match.end() :], where)
        if _WEB_URL.match(text):
            return self._downloaded(text, where)
        if not text.strip():
            raise DataError(f"{where}: the path is empty")
        path, root = Path(text.removeprefix("file://")), (self.folder or Path.cwd()).resolve()
        try:
            resolved = (path if path.is_absolute() else root / path).resolve()
            missing = "" if resolved.is_file() else "file not found"
            if missing and resolved.exists():
                missing = "is a folder" if resolved.is_dir() else "is a pipe or a device"
        except (OSError, ValueError):  # too long for a path, or a NUL in it
            resolved, missing = root / path.name[:_SHOWN], "this is not a path"
        if missing and _BASE64.fullmatch(text):
            return _decoded(text, where)
        if missing and self.folder is None:
            raise DataError(f"{where}: {resolved}: {missing}")
        if self.folder is not None and not self.folder.is_dir():
            raise DataError(
                f"{where}: {text[:_SHOWN]}: rows of the hub name files that are not here: download "
                "their folder, and name it with images_dir"
            )
        if self.folder is not None and not resolved.is_relative_to(root):
            shown = text[:_SHOWN] if missing else text
            raise DataError(
                f"{where}: {shown}: leads out of {root}: rows may name images in the "
                "folder of their dataset only; name another one with images_dir"
            )
        if missing:
            raise DataError(
                f"{where}: {resolved}: {missing}; relative paths begin in {root}, and images_dir "
                "names another folder"
            )
        return resolved

    def _downloaded(self, url: str, where: str) -> bytes:
        if not self.may_download:
            raise DataError(
                f"{where}: {url[:_SHOWN]}: images are downloaded only with your permission: pass "
                f"{URL_SWITCH}, or save them beside the dataset and name their paths"
            )
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
                content: bytes = answer.read(_MOST_BYTES + 1)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise DataError(
                f"{where}: {url[:_SHOWN]}: cannot be downloaded: {first_line(error)}"
            ) from None
        if len(content) > _MOST_BYTES:
            raise DataError(f"{where}: {url[:_SHOWN]}: {_TOO_LARGE}")
        return content

    def _kept(self, content: bytes, digest: str) -> Path:
        """The copy of bytes that a row holds; raises an OSError if it cannot be written."""
        path = self.copies / digest
        if not path.exists():
            self.copies.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_bytes(content)
            part.replace(path)
        return path


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: is not base64: {first_line(error)}: encode it anew") from None


def _read(path: Path, where: str) -> bytes:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{where}: {path}: {_TOO_LARGE}")
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise DataError(f"{where}: {path}: cannot be read: {reason}") from None


def load(picture: Picture, resizing: Resizing, where: str) -> Any:
    """An image of a row as a PIL image, resized; raises a DataError if its file has changed."""
    if not picture.path:
        return _blank(picture.size)
    content = _read(Path(picture.path), where)
    if hashlib.sha256(content).hexdigest() != picture.digest:
        raise DataError(
            f"{where}: {picture.path}: has changed since its row was prepared: put it back, or "
            "begin a new run, which prepares the row anew"
        )
    return resizing.resized(opened(content, f"{where}: {picture.path}"))


def _blank(size: tuple[int, int]) -> Any:
    """A PIL image with nothing on it, but no two parts that are the same."""
    from PIL import Image

    across = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", [across, across.transpose(Image.Transpose.ROTATE_90), across])


def opened(content: bytes, place: str) -> Any:
    """A picture as a PIL image in RGB, turned as its EXIF data says.

    That is how transformers loads one; what it would load without a word as something else is
    refused. Raises a DataError that begins with ``place``.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not content:
        raise DataError(f"{place}: is empty: save it anew, or leave the row out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and metadata: the first is asked for below
            image = Image.open(io.BytesIO(content))
            width, height = image.size
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"{place}: has {width} x {height} pixels, more than "
                    f"{MOST_PIXELS // 10**6} million: make it smaller"
                )
            _require_plain(image, place)
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(
            f"{place}: is not an image that Pillow can read: save it as PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:
        raise DataError(f"{place}: has far too many pixels: make it smaller") from None
    except Exception as error:  # Pillow's decoders raise anything
        raise DataError(
            f"{place}: is damaged or cut off ({first_line(error)}): copy it again"
        ) from None


def _require_plain(image: Any, place: str) -> None:
    """Raise a DataError for what ``convert("RGB")`` would change without a word."""
    if image.format == "EPS":  # Pillow has another program run it
        raise DataError(f"{place}: is a drawing (EPS): save it as PNG")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's: the others are small or other views
        raise DataError(f"{place}: is animated ({frames} frames): save the one that is meant")
    if image.mode == "CMYK":
        raise DataError(
            f"{place}: has the colours of print (CMYK), which change without their profile: "
            "convert it to RGB"
        )
    # Pillow reads colours of 16 bits, too, of which it keeps the upper 8
    stored = next((m[0] for tile in image.tile if (m := _DEEP.search(str(tile[3])))), image.mode)
    if image.mode.startswith("I") or image.mode == "F" or stored != image.mode:
        raise DataError(
            f"{place}: has more than 8 bits a channel (mode {stored}), which would be cut off: "
            "scale it to 8 bits"
        )


def thumbnail(picture: Picture, where: str) -> str:
    """A small copy of a picture's file as a data URL; raises a DataError as ``load`` does."""
    image = load(picture, Resizing(), where)
    for side in _SIDES:
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        if buffer.tell() <= _THUMBNAIL:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
