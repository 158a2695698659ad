"""Weights and optimizer states that DeepSpeed's ZeRO has in parts, as one process has them.

DeepSpeed's own checkpoints can be read by as many processes as have written them. These go tensor
by tensor through its interface for debugging (``deepspeed.utils.safe_get_full_…``), and have the
form of every other checkpoint. Where weights have 16 bits, the state of each parameter also has its
``master`` of 32 bits, which DeepSpeed trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .gather import Groups

MASTER = "master"


def whole_weights(model: nn.Module, trained_only: bool, keep: bool) -> dict[str, Tensor]:
    """The weights of a model in ZeRO-3, by their names; a collective.

    Args:
        model: the module inside the engine.
        trained_only: leave out those that are frozen.
        keep: whether this process keeps them (on the CPU); if not, the result is empty.
    """
    from deepspeed import zero

    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained_only and not parameter.requires_grad:
            continue
        with zero.GatheredParameters([parameter]):
            if keep:
                found[name] = parameter.detach().to("cpu", copy=True)
    if keep and not trained_only:
        found |= {name: buffer.detach().cpu() for name, buffer in _buffers(model)}
    return found


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def whole_optimizer(engine: Any, groups: Groups, keep: bool) -> dict[str, Any] | None:
    """The state of the engine's optimizer, as ``state_dict`` has it for one process; a collective.

    Args:
        engine: DeepSpeed's.
        groups: the names of the optimizer's parameters, before DeepSpeed took it over.
        keep: whether this process keeps it (on the CPU).

    Returns:
        The state; None where it is not kept.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameters = dict(engine.module.named_parameters())
    base = _base(engine)
    own = next(iter(base.state.values()), {})
    whole = [key for key, value in own.items() if torch.is_tensor(value) and value.numel() > 1]
    rest = {key: value for key, value in own.items() if key not in whole}
    state: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(name for names in groups for name in names):
        parameter = parameters[name]
        values = {key: safe_get_full_optimizer_state(parameter, key) for key in whole}
        if parameter.dtype != torch.float32:
            values[MASTER] = safe_get_full_fp32_param(parameter)
        if keep:
            shape = _shape(parameter)
            full = {k: v.detach().to("cpu", copy=True).view(shape) for k, v in values.items()}
            state[number] = {**full, **rest}
    if not keep:
        return None
    first, numbered = 0, []
    for group, names in zip(base.param_groups, groups, strict=False):
        given = {key: value for key, value in group.items() if key != "params"}
        numbered.append({**given, "params": list(range(first, first + len(names)))})
        first += len(names)
    return {"state": state, "param_groups": numbered}


def load_optimizer(engine: Any, state: dict[str, Any], groups: Groups) -> None:
    """Give the engine's optimizer the state of one over whole parameters.

    Args:
        engine: DeepSpeed's.
        state: a ``state_dict``, the same on every process.
        groups: the names of the parameters.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameters = dict(engine.module.named_parameters())
    base = _base(engine)
    device = engine.device
    rest: dict[str, Any] = {}
    for number, name in enumerate(name for names in groups for name in names):
        parameter = parameters[name]
        for key, value in state["state"].get(number, {}).items():
            if key == MASTER:
                if parameter.dtype != torch.float32:
                    safe_set_full_fp32_param(parameter, value.to(device))
            elif torch.is_tensor(value) and value.numel() > 1:
                safe_set_full_optimizer_state(parameter, value.float().to(device), key)
            else:
                rest[key] = value
    for values in base.state.values():
        for key, value in rest.items():
            values[key] = value.clone() if torch.is_tensor(value) else value
    for group, kept in zip(base.param_groups, state["param_groups"], strict=False):
        group.update({key: value for key, value in kept.items() if key != "params"})


def _base(engine: Any) -> Any:
    """The optimizer that ZeRO steps."""
    return engine.optimizer.optimizer


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
