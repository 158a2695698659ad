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

    The first shares all layers with the original. What saving changes for a moment, or training
    does, is its own: the configuration, and which adapter is active. The frozen weights under an
    adapter are not copied, as they stay what they are; all others are, also if they are frozen now.
    """
    adapters = hasattr(model, "peft_config")
    copies: dict[int, Tensor] = {}  # tied weights are one in the copy, too
    state: dict[str, Any] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        state[name] = value
        if isinstance(value, Tensor) and (value.requires_grad or not adapters):
            if id(value) not in copies:
                copies[id(value)] = to_host(value)
            state[name] = copies[id(value)]
    shadow = copy.copy(model)
    if adapters:
        tuner = copy.copy(model.base_model)
        tuner.peft_config = copy.deepcopy(model.peft_config)
        shadow._modules = {**model._modules, "base_model": tuner}
    else:
        shadow.config = copy.deepcopy(model.config)
    return shadow, state


def to_host(value: Any) -> Any:
    """A copy of tensors, in dicts, lists and tuples or alone, in host memory."""
    if isinstance(value, Tensor):
        return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_host(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([to_host(entry) for entry in value])
    return copy.deepcopy(value)


def why_no_room(model: Any, optimizer: Any) -> str | None:
    """Why host memory has no room for a copy of both beside a step; None: it has, or is unknown."""
    adapters = hasattr(model, "peft_config")
    tensors = [p for p in model.parameters() if p.requires_grad or not adapters]
    for entry in optimizer.state_dict()["state"].values():
        tensors += [value for value in entry.values() if isinstance(value, Tensor)]
    copied = sum(tensor.nbytes for tensor in tensors)
    meter = Meter(torch.device("cpu"))
    step = (process_status("VmHWM") or 0) - meter.used()
    free = meter.host()
    if not free or copied + step <= free:
        return None
    return f"a copy takes {gigabytes(copied)}, and {gigabytes(max(free - step, 0))} are free"
