"""Weights and optimizer states in parts of several processes, as one process has them.

So every checkpoint has the same form, and any number of processes with any strategy can resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

_FULL: dict[str, Any] = {"full_state_dict": True, "cpu_offload": True}

Groups = Sequence[Sequence[str]]
"""The names of an optimizer's parameters, by group, in its order."""


def whole_weights(model: nn.Module, trained_only: bool) -> dict[str, Any]:
    """The weights of a model sharded by FSDP2, by name; whole, on rank 0, on the CPU."""
    options = dcp.StateDictOptions(**_FULL, ignore_frozen_params=trained_only)
    return dict(dcp.get_model_state_dict(model, options=options))


def load_weights(model: nn.Module, state: dict[str, Any]) -> None:
    """Load whole weights, the same on every process, into a model sharded by FSDP2.

    Weights without an entry in ``state`` stay as they are.
    """
    options = dcp.StateDictOptions(full_state_dict=True, strict=False)
    dcp.set_model_state_dict(model, state, options=options)


def whole_optimizer(model: nn.Module, optimizer: Any, groups: Groups) -> dict[str, Any] | None:
    """The state of an optimizer over sharded parameters, as ``state_dict`` has it for whole ones.

    On rank 0; None on the others. ``groups`` are the names of its parameters.
    """
    state: Any = dcp.get_optimizer_state_dict(
        model, optimizer, options=dcp.StateDictOptions(**_FULL)
    )
    return by_number(state, groups) if state else None


def load_optimizer(model: nn.Module, optimizer: Any, state: dict[str, Any], groups: Groups) -> None:
    """Load a ``state_dict`` over whole parameters into an optimizer over sharded ones.

    ``state`` is the same on every process; ``groups`` are the names of the parameters.
    """
    named: Any = by_name(state, groups)
    options = dcp.StateDictOptions(full_state_dict=True)
    dcp.set_optimizer_state_dict(model, optimizer, named, options=options)


def by_number(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A state by the names of parameters, converted to their numbers as in ``state_dict``."""
    numbers = {name: i for i, name in enumerate(n for names in groups for n in names)}
    number_groups = [list(map(numbers.__getitem__, names)) for names in groups]
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": indices}
            for group, indices in zip(state["param_groups"], number_groups, strict=True)
        ],
    }


def by_name(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The opposite of ``by_number``."""
    names = [name for members in groups for name in members]
    return {
        "state": {names[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": list(members)}
            for group, members in zip(state["param_groups"], groups, strict=True)
        ],
    }


def names_by_group(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of an optimizer's parameters, by group, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
