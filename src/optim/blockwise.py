"""bitsandbytes' optimizers where processes share parameters.

Their 8-bit states are codes, and a scale for every 256 of them. A process that has a share of a
parameter has the blocks of its share. In *elementwise* form each scale is repeated for all numbers
of its block, so that states are gathered, written and shared out like any tensor of the parameter's
shape. Back in the same shares, they are the same bit by bit; in others, they are quantized again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sharding import is_dtensor, local_share
from .buckets import BLOCK

NOT_QUANTIZED = -1.0
"""In place of a scale: the numbers are values, not codes."""

_WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes' ``state_dict`` has the tensors of a parameter's state."""

State = dict[str, Any]


def of_bitsandbytes(optimizer: Any) -> bool:
    """Whether an optimizer, or the one that a ``FlatOptimizer`` wraps, is one of bitsandbytes'."""
    kind = type(getattr(optimizer, "base", optimizer))
    return kind.__module__.partition(".")[0] == "bitsandbytes"


# --- the elementwise form -------------------------------------------------------------------------


def elementwise(state: Mapping[str, Any], shape: torch.Size) -> State:
    """The state of a parameter, or of a share of it, of this shape."""
    values: State = {"step": state["step"]}
    for number in _numbers(state):
        stored, scales = state[f"state{number}"], state.get(f"absmax{number}")
        for i, row in enumerate(_rows(stored, shape)):
            values[f"state{number}.{i}"] = row
            if scales is not None:
                each = scales.view(-1, _blocks(row))[i].repeat_interleave(BLOCK)
                values[f"scale{number}.{i}"] = each[: row.numel()].view(shape)
    return values


def values_of(state: Mapping[str, Any], shape: torch.Size) -> State:
    """The state of a parameter in elementwise form, as numbers and not as codes."""
    values = elementwise(state, shape)
    result: State = {}
    for name, value in values.items():
        if name.startswith("state"):
            kind, _, row = name.removeprefix("state").partition(".")
            scale = values.get(f"scale{kind}.{row}")
            value = _values(value, scale, state[f"qmap{kind}"]) if scale is not None else value
        if not name.startswith("scale"):
            result[name] = value
    return result


def restore(state: State, values: Mapping[str, Any], qmaps: Mapping[str, Tensor]) -> None:
    """Set a state that an optimizer has begun to ``values``, which are elementwise."""
    state["step"] = int(values["step"])
    for number in _numbers(state):
        stored, scales = state[f"state{number}"], state.get(f"absmax{number}")
        qmap = qmaps[_QMAPS[number]] if scales is not None else _qmap(number)
        for i in range(_count(values, number)):
            row = stored[i] if _count(values, number) > 1 else stored
            numbers = values[f"state{number}.{i}"].to(row.device)
            scale = values.get(f"scale{number}.{i}")
            scale = scale.to(row.device) if scale is not None else None
            if scales is None:
                row.copy_(_values(numbers, scale, qmap.to(row.device)).view_as(row))
                continue
            codes, largest = _quantized(numbers, scale, qmap.to(row.device))
            row.copy_(codes.view_as(row))
            scales.view(-1, _blocks(row))[i].copy_(largest)


def _numbers(state: Mapping[str, Any]) -> list[str]:
    return [number for number in _QMAPS if f"state{number}" in state]


_QMAPS = {"1": "dynamic", "2": "udynamic"}
"""The states of a parameter by number, and which codes they have in 8 bits."""


def _count(values: Mapping[str, Any], number: str) -> int:
    return sum(name.startswith(f"state{number}.") for name in values)


def _rows(stored: Tensor, shape: torch.Size) -> Tensor:
    """The tensors of a parameter's shape in a state, of which AdEMAMix's first has two."""
    return stored if stored.ndim > len(shape) else stored[None]


