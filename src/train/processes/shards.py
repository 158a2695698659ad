"""Files of tensors of which each process writes its own share, and reads what it needs.

``torch.distributed.checkpoint`` writes and reads them as safetensors, whose headers say which part
of a tensor each file has. Its usual form also has a pickle, which would run any code that somebody
has put into it; this one has none, and an existing pickle is never opened.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS = "weights"
"""Prefix of the names of weights; an optimizer's state has its key as the prefix."""


def write(folder: Path, tensors: Mapping[str, Tensor], rank: int) -> dict[str, int]:
    """Write the shares of this process; a collective, which fails for all if it fails for one.

    A file has the tensors of one kind, so that no more than those are copied at a time. ``tensors``
    are by ``KIND/NAME``, the same names on every process. What is not sharded is written by one of
    them. Returns the files of this process, with their sizes.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    kinds = sorted({name.partition("/")[0] for name in tensors})
    files = {name: 1 + kinds.index(name.partition("/")[0]) for name in tensors}
    writer = HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True
    )
    with _first_error():
        save(dict(tensors), storage_writer=writer)
    paths = folder.glob(f"shard-{rank + 1:05d}-*")
    return {path.name: path.stat().st_size for path in paths}


def read(folder: Path, tensors: dict[str, Any]) -> None:
    """Fill ``tensors`` from files by their names, whatever number of processes has written them.

    Of a sharded tensor, only the share of this process is read. The processes need not agree.

    Raises:
        ValueError: a tensor is not there, or has another size.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with warnings.catch_warnings(), _first_error():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


def sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Size and dtype of each whole tensor in files of shares."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    metadata: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (tensor.size, tensor.properties.dtype) for name, tensor in metadata.items()}


def read_whole(folder: Path, kind: str) -> dict[str, Tensor]:
    """The whole tensors of a kind, by their names."""
    prefix = f"{kind}/"
    tensors = {
        name: torch.empty(size, dtype=dtype)
        for name, (size, dtype) in sizes(folder).items()
        if name.startswith(prefix)
    }
    read(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def sharded_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model sharded by FSDP2, of which each process has its share.

    Where adapters are trained these are the trained ones; else all of them, each once, and buffers.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    adapters = hasattr(model, "peft_config")
    options = StateDictOptions(ignore_frozen_params=adapters)
    weights: dict[str, Any] = dict(get_model_state_dict(model, options=options))
    if adapters:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        return {name: value for name, value in weights.items() if name in trained}
    once = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once
    return {name: value for name, value in weights.items() if name not in tied}


@contextlib.contextmanager
def _first_error() -> Iterator[None]:
    """Raise the first error of a process, in place of PyTorch's account of all of them."""
    # that account is no ``Exception``, and has the tracebacks of all processes as its text
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        failures = error.failures
        raise failures[min(failures)][0] from None
