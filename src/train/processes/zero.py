"""Weights and optimizer states in parts of DeepSpeed's ZeRO, as one process has them.

DeepSpeed's own checkpoints can be read by as many processes as have written them. These go tensor
by tensor through its interface for debugging (``deepspeed.utils.safe_get_full_…``), and have the
form of every other checkpoint. Where weights have 16 bits, the state of each parameter also has its
``master`` in 32 bits, which DeepSpeed trains.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import RecipeError
from ...optim import blockwise
from ...sharding import in_zero3, whole_shape
from .gather import Groups

MASTER = "master"


def require_one_dtype(model: nn.Module, arguments: Any) -> None:
    """Raise RecipeError unless all trained weights have one dtype: ZeRO puts them into one buffer.

    Before DeepSpeed has the model. Where DeepSpeed has a dtype of 16 bits, it casts all weights.
    """
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None or config.dtype() is not torch.float32:
        return
    names = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(names) > 1:
        several = " and ".join(
            f"{str(dtype).removeprefix('torch.')} ({name})" for dtype, name in names.items()
        )
        raise RecipeError(
            f"deepspeed: trains weights of one dtype, but these have {several}: set "
            "peft_autocast_adapter_dtype: false, so that adapters have the dtype of the other "
            "weights, or train with FSDP"
        )


def whole_weights(model: nn.Module, trained_only: bool, keep: bool) -> dict[str, Tensor]:
    """The weights of a model in ZeRO-3, by name; a collective.

    ``model`` is the module inside the engine. Empty where this process does not ``keep`` them, on
    the CPU.
    """
    from deepspeed import zero

    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained_only and not parameter.requires_grad:
            continue
        with zero.GatheredParameters([parameter]):
            if keep:
                weights[name] = parameter.detach().to("cpu", copy=True)
    if keep and not trained_only:
        weights |= {name: buffer.detach().cpu() for name, buffer in _buffers(model)}
    return weights


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole weights into a model in ZeRO-3; a collective. The optimizer's copies stay.

    ``model`` is the module inside the engine. ``state`` is the same on every process; weights
    without an entry stay as they are.
    """
    from deepspeed import zero

    for name, parameter in model.named_parameters():
        if name in state:
            with zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
                if dist.get_rank() == 0:
                    parameter.copy_(state[name])


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a state dict has."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def whole_optimizer(engine: Any, groups: Groups, keep: bool) -> dict[str, Any] | None:
    """The state of the engine's optimizer, as ``state_dict`` has it for one process; a collective.

    ``groups`` are the names of its parameters, before DeepSpeed took it over. None where this
    process does not ``keep`` the state, on the CPU.
    """
    base = _base(engine)
    if not blockwise.of_bitsandbytes(base):
        return _whole_optimizer(engine, groups, keep)
    packed = blockwise.unpack(base)
    try:
        state = _whole_optimizer(engine, groups, keep)
    finally:
        base.state.update(packed)
    return state if state is None else blockwise.stored(state)


def _whole_optimizer(engine: Any, groups: Groups, keep: bool) -> dict[str, Any] | None:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    parameters = dict(engine.module.named_parameters())
    base = _base(engine)
    _link_state(engine)
    first: dict[str, Any] = next(iter(base.state.values()), {})
    whole = [key for key, value in first.items() if _is_whole(value)]
    rest = {key: value for key, value in first.items() if key not in whole}
    state: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(name for names in groups for name in names):
        parameter = parameters[name]
        values = {key: safe_get_full_optimizer_state(parameter, key) for key in whole}
        if parameter.dtype != torch.float32:
            values[MASTER] = safe_get_full_fp32_param(parameter)
        if keep:
            shape = whole_shape(parameter)
            full = {k: v.detach().to("cpu", copy=True).view(shape) for k, v in values.items()}
            state[number] = {**full, **copy.deepcopy(rest)}  # counted by each parameter alone
    if not keep:
        return None
    return {"state": state, "param_groups": _numbered(base.param_groups, groups)}


def _numbered(stored: list[dict[str, Any]], groups: Groups) -> list[dict[str, Any]]:
    """The groups with the numbers of their parameters; DeepSpeed has left out those without any."""
    remaining, result, first = iter(stored), [], 0
    for names in groups:
        group = next(remaining) if names else stored[0]
        numbers = list(range(first, first + len(names)))
        result.append({**{k: v for k, v in group.items() if k != "params"}, "params": numbers})
        first += len(names)
    return result


