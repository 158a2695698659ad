"""Writing a model's folder: tensors into safetensors files, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import ModelError, RecipeError, first_line
from ..terminal import announce

Shape = tuple[int, ...]


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes ``output`` when everything went well, and vanishes otherwise.

    It stands beside ``output``; what a killed process left there is removed first.

    Raises:
        RecipeError: ``output`` is there already, or cannot be made.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"{output} is there already; name another folder: --output DIR")
    unfinished = output.with_name(f".{output.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"{output} cannot be written to: {error.strerror}") from None
    try:
        yield unfinished
        unfinished.replace(output)
    except OSError as error:
        raise ModelError(f"{output} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_shards(
    folder: Path,
    plan: Mapping[str, tuple[Shape, torch.dtype]],
    tensor: Callable[[str], Tensor],
    max_shard_size: str,
) -> int:
    """Write tensors into files of limited size; no more than one file's are in memory.

    Args:
        folder: of the files.
        plan: shape and dtype of every tensor, in the order of the files.
        tensor: makes the one of a name; called once for each, in order.
        max_shard_size: such as ``"5GB"``.

    Returns:
        The size of all tensors, in bytes.

    Raises:
        RecipeError: ``max_shard_size`` is not a size.
        ModelError: the disk has no room for them.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    empty = {n: torch.empty(s, dtype=d, device="meta") for n, (s, d) in plan.items()}
    try:
        split = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    except ValueError as error:
        raise RecipeError(f"max_shard_size: {first_line(error)}; say 500MB or 5GB") from None
    total = int(split.metadata["total_size"])
    free = shutil.disk_usage(folder).free
    if total > free:
        raise ModelError(
            f"the model takes {total / 1e9:,.1f} GB, and {folder.parent} has {free / 1e9:,.1f} left"
        )
    for file, names in split.filename_to_tensors.items():
        announce(f"writing {file}")
        _write(folder / file, {name: plan[name][1] for name in names}, tensor)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return total


def _write(file: Path, dtypes: Mapping[str, torch.dtype], tensor: Callable[[str], Tensor]) -> None:
    """Make the tensors of one file and write it; they are gone before those of the next come."""
    tensors = {name: tensor(name).to(dtype).contiguous() for name, dtype in dtypes.items()}
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except Exception as error:  # safetensors has an error of its own
        raise ModelError(f"{file} cannot be written: {first_line(error)}") from error
