"""Checkpoints in shards: each process writes its own, and none has the whole.

Values that are not tensors, such as step counts and learning rates, are in JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ...sharding import has_shards, is_dtensor
from ..model.files import FOLDER, Shards
from ..processes.gather import Groups, by_name, by_number
from ..processes.shards import WEIGHTS, read, read_whole, sharded_weights, sizes, write
from ..processes.world import World
from .save_model import save

_STATE = "optimizer."
"""Prefix of the kinds of the optimizer's tensors."""


Written = tuple[dict[str, int], dict[str, Any] | None]
"""The files of all processes with their sizes, and the optimizer's state besides tensors."""


def write_shards(
    part: Path, world: World, model: nn.Module, state: Mapping[str, Any] | None
) -> Written:
    """Write the weights and the optimizer's state of all processes; a collective.

    The model is sharded by FSDP2. ``state`` is the optimizer's, by the names of parameters; None:
    it is not saved. The result is for ``write_list``.
    """
    tensors = {f"{WEIGHTS}/{name}": value for name, value in sharded_weights(model).items()}
    rest = None
    if state is not None:
        values = state["state"]
        tensors |= {
            f"{_STATE}{key}/{name}": value
            for name, entry in values.items()
            for key, value in entry.items()
            if _is_array(value)
        }
        numbers = {
            name: {key: _encoded(value) for key, value in entry.items() if not _is_array(value)}
            for name, entry in values.items()
        }
        rest = {"state": numbers, "param_groups": _encoded(state["param_groups"])}
    written = world.gather(write(part / FOLDER, tensors, world.rank))
    files = {name: size for entry in written for name, size in entry.items()}
    return files, rest


def write_list(part: Path, model: Any, tokenizer: Any, written: Written) -> None:
    """Write what a checkpoint in shards has once: its list of files, configurations, tokenizer."""
    files, optimizer = written
    Shards(part, files, _settings(model, tokenizer, part), optimizer).write()


def _settings(model: Any, tokenizer: Any, part: Path) -> dict[str, str] | None:
    """Write configurations and tokenizer; return names in an adapter's file, and the model's."""
    # PEFT decides on those: it saves numbers in place of the weights, and that file is removed
    if not hasattr(model, "peft_config"):
        save(model, tokenizer, part, {})
        for path in part.glob("model*.safetensors*"):
            path.unlink()
        return None
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    save(model, tokenizer, part, {name: torch.tensor(i) for i, name in enumerate(names)})
    path = part / "adapter_model.safetensors"
    numbers = load_file(path)
    path.unlink()
    return {key: names[int(number)] for key, number in numbers.items()}


def load_weights(folder: Path, model: Any) -> None:
    """Load a checkpoint in shards; a model sharded by FSDP2 reads its own shares only.

    Raises:
        ValueError: a file is missing or damaged, or has not all that is trained.
    """
    shards = Shards.read(folder)
    if has_shards(model):
        read(shards.place, {f"{WEIGHTS}/{n}": v for n, v in sharded_weights(model).items()})
        return
    weights = shards.weights()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained - set(weights)):
        raise ValueError(f"its shards have no {missing[0]}")
    model.load_state_dict(weights, strict=False)


def read_optimizer(folder: Path, groups: Groups) -> dict[str, Any]:
    """The optimizer's whole state, as ``state_dict`` has it for one process.

    The checkpoint may be in shards or not; ``groups`` are the names of the optimizer's parameters.
    """
    if not (folder / FOLDER).is_dir():
        whole: Any = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        return dict(whole)
    shards = Shards.read(folder)
    named = _without_tensors(shards)
    kinds = {name.partition("/")[0] for name in sizes(shards.place)}
    for kind in sorted(kinds - {WEIGHTS}):
        for name, value in read_whole(shards.place, kind).items():
            named["state"][name][kind.removeprefix(_STATE)] = value
    return by_number(named, groups)


def load_optimizer(folder: Path, model: nn.Module, optimizer: Any, groups: Groups) -> None:
    """Load the shares of an optimizer over parameters sharded by FSDP2 from a checkpoint in shards.

    Raises:
        ValueError: a file is missing or damaged.
    """
    shards = Shards.read(folder)
    named = _without_tensors(shards)
    parameters = dict(model.named_parameters())
    full_sizes = sizes(shards.place)
    tensors: dict[str, Any] = {}
    initial: Any = None
    for full, (size, dtype) in full_sizes.items():
        kind, _, name = full.partition("/")
        if kind == WEIGHTS:
            continue
        like, key = parameters[name], kind.removeprefix(_STATE)
        if like.shape == size:
            value: Any = torch.zeros_like(like, dtype=dtype)
        else:  # of rows or columns, say; only the optimizer knows how it shares them
            initial = initial or _begun(model, optimizer)
            value = initial[name][key]
        tensors[full] = named["state"][name][key] = value
    read(shards.place, tensors)
    optimizer.load_state_dict(by_number(named, groups))


def _begun(model: nn.Module, optimizer: Any) -> Any:
    """The state of an optimizer by names, as its first step creates it."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer)["state"]


def named_state(optimizer: Any, groups: Groups) -> dict[str, Any]:
    """The state of an optimizer in this process, by the names of parameters."""
    return by_name(optimizer.state_dict(), groups)


def _without_tensors(shards: Shards) -> dict[str, Any]:
    if shards.optimizer is None:
        raise ValueError("it has no state of the optimizer")
    saved: Any = shards.optimizer
    state = {name: _decoded(entry) for name, entry in saved["state"].items()}
    return {"state": state, "param_groups": _decoded(saved["param_groups"])}


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor of more than a single number."""
    return is_dtensor(value) or (isinstance(value, Tensor) and value.ndim > 0)


def _encoded(value: Any) -> Any:
    """A value as JSON; ``_decoded`` restores tuples and single numbers of tensors."""
    if isinstance(value, dict):
        return {name: _encoded(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return {"tuple": [_encoded(entry) for entry in value]}
    if isinstance(value, list):
        return [_encoded(entry) for entry in value]
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tuple"}:
        return tuple(_decoded(entry) for entry in value["tuple"])
    if value.keys() == {"tensor", "dtype"}:
        return torch.tensor(value["tensor"], dtype=_dtype(value["dtype"]))
    return {name: _decoded(entry) for name, entry in value.items()}


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"its shards.json has a dtype {name!r}, which PyTorch does not have")
    return dtype
