"""bitsandbytes' optimizers over shares: their steps, and their states in checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fusewright.optim import blockwise
from fusewright.train.checkpoint import sharded
from fusewright.train.checkpoint.write import write_collectively
from fusewright.train.model.files import Shards
from fusewright.train.processes import gather
from fusewright.train.processes.world import World

from .ranks import alone, values

KINDS = ("AdamW8bit", "AdEMAMix8bit", "Lion8bit", "AdamW")
_LIMIT = 240.0  # the processes import bitsandbytes


def _model(sizes: tuple[int, int, int]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def _optimizer(world: World, model: nn.Module, kind: str) -> Any:
    import bitsandbytes

    optimizer = getattr(bitsandbytes.optim, kind)(
        [{"params": list(model.parameters())}, {"params": []}], lr=0.01
    )
    return blockwise.over_shards(optimizer) if world.several else optimizer


def _step(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for number in range(first, last):
        torch.manual_seed(number)
        model(torch.randn(3, model[0].in_features)).square().sum().backward()  # type: ignore[index, operator]
        optimizer.step()
        optimizer.zero_grad()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def _trained(
    world: World, kind: str, sizes: tuple[int, int, int], folder: str, start: str = ""
) -> str:
    """Train for five steps; with a ``start``, from a file of that kind, the last two.

    Returns the file of the weights, as they are after the last one.
    """
    model = _model(sizes)
    if world.several:
        fully_shard(model)
    optimizer = _optimizer(world, model, kind)
    names = gather.names_by_group(model, optimizer)
    if start:
        _load(world, Path(folder), start, model, optimizer, names)
    else:
        _step(model, optimizer, 0, 3)
        _save(world, Path(folder), model, optimizer, names)
    _step(model, optimizer, 3, 5)
    weights = [_whole(p) for p in model.parameters()]
    path = Path(folder, f"after-{start}-{world.size}-{world.rank}.pt")
    torch.save(weights, path)
    return str(path)


def _save(world: World, folder: Path, model: nn.Module, optimizer: Any, names: Any) -> None:
    state, weights = optimizer.state_dict(), model.state_dict()
    if world.several:
        named = sharded.named_state(optimizer, names)
        whole = gather.whole_optimizer(model, optimizer, names)
        state = blockwise.stored(whole) if whole else None
        weights = gather.whole_weights(model, trained_only=False)

        def write(part: Path) -> None:
            files, rest = sharded.write_shards(part, world, model, named)
            if world.main:
                Shards(part, files, None, rest).write()

        write_collectively(world, folder, 3, write)
    if world.main:
        torch.save({"optimizer": state, "weights": weights}, folder / "whole.pt")


def _load(
    world: World, folder: Path, start: str, model: nn.Module, optimizer: Any, names: Any
) -> None:
    saved = torch.load(folder / "whole.pt", weights_only=True)
    if world.several:
        gather.load_weights(model, saved["weights"])
    else:
        model.load_state_dict(saved["weights"])
    if start == "shards":
        sharded.load_optimizer(folder / "checkpoint-3", model, optimizer, names)
    elif world.several:
        optimizer.load_state_dict(blockwise.expanded(saved["optimizer"]))
    else:
        optimizer.load_state_dict(blockwise.stored(saved["optimizer"], requantize=True))


def _difference(one: str, other: str) -> float:
    pairs = zip(torch.load(one), torch.load(other), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


WHOLE, CUT = (128, 64, 128), (90, 99, 1)
"""The sizes of layers of which each process has whole blocks of 256, and of others."""


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [WHOLE, CUT], ids=["whole blocks", "cut blocks"])
def test_resumes_bit_by_bit_in_the_same_shares(
    kind: str, sizes: tuple[int, int, int], tmp_path: Path
) -> None:
    """From a file of whole states, and from one in shards; and elsewhere nearly."""
    given = kind, sizes, str(tmp_path)
    if sizes is WHOLE:
        one = _trained(alone(), *given)
    first, _ = values(_trained, *given, limit=_LIMIT)
    if sizes is WHOLE:  # as one process, whose blocks are the same
        assert _difference(first, one) < 1e-6
    for start in ("whole", "shards"):
        for resumed in values(_trained, *given, start, limit=_LIMIT):
            assert _difference(resumed, first) == 0
    elsewhere = _trained(alone(), *given, "whole")
    assert _difference(elsewhere, first) < (1e-6 if sizes is WHOLE else 0.02)
