"""The tensors in a base model's safetensors files; a saved model takes what it does not train."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import FusewrightError, ModelError, first_line
from ..output_files import GENERATION_SETTINGS, let_others_read, write_generation_settings
from ..recipe.locate import locate
from .multimodal import is_in, untrained, untrained_towers

_TEMPLATE = "chat_template.json"
"""A chat template of older processors, which transformers prefers to the tokenizer's."""

_PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    _TEMPLATE,
)  # fmt: skip
"""The files of a processor, besides those of its tokenizer."""

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"

_STORED_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class BaseFiles:
    """Tensors on disk, by name; only those in use are in memory.

    Attributes:
        shapes: of every tensor, in the order of the files.

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
            except Exception as error:  # safetensors raises its own class
                raise ModelError(f"{path} cannot be read: {first_line(error)}") from None

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, mapped from its file: its pages come as they are used."""
        with safe_open(self._file[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def places(self) -> dict[str, Path]:
        """The file of each tensor."""
        return dict(self._file)

    def bytes(self, name: str) -> int:
        """The size of a tensor."""
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def _list(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # 2026-11-25: not a dict
                part = file.get_slice(name)
                if part.get_dtype() not in _STORED_DTYPES:
                    raise ValueError(f"{name} is {part.get_dtype()}")
                self.shapes[name] = tuple(part.get_shape())
                self.dtypes[name] = _STORED_DTYPES[part.get_dtype()]
                self._file[name] = path


def base_files(base_model: str, revision: str | None = None) -> BaseFiles | None:
    """Find the safetensors files of a base model; None where it has another kind, such as GGUF.

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


def processor_files(base_model: str, revision: str | None) -> list[Path]:
    """The files of the processor that comes with a base model; empty: it has none."""
    try:
        source = locate(base_model, [Path.cwd()])
        files = [] if source.gguf_file else [_file(source.name, n, revision) for n in _PROCESSOR]
    except (FusewrightError, OSError):  # the hub does not answer
        return []
    return [file for file in files if file is not None]


def copy_processor(base_model: str, revision: str | None, folder: Path) -> bool:
    """Copy the processor that comes with a base model beside a tokenizer that has been saved.

    Returns whether there is one.
    """
    files = processor_files(base_model, revision)
    for file in files:
        if file.name != _TEMPLATE or not (folder / "chat_template.jinja").exists():
            shutil.copy(file, folder)
    return bool(files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{index} cannot be read: {first_line(error)}") from None
    return names


def _file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a model, which is downloaded if the model is a Hugging Face id."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    options: dict[str, Any] = {"revision": revision} if revision else {}
    cached = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
    return Path(cached) if cached else None


def save_with_base(
    model: Any,
    folder: Path,
    files: BaseFiles | None,
    state: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    """Save a whole model, with what it does not train of its base's files, bit for bit.

    ``state`` has its weights; None: they are in the model. ``files`` are None where the base has
    none of this kind: then the model is saved as it is. ``dtype`` is that of what is not trained;
    None: as it is stored. ``options`` are for ``save_pretrained``.
    """
    keys = [] if files is None else untrained(model, files.shapes)
    if keys:
        places = untrained_towers(model)
        state = model.state_dict() if state is None else state
        state = {name: value for name, value in state.items() if not is_in(name, places)}
    if state is not None:
        options["state_dict"] = state
    with _generation_settings_as_they_are(model, folder):
        model.save_pretrained(folder, **options)
    if files is not None and keys:
        _add(folder, keys, files, dtype, options.get("max_shard_size", "50GB"))
    let_others_read(folder)


@contextlib.contextmanager
def _generation_settings_as_they_are(model: Any, folder: Path) -> Iterator[None]:
    """Save a model without letting ``save_pretrained`` judge how it generates."""
    settings = vars(model).get("generation_config")  # an adapter is saved without its base's
    if settings is None:
        yield
        return
    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings
    if (folder / GENERATION_SETTINGS).is_file():
        write_generation_settings(settings, folder)


def _add(
    folder: Path, keys: Sequence[str], files: BaseFiles, dtype: torch.dtype | None, size: str
) -> None:
    """Add tensors to a saved model that lacks them, in files of their own."""
    from huggingface_hub import split_torch_state_dict_into_shards

    paths = sorted(folder.glob("model*.safetensors"))
    saved = BaseFiles(paths)
    keys = [key for key in keys if key not in saved.shapes]
    if not keys:
        return
    dtypes = {key: _result_dtype(files.dtypes[key], dtype) for key in keys}
    empty = {k: torch.empty(files.shapes[k], dtype=dtypes[k], device="meta") for k in keys}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model-base{suffix}.safetensors", max_shard_size=size
    )
    for name, members in split.filename_to_tensors.items():
        tensors = {key: files.read(key).to(dtypes[key]).contiguous() for key in members}
        save_file(tensors, folder / name, metadata={"format": "pt"})
    paths += [folder / name for name in split.filename_to_tensors]
    names = {
        path: f"model-{i:05d}-of-{len(paths):05d}.safetensors" for i, path in enumerate(paths, 1)
    }
    everything = BaseFiles(paths)
    weight_map = {key: names[path] for key, path in everything.places().items()}
    total = sum(everything.bytes(key) for key in weight_map)
    for path, name in names.items():
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / _INDEX).write_text(text, encoding="utf-8")


def _result_dtype(stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and stored.is_floating_point else stored