def load_optimizer(engine: Any, state: dict[str, Any], groups: Groups) -> None:
    """Load the state of an optimizer over whole parameters into the engine's.

    ``state`` is a ``state_dict``, the same on every process; ``groups`` are the parameters' names.
    """
    base = _base(engine)
    in_blocks = blockwise.of_bitsandbytes(base)
    if in_blocks:
        state = blockwise.with_scales(state)
    parameters = dict(engine.module.named_parameters())
    names = [name for members in groups for name in members]
    # those of a parameter with one element look like counts
    whole = {k for values in state["state"].values() for k, v in values.items() if _is_whole(v)}
    _begin_state(engine, next(iter(state["state"].values()), {}), whole)
    for number, name in enumerate(names):
        parameter = parameters[name]
        for key, value in state["state"].get(number, {}).items():
            if key == MASTER and parameter.dtype != torch.float32:
                _set(parameter, value, None)
            elif key != MASTER and key in whole:
                _set(parameter, value, key)
    if in_blocks:
        blockwise.repack(base)
    filled = [group for group in state["param_groups"] if group["params"]]
    for group, saved in zip(base.param_groups, filled, strict=True):
        group.update({key: value for key, value in saved.items() if key != "params"})


def whole_schedule(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The state of a schedule, whose lists have an entry per group, empty ones included."""
    filled = sum(map(bool, groups))

    def whole(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != filled:
            return value
        entries = iter(value)
        return [next(entries) if names else value[0] for names in groups]

    return {key: whole(value) for key, value in state.items()}


def schedule_of_groups(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """The opposite of ``whole_schedule``: without the entries of empty groups."""

    def without_empty(value: Any) -> Any:
        if not isinstance(value, list) or len(value) != len(groups):
            return value
        return [entry for entry, names in zip(value, groups, strict=True) if names]

    return {key: without_empty(value) for key, value in state.items()}


def drop_masters(state: Mapping[Any, dict[str, Any]]) -> None:
    """Take the masters out of the states of parameters, for an optimizer that has none.

    It would keep them as they are, and its checkpoints would give DeepSpeed back old weights.
    """
    for values in state.values():
        values.pop(MASTER, None)


def _begin_state(engine: Any, example: dict[str, Any], whole: Collection[str]) -> None:
    """Make what the optimizer makes in its first step, with the counts of ``example``."""
    # ``example`` is the state of a parameter; values in ``whole`` have a number for each element
    optimizer, base = engine.optimizer, _base(engine)
    for flat in next(getattr(optimizer, name) for name in _MASTERS if hasattr(optimizer, name)):
        values = base.state[flat]
        for key, value in example.items():
            if key == MASTER:
                continue
            if key in whole:
                values.setdefault(key, torch.zeros_like(flat))
            else:
                values[key] = value.clone() if torch.is_tensor(value) else value
    _link_state(engine)


def _link_state(engine: Any) -> None:
    """Let parameters find their state; DeepSpeed does that when the first group has some."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


_MASTERS = (
    "fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition",
)  # fmt: skip
"""The names of the stepped weights in the kinds of ZeRO."""


def _set(parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    """Set a parameter's state (None: its master) to the part of ``value`` in this process."""
    from deepspeed import utils

    value = value.float().to(parameter.device)
    if not in_zero3(parameter):  # ZeRO-1 and 2
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    args = () if key is None else (key,)
    get = utils.safe_get_local_fp32_param if key is None else utils.safe_get_local_optimizer_state
    put = utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state
    size = get(parameter, *args).numel()
    shards: Any = parameter
    first = size * dist.get_rank(shards.ds_process_group)
    part = value.flatten()[first : first + size]
    put(parameter, nn.functional.pad(part, (0, size - part.numel())), *args)


def _is_whole(value: Any) -> bool:
    """Whether a value of the state has an element for each of the parameter."""
    return torch.is_tensor(value) and value.numel() > 1


def _base(engine: Any) -> Any:
    """The optimizer that ZeRO steps."""
    return engine.optimizer.optimizer