def _blocks(tensor: Tensor) -> int:
    return -(-tensor.numel() // BLOCK)


def _qmap(number: str) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    make: Any = create_dynamic_map  # which is not typed
    qmap: Tensor = make(signed=number == "1")
    return qmap


def _values(numbers: Tensor, scale: Tensor | None, qmap: Tensor) -> Tensor:
    if scale is None or not _is_quantized(scale):
        return numbers.float()
    return qmap[numbers.long()] * scale


def _is_quantized(scale: Tensor) -> bool:
    return not bool((scale == NOT_QUANTIZED).any())


def _quantized(numbers: Tensor, scale: Tensor | None, qmap: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each block."""
    from bitsandbytes.functional import quantize_blockwise

    if scale is not None and _is_quantized(scale):
        largest = _by_block(scale)
        if largest is not None:
            # nothing is in the padding of a share, whose scale is 0
            codes = torch.where(scale == 0, qmap.abs().argmin(), numbers)
            return codes.to(torch.uint8), largest
    if not numbers.numel():
        return numbers.to(torch.uint8), numbers.new_zeros(0, dtype=torch.float32)
    values = _values(numbers, scale, qmap).contiguous()
    codes, state = quantize_blockwise(values, code=qmap, blocksize=BLOCK)
    return codes, state.absmax


def _by_block(scale: Tensor) -> Tensor | None:
    """One scale for each block; None: the blocks were others."""
    blocks = F.pad(scale.flatten(), (0, -scale.numel() % BLOCK)).view(-1, BLOCK)
    if not len(blocks):
        return blocks.new_zeros(0)
    largest = blocks.amax(1)
    return largest if bool(((blocks == largest[:, None]) | (blocks == 0)).all()) else None


# --- the form of files, which is bitsandbytes' own wherever its blocks are ------------------------


def stored(state: State, requantize: bool = False) -> State:
    """A ``state_dict`` over whole parameters as bitsandbytes has it.

    Where blocks are not those of the whole parameter, its state stays elementwise, with each scale
    once for a run of numbers that have it; or it is quantized again, if ``requantize``.
    """
    entries = {n: _stored(_decoded(entry), requantize) for n, entry in state["state"].items()}
    return {**state, "state": entries}


def expanded(state: State) -> State:
    """A ``state_dict`` over whole parameters, of either form, as an elementwise one."""
    return {**state, "state": {n: _decoded(entry) for n, entry in state["state"].items()}}


def _stored(entry: State, requantize: bool) -> State:
    counts = {number: _count(entry, number) for number in _QMAPS}
    if not counts["1"]:  # of another optimizer
        return entry
    wrapped: State = {}
    for number, count in counts.items():
        if not count:
            continue
        rows = [entry[f"state{number}.{i}"] for i in range(count)]
        scales = [_scale(entry, number, i) for i in range(count)]
        if scales[0] is None:
            wrapped[f"state{number}"] = _joined([row.float() for row in rows])
            continue
        qmap = _qmap(number)
        cut = any(scale is not None and _by_block(scale) is None for scale in scales)
        if cut and not requantize:
            return _encoded(entry)
        pairs = [_quantized(row, scale, qmap) for row, scale in zip(rows, scales, strict=True)]
        wrapped[f"state{number}"] = _joined([codes.view_as(rows[0]) for codes, _ in pairs])
        wrapped[f"absmax{number}"] = _joined([largest for _, largest in pairs])
        wrapped[f"qmap{number}"] = qmap
    return {"step": entry["step"], **_others(entry), _WRAPPED: wrapped}


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if len(rows) > 1 else rows[0]


def _scale(entry: State, number: str, i: int) -> Tensor | None:
    scale: Tensor | None = entry.get(f"scale{number}.{i}")
    return scale if scale is not None and _is_quantized(scale) else None


def _others(entry: State) -> State:
    names = ("step", "state", "scale")
    return {name: value for name, value in entry.items() if not name.startswith(names)}


def _encoded(entry: State) -> State:
    result: State = {}
    for name, value in entry.items():
        if name.startswith("scale"):
            values, counts = torch.unique_consecutive(value.flatten(), return_counts=True)
            value = {"values": values, "counts": counts}
        elif name.startswith("state"):
            value = value.to(torch.uint8)
        result[name] = value
    return result


def _decoded(entry: State) -> State:
    """A parameter's state as elementwise."""
    if _WRAPPED in entry:
        inner = entry[_WRAPPED]
        rest = {name: value for name, value in entry.items() if name != _WRAPPED}
        second = inner.get("state2")
        first = inner["state1"]
        # AdEMAMix's first state has two rows of the second's shape
        shape = first.shape if second is None else second.shape
        return {**rest, **elementwise({**inner, "step": entry["step"]}, shape)}
    result = dict(entry)
    for name, value in entry.items():
        if name.startswith("scale") and isinstance(value, dict):
            numbers = entry[f"state{name.removeprefix('scale')}"]
            result[name] = value["values"].repeat_interleave(value["counts"]).view_as(numbers)
    return result


# --- over the parameters that DeepSpeed makes of all ----------------------------------------------


def unpack(optimizer: Any) -> dict[Any, State]:
    """Replace states by their elementwise form in 32 bits; return what they were, for ``repack``.

    All have scales, because states of 32 bits are among them.
    """
    packed = dict(optimizer.state)
    for parameter, state in packed.items():
        values = elementwise(state, parameter.shape)
        for name in [name for name in values if name.startswith("state")]:
            values[name] = values[name].float()
            scale = f"scale{name.removeprefix('state')}"
            values.setdefault(scale, torch.full_like(values[name], NOT_QUANTIZED))
        optimizer.state[parameter] = values
    return packed


def repack(optimizer: Any) -> None:
    """The opposite of ``unpack``, for states that have been loaded.

    ZeRO-3 gives the optimizer its groups for the time of a step only, so that nothing is asked of
    them. Whether a state has 8 bits depends on the size alone: settings of single parameters are
    not those of DeepSpeed's.
    """
    for parameter, values in list(optimizer.state.items()):
        options = optimizer.args
        in_8_bits = options.optim_bits == 8 and parameter.numel() >= options.min_8bit_size
        state: State = {"step": 0}
        for number in (n for n in _QMAPS if _count(values, n)):
            count = _count(values, number)
            buffer = (
                optimizer.get_state_buffer if count == 1 else optimizer._get_state_double_buffer
            )
            dtype = torch.uint8 if in_8_bits else torch.float32
            state[f"state{number}"] = buffer(parameter, dtype=dtype)
            if in_8_bits:
                shape = (_blocks(parameter),) if count == 1 else (count, _blocks(parameter))
                state[f"absmax{number}"] = torch.zeros(shape, device=parameter.device)
                if not optimizer.name2qmap:
                    optimizer.fill_qmap()
                qmap = optimizer.name2qmap[_QMAPS[number]].to(parameter.device)
                state[f"qmap{number}"] = qmap
        restore(state, values, optimizer.name2qmap)
        optimizer.state[parameter] = state


def with_scales(state: State) -> State:
    """An elementwise ``state_dict`` all of whose numbers have scales, as those of ``unpack``."""
    entries = {}
    for number, entry in state["state"].items():
        entries[number] = values = dict(entry)
        for name in [name for name in values if name.startswith("state")]:
            scale = f"scale{name.removeprefix('state')}"
            values[name] = values[name].float()
            values.setdefault(scale, torch.full_like(values[name], NOT_QUANTIZED))
    return {**state, "state": entries}


def _places(optimizer: Any) -> Iterator[tuple[Any, tuple[Any, int, int]]]:
    for i, group in enumerate(optimizer.param_groups):
        for j, parameter in enumerate(group["params"]):
            yield parameter, (group, i, j)


def _begin(optimizer: Any, parameter: Any, group: Any, place: Any) -> None:
    if not optimizer.initialized:  # as its first step does
        optimizer.check_overrides()
        optimizer.initialized = True
    optimizer.init_state(group, parameter, *place)


# --- over the shares of FSDP2 ---------------------------------------------------------------------


if TYPE_CHECKING:

    class _Mixin(torch.optim.Optimizer):
        name2qmap: dict[str, Tensor]

        def get_config(self, gindex: int, pindex: int, group: Any) -> State: ...
        def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None: ...
        def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None: ...

else:  # before one of bitsandbytes' classes
    _Mixin = object


def over_shards(optimizer: Any) -> Any:
    """Let an optimizer of bitsandbytes step the shares of parameters; returns the same object.

    Whether the state of a parameter has 8 bits is decided by the whole parameter, so that all
    processes agree. ``state_dict`` is elementwise, and ``load_state_dict`` takes that form, with
    whole tensors or shares.
    """
    kind = type(optimizer)
    name, home = kind.__name__, kind.__module__
    optimizer.__class__ = type(name, (_OverShards, kind), {"__module__": home})
    return optimizer


class _OverShards(_Mixin):
    def get_config(self, gindex: int, pindex: int, group: Any) -> State:
        config: State = super().get_config(gindex, pindex, group)
        in_8_bits = group["params"][pindex].numel() >= config["min_8bit_size"]
        return {**config, "min_8bit_size": 0 if in_8_bits else sys.maxsize}

    def init_state(self, group: Any, p: Tensor, gindex: int, pindex: int) -> None:
        share = local_share(p)
        super().init_state(group, share, gindex, pindex)
        self.state[p] = self.state.pop(share)

    def update_step(self, group: Any, p: Any, gindex: int, pindex: int) -> None:
        share = local_share(p)
        if not share.numel():  # fewer rows than processes
            self.state[p]["step"] += 1
            return
        share.grad = local_share(p.grad)
        self.state[share] = self.state[p]
        try:
            super().update_step(group, share, gindex, pindex)
        finally:
            del self.state[share]

    def state_dict(self) -> State:
        packed: State = torch.optim.Optimizer.state_dict(self)
        parameters = [parameter for parameter, _ in _places(self)]
        for number, state in packed["state"].items():
            parameter = parameters[number]
            values = elementwise(state, local_share(parameter).shape)
            packed["state"][number] = {k: _shared(v, parameter) for k, v in values.items()}
        return packed

    def load_state_dict(self, state_dict: State) -> None:
        for number, (parameter, (group, *place)) in enumerate(_places(self)):
            values = state_dict["state"].get(number)
            self.state.pop(parameter, None)
            if values:
                _begin(self, parameter, group, place)
                shares = {name: _share(value, parameter) for name, value in values.items()}
                restore(self.state[parameter], shares, self.name2qmap)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def _shared(value: Any, parameter: Any) -> Any:
    """What this process has of a tensor, as a share of one with the parameter's shape."""
    if not isinstance(value, Tensor) or not is_dtensor(parameter):
        return value
    from torch.distributed.tensor import DTensor

    place = parameter.device_mesh, parameter.placements
    whole = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(value, *place, run_check=False, **whole)


def _share(value: Any, parameter: Any) -> Any:
    """The opposite, also of a whole tensor, which is the same on every process."""
    if not isinstance(value, Tensor):
        return value
    if is_dtensor(parameter) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        place = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), *place, src_data_rank=None)
    return local_share(value)
