"""Weights and optimizer states in parts of several processes, as one process has them.

So a checkpoint has one form whatever made it, and can be resumed from by any number of processes
and any strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_FULL: dict[str, Any] = {"full_state_dict": True, "cpu_offload": True}

Groups = Sequence[Sequence[str]]
"""The names of an optimizer's parameters, by group, in its order."""


def in_parts(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 has sharded a model by now."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def whole_weights(model: nn.Module, trained_only: bool) -> dict[str, Any]:
    """The weights of a model that FSDP2 has sharded, by their names; on rank 0 whole, on the CPU.

    Args:
        model: the sharded model.
        trained_only: leave out those that are frozen.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(**_FULL, ignore_frozen_params=trained_only)
    return dict(get_model_state_dict(model, options=options))


def load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Give a model that FSDP2 has sharded whole weights; the opposite of ``whole_weights``.

    Args:
        model: the sharded model.
        state: the weights by their names, the same on every process. Others stay as they are.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, state, options=options)


def whole_optimizer(model: nn.Module, optimizer: Any, groups: Groups) -> dict[str, Any] | None:
    """The state of an optimizer over sharded parameters, as ``state_dict`` has it for whole ones.

    Args:
        model: the sharded model.
        optimizer: over its parameters.
        groups: their names.

    Returns:
        The state on rank 0; None on the others.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    found: Any = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**_FULL))
    return by_number(found, groups) if found else None


def load_optimizer(model: nn.Module, optimizer: Any, state: dict[str, Any], groups: Groups) -> None:
    """Give an optimizer over sharded parameters the state of one over whole ones.

    Args:
        model: the sharded model.
        optimizer: over its parameters.
        state: a ``state_dict``, the same on every process.
        groups: the names of the parameters.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    named: Any = by_name(state, groups)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, named, options=options)


def by_number(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A state by the names of parameters as one by their numbers, which ``state_dict`` has."""
    numbers = {name: i for i, name in enumerate(n for names in groups for n in names)}
    given = [list(map(numbers.__getitem__, names)) for names in groups]
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": own}
            for group, own in zip(state["param_groups"], given, strict=True)
        ],
    }


def by_name(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The opposite of ``by_number``."""
    names = [name for own in groups for name in own]
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": list(own)}
            for group, own in zip(state["param_groups"], groups, strict=True)
        ],
    }


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of an optimizer's parameters, by group, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
