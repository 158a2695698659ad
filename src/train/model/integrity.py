"""Files of models, adapters and checkpoints, looked at before anything of them is loaded."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..json_text import BadJsonError, parse_json

_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # of the safetensors format


def damage(path: Path) -> str | None:
    """Why a file cannot be what its name says, in a few words; None if nothing shows.

    Only its size and what describes its content are read, so that this is quick for large files.

    Args:
        path: ``.safetensors``, ``.json``, or of ``torch.save``; others are taken as they are.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(len(_POINTER))
        if not begin:
            return "is empty"
        if begin == _POINTER:
            return "is a pointer of Git LFS instead of the file: run git lfs pull"
        if path.suffix == ".safetensors":
            tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif begin.startswith(b"PK"):  # as torch.save writes since 1.6
            zipfile.ZipFile(path).close()
    except FileNotFoundError:
        return "is not there"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except json.JSONDecodeError as error:
        return f"is not valid JSON: {error.msg} (line {error.lineno})"
    except UnicodeDecodeError:
        return "is not valid JSON: it is not UTF-8"
    except zipfile.BadZipFile:
        return "is damaged: its end is missing"
    except ValueError as error:
        return f"is damaged: {error}"
    return None


def damaged(paths: Iterable[Path]) -> str | None:
    """The first of several files that is damaged, and why; None if none is."""
    for path in paths:
        said = damage(path)
        if said is not None:
            return f"{path} {said}"
    return None


def tensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a safetensors file, which is not read further.

    Raises:
        ValueError: it is none, not as long as it says, or its header is not valid.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _LARGEST_HEADER:
            raise ValueError("it does not start like a safetensors file")
        if size < 8 + length:
            raise ValueError(f"its {size:,} bytes are only a part of it")
        try:
            header = json.loads(file.read(length))
            found: dict[str, Any] = {k: v for k, v in header.items() if k != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in found.values()), default=0)
            shapes = {name: tuple(entry["shape"]) for name, entry in found.items()}
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise ValueError("it does not start like a safetensors file") from None
    whole = 8 + length + end
    if size != whole:
        raise ValueError(f"it should have {whole:,} bytes and has {size:,}")
    _require_valid_header(path)
    return shapes


def _require_valid_header(path: Path) -> None:
    """See that the library of the format can read the header, which places each tensor.

    Raises:
        ValueError: it cannot; the message says why, in its words.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"its header is not valid ({why})") from None


def read_object(path: Path, any_text: bool = False) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        any_text: it may hold characters that no text has, as vocabularies do.

    Raises:
        ValueError: it cannot be read, or is none; the message has the path.
    """
    try:
        parse = json.loads if any_text else parse_json
        content = parse(path.read_text(encoding="utf-8"))
    except BadJsonError as error:
        where = f" (line {error.line})" if error.line else ""
        raise ValueError(f"{error.of(str(path))}{where}") from None
    except (OSError, ValueError):
        raise ValueError(f"{path} {damage(path) or 'cannot be read'}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object")
    return content
