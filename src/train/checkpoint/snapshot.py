"""Copies of what is trained, in host memory: they are written while the original trains on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ...memory.budget import gigabytes
from ...memory.meter import Meter, process_status


def snapshot(model: Any) -> tuple[Any, dict[str, Any]]:
    """A model for ``save`` to write in another thread, and its weights by name.

    The first shares all modules with the original, but has a configuration to itself: saving
    changes that for a moment. The frozen weights under an adapter are not copied, as they stay what
    they are; all others are, also where they are frozen now.
    """
    adapters = hasattr(model, "peft_config")
    copies: dict[int, Tensor] = {}  # tied weights are one in the copy, too
    state: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and (value.requires_grad or not adapters):
            if id(value) not in copies:
                copies[id(value)] = to_host(value)
            state[name] = copies[id(value)]
        else:
            state[name] = value
    if not adapters:
        config = copy.deepcopy(model.config)
        model = copy.copy(model)
        model.config = config
    return model, state


def to_host(value: Any) -> Any:
    """A copy of tensors, in dicts, lists and tuples or alone, in host memory."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_host(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(to_host, value))
    return copy.deepcopy(value)


def why_no_room(model: Any, optimizer: Any) -> str | None:
    """Why host memory has no room for a copy of both beside a step; None: it has, or is unknown."""
    adapters = hasattr(model, "peft_config")
    tensors = [p for p in model.parameters() if p.requires_grad or not adapters]
    for entry in optimizer.state.values():
        tensors += [value for value in entry.values() if isinstance(value, Tensor)]
    copied = sum(tensor.nbytes for tensor in tensors)
    meter = Meter(torch.device("cpu"))
    step = (process_status("VmHWM") or 0) - meter.used()
    free = meter.host()
    if not free or copied + step <= free:
        return None
    return f"a copy takes {gigabytes(copied)}, and {gigabytes(max(free - step, 0))} are free"
