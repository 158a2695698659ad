"""The distribution of a run over its processes, and what each holds of weights and states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ....errors import RecipeError
from ...recipe.deepspeed_config import stage
from ...recipe.recipe import Recipe
from ...recipe.strategy import Strategy
from .tensors import FSDPUnit, Weight

Engine = Literal["one process", "DDP", "FSDP2", "HSDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]

_PERSISTENT = 100_000
"""Numbers up to which ZeRO-3 leaves a parameter whole on every process (DeepSpeed's default)."""


@dataclass(frozen=True)
class ProcessLayout:
    """The distribution of a run over its processes.

    Attributes:
        engine: what shares the work.
        shard: the number of processes that share one copy of the weights.
        replicate: the number of such copies.
        tensor: the number of processes that share each layer.
        context: the number of processes that share each sequence.
        reshards: whether gathered weights are freed after forward.
        weights_on_host: whether shards, gradients and states are in the memory of the host.
        states_on_host: whether the optimizer's states are.
        persistent: the largest size in numbers that ZeRO-3 leaves whole.
    """

    engine: Engine
    world: int = 1
    shard: int = 1
    replicate: int = 1
    tensor: int = 1
    context: int = 1
    reshards: bool = True
    weights_on_host: bool = False
    states_on_host: bool = False
    persistent: int = _PERSISTENT

    @property
    def data_ranks(self) -> int:
        """The number of processes, or groups of them, that train different batches."""
        return self.world // (self.tensor * self.context)

    @property
    def shards_weights(self) -> bool:
        """Whether no process has all weights."""
        return self.engine in ("FSDP2", "HSDP", "ZeRO-3") and self.shard > 1


def layout_of(recipe: Recipe, world: int) -> ProcessLayout:
    """The layout of a recipe's run; raises a RecipeError if it needs another ``world``."""
    strategy = recipe.strategy()
    strategy.require_world(world)
    if strategy.engine == "deepspeed":
        return _zero(strategy, world)
    tensor, context = strategy.tensor, strategy.context
    if strategy.engine == "ddp" or strategy.fsdp is None:
        engine: Engine = "DDP" if world > 1 else "one process"
        copies = world // strategy.group
        return ProcessLayout(engine, world, replicate=copies, tensor=tensor, context=context)
    shard = strategy.shard or world // (strategy.replicate * strategy.group)
    return ProcessLayout(
        "HSDP" if strategy.replicate > 1 else "FSDP2",
        world,
        shard,
        strategy.replicate,
        tensor,
        context,
        reshards=strategy.fsdp.reshard_after_forward,
        weights_on_host=strategy.fsdp.offload_params,
        states_on_host=strategy.fsdp.offload_params,
    )


def _zero(strategy: Strategy, world: int) -> ProcessLayout:
    zero: Any = (strategy.deepspeed or {}).get("zero_optimization", {})
    number = stage(strategy.deepspeed or {})
    if number not in (1, 2, 3):
        raise RecipeError("deepspeed: plan knows stages 1, 2 and 3 of ZeRO")
    names: dict[int, Engine] = {1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}

    def offloads(key: str) -> bool:
        return str((zero.get(key) or {}).get("device", "none")) != "none"

    persistent = zero.get("stage3_param_persistence_threshold", _PERSISTENT)
    return ProcessLayout(
        names[number], world, shard=world if number == 3 else 1,
        weights_on_host=offloads("offload_param"), states_on_host=offloads("offload_optimizer"),
        persistent=_PERSISTENT if persistent == "auto" else int(persistent),
    )  # fmt: skip


@dataclass(frozen=True)
class ModelStates:
    """Bytes that one process holds from step to step; on the device, or on the host.

    Attributes:
        weights: of its weights.
        gradients: of its gradients, once they are all there.
        optimizer: of the optimizer's states, and of copies of the weights in 32 bits.
        persistent_gradients: those of the gradients' bytes that stay between steps.
        buffers: of the engine's buffers for communication.
        host: of all of these that are in the memory of the host.
    """

    weights: int
    gradients: int
    optimizer: int
    persistent_gradients: int = 0
    buffers: int = 0
    host: int = 0

    @property
    def between_steps(self) -> int:
        """Bytes of tensors between two steps, wherever they are."""
        return self.weights + self.optimizer + self.persistent_gradients + self.buffers


def model_states(
    units: Sequence[FSDPUnit], layout: ProcessLayout, optimizer: str, passes: int = 1
) -> ModelStates:
    """The bytes that the first process holds.

    ``passes`` are the forward passes per optimizer step: FSDP2 adds whole gradients up where there
    are several, and reduces them in the last one.
    """
    total = ModelStates(0, 0, 0)
    for unit in units:
        for w in unit.weights:
            one = _states_of(w, layout, optimizer)
            if passes > 1 and w.trains and layout.shards_weights and layout.engine != "ZeRO-3":
                one = replace(one, gradients=one.gradients + w.numbers * w.itemsize)
            total = ModelStates(*(
                a + unit.times * b for a, b in zip(_numbers(total), _numbers(one), strict=True)
            ))  # fmt: skip
    return _moved(total, layout)


def _numbers(h: ModelStates) -> tuple[int, ...]:
    return h.weights, h.gradients, h.optimizer, h.persistent_gradients, h.buffers, h.host


def _states_of(w: Weight, layout: ProcessLayout, optimizer: str) -> ModelStates:
    """Of one parameter, before anything is moved to the host."""
    part = 1 / layout.tensor if w.is_matrix else 1.0
    if layout.engine.startswith("ZeRO"):
        return _states_with_zero(w, layout, optimizer)
    if layout.engine in ("FSDP2", "HSDP"):
        part *= w.shard(layout.shard)
    gradient = round(w.numbers * w.itemsize * part) if w.trains else 0
    state = state_bytes(optimizer, w, part) if w.trains else 0
    buckets = gradient if layout.engine == "DDP" else 0
    return ModelStates(round(w.bytes * part) + w.scales, gradient, state, buffers=buckets)


def _states_with_zero(w: Weight, layout: ProcessLayout, optimizer: str) -> ModelStates:
    """DeepSpeed divides numbers, not rows; it trains a copy in 32 bits, whatever the dtype."""
    part = math.ceil(w.numbers / layout.world) / max(w.numbers, 1)
    if layout.engine != "ZeRO-3":
        weights = float(w.bytes)
    else:
        weights = w.bytes * part + (w.bytes if w.numbers <= layout.persistent else 0)
    weights += w.scales
    if not w.trains:
        return ModelStates(round(weights), 0, 0)
    wide = replace(w, itemsize=4)
    master = 4 * w.numbers * part
    states = round(w.numbers * 4 * part)
    whole = w.numbers * w.itemsize if layout.engine == "ZeRO-1" else 0
    return ModelStates(
        round(weights), states + whole, round(master) + state_bytes(optimizer, wide, part),
        persistent_gradients=states,
    )  # fmt: skip


def _moved(total: ModelStates, layout: ProcessLayout) -> ModelStates:
    """The same, with the bytes that the layout keeps on the host counted there."""
    host = 0
    if layout.weights_on_host:
        host += total.weights + total.gradients
    if layout.states_on_host:
        host += total.optimizer
        if layout.engine.startswith("ZeRO") and not layout.weights_on_host:
            host += total.gradients
    return replace(total, host=host)


# How many bytes an optimizer keeps for a parameter.


_ONE = ("lion", "rmsprop", "adagrad")
_NONE = ("sgd", "lomo", "adalomo")

_SMALL = 4096
"""Numbers below which bitsandbytes keeps states in 32 bits."""


def state_bytes(optimizer: str, weight: Weight, part: float = 1.0) -> int:
    """The bytes of the optimizer's states for (a part of) one parameter.

    Two moments for AdamW and its kin, one for Lion, RMSprop and Adagrad, sums of rows and columns
    for Adafactor (Shazeer & Stern 2018), none for SGD. Those of PyTorch and transformers have the
    dtype of the parameter, those of bitsandbytes 32 or 8 bits. GaLore and APOLLO are taken for
    AdamW: what their projections save is left out. ``part`` is the fraction of the parameter that
    the process has.
    """
    numbers = weight.numbers * part
    if optimizer.startswith(_NONE):
        return 0
    if "adafactor" in optimizer or optimizer == "came_pytorch":
        columns = weight.numbers // max(weight.rows, 1)
        sums = 4 * (weight.rows * part + columns if weight.is_matrix else numbers)
        # CAME has a moment, and two of these
        return round(sums if "adafactor" in optimizer else 2 * sums + 4 * numbers)
    size: float = weight.itemsize
    if "8bit" in optimizer:
        size = 4.0 if weight.numbers < _SMALL else 1.0 + 4 / 256  # and a scale for each block
    elif "4bit" in optimizer:
        size = 4.0 if weight.numbers < _SMALL else 0.5 + 4 / 128
    elif "32bit" in optimizer or optimizer.endswith("bnb"):
        size = 4.0
    return round(_states(optimizer) * size * numbers)


def _states(optimizer: str) -> int:
    if "ademamix" in optimizer:
        return 3
    if optimizer.startswith(_ONE) or optimizer.startswith("paged_lion"):
        return 1
    return 2
