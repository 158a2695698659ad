"""Batches that were made before a checkpoint and are trained on after it.

Their tensors are in ``completions-RANK.safetensors``, one file for each process, and are read by as
many processes as there are then. Pass k of process r of N is the one with the number k * N + r of
all, as in ``data.ranks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import RecipeError
from ..processes.world import World
from .resume import another

PendingBatch = dict[str, Tensor]


def write_batches(folder: Path, batches: Sequence[Mapping[str, Any]], world: World) -> None:
    """Write the batches of this process into a checkpoint.

    Args:
        folder: of the checkpoint.
        batches: tensors by their names; what is None is left out.
        world: the processes of the run.
    """
    tensors = {
        f"{k}.{name}": value.detach().cpu().clone().contiguous()
        for k, batch in enumerate(batches)
        for name, value in batch.items()
        if value is not None
    }
    save_file(tensors, _file(folder, world.batch_rank))


def read_batches(folder: Path, world: World, processes: int) -> list[PendingBatch]:
    """Read the batches of this process from a checkpoint.

    Args:
        folder: of the checkpoint.
        world: the processes of the run.
        processes: how many wrote the checkpoint.

    Raises:
        RecipeError: a file is missing.
    """
    found: dict[int, PendingBatch] = {}
    for rank in range(processes):
        file = _file(folder, rank)
        if not file.is_file():
            raise RecipeError(another(folder, f"it has no {file.name}"))
        for key, value in load_file(file).items():
            k, _, name = key.partition(".")
            found.setdefault(int(k) * processes + rank, {})[name] = value
    return [found[i] for i in range(world.batch_rank, len(found), world.batch_ranks)]


def _file(folder: Path, rank: int) -> Path:
    return folder / f"completions-{rank}.safetensors"
