"""The safetensors files of a base model, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import ModelError, first_line
from ..recipe.locate import locate

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class BaseFiles:
    """Tensors on disk, by name. Only what is asked for is in memory.

    Args:
        files: safetensors files, in order.

    Attributes:
        shapes: of every tensor, in the order of the files.
        dtypes: the same.

    Raises:
        ModelError: a file is missing, damaged, or holds something that is not a plain tensor.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._file: dict[str, Path] = {}
        for path in files:
            try:
                self._list(path)
            except Exception as error:  # safetensors has an error of its own
                raise ModelError(f"{path} cannot be read: {first_line(error)}") from None

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, mapped from its file: its pages come as they are used."""
        with safe_open(self._file[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _list(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # 2026-11-25: not a dict
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise ValueError(f"{name} is {part.get_dtype()}")
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _DTYPES[part.get_dtype()]
                self._file[name] = path


def base_files(base_model: str, revision: str | None = None) -> BaseFiles | None:
    """Find the safetensors files of a base model.

    Args:
        base_model: as a recipe's.
        revision: of a Hugging Face id.

    Returns:
        None where its weights are in files of another kind, such as GGUF.

    Raises:
        RecipeError: the base is not there.
        ModelError: a file is missing or damaged.
    """
    source = locate(base_model, [Path.cwd()])
    if source.gguf_file:
        return None
    index = _file(source.name, _INDEX, revision)
    if index is not None:
        names = sorted(set(_weight_map(index).values()))
        files = [_file(source.name, name, revision) for name in names]
        missing = [name for name, file in zip(names, files, strict=True) if file is None]
        if missing:
            raise ModelError(f"{source.name}: {_INDEX} names {missing[0]}, which is not there")
        return BaseFiles([file for file in files if file is not None])
    single = _file(source.name, _SINGLE, revision)
    return BaseFiles([single]) if single is not None else None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{index} cannot be read: {first_line(error)}") from None
    return found


def _file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a model, which is downloaded if the model is a Hugging Face id."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    options: dict[str, Any] = {"revision": revision} if revision else {}
    found = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    return Path(found) if found else None
