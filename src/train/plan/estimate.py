"""The memory of one process, by what it is for, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...kernels.loss.head_tiles import most_logits
from ...memory.budget import Budget
from ...memory.choice import PlanInputs, Scaled, Usages, choose, on_host
from ...memory.levels import Level, allowed
from ...memory.usage import Usage
from .count.blueprint import Blueprint
from .count.layout import ModelStates, ProcessLayout, model_states
from .count.step import Step
from .count.tensors import FSDPUnit, fsdp_units

MIB = 2**20

SPARE = 0.9
"""The part of a device's memory that a plan may take."""


_MAX_LIVE = 1e9
"""Numbers of gathered weights that ZeRO-3 keeps (DeepSpeed's ``stage3_max_live_parameters``)."""


@dataclass(frozen=True)
class Process:
    """What a process takes before it has a model.

    Attributes:
        device: bytes on the device: on the CPU the interpreter and the libraries, on a GPU its
            context and the libraries' workspaces.
        compilation: bytes that capture, verification and code generation leave there.
        slack: the allocator's overhead for each byte of activations.
        is_host: whether the device is the host.
    """

    device: int
    compilation: int
    slack: float
    is_host: bool


@dataclass(frozen=True)
class Memory:
    """The peak of one process, in bytes on the device, by what it is for.

    Attributes:
        process: the interpreter and the libraries, or the context of a GPU.
        weights: model and adapters, as far as this process has them.
        gradients: of what is trained.
        optimizer: states, and copies of the weights in 32 bits.
        activations: what blocks keep for backward, and the hidden states around the head.
        logits: two tiles of them.
        working: temporary memory of one block.
        communication: gathered weights, whole gradients of a block, buckets.
        verification: with capture and code generation.
        slack: what the allocator cannot use again.
        checkpoint: the copy that ``async_save`` makes of weights and states, where the device is
            the host; else ``host`` has it.
        host: bytes in the memory of the host, in addition.
        offloaded: of these, inputs of blocks, which are copied in each pass.
        levels: how many blocks keep what.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    working: int
    communication: int
    verification: int
    slack: int
    host: int
    levels: dict[Level, int]
    offloaded: int = 0
    checkpoint: int = 0

    def parts(self) -> dict[str, int]:
        """Bytes by name, which add up to the peak."""
        names = (
            "process", "weights", "gradients", "optimizer", "activations", "logits", "working",
            "communication", "verification", "slack", "checkpoint",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def peak(self) -> int:
        """The sum of the parts."""
        return sum(self.parts().values())


class _Known:
    """Usages, cached by level; at "weights", with ``packed`` bytes of unpacked weights."""

    def __init__(self, usages: Usages, levels: Sequence[Level], packed: int) -> None:
        self._usages, self._levels, self._packed = usages, levels, packed
        self._cache: dict[Level, Usage | None] = {}

    def get(self, level: Level, /) -> Usage | None:
        if level == "weights" and level not in self._cache:
            base = self.get(self._levels[1])
            self._cache[level] = base and replace(
                base, saved=base.saved + self._packed, forward=base.forward + self._packed,
                backward=base.backward + self._packed,
            )  # fmt: skip
        if level not in self._cache:
            self._cache[level] = self._usages.get(level)
        return self._cache[level]


@dataclass(frozen=True)
class TrainingJob:
    """All that the peak depends on.

    Attributes:
        step: the usage of a step with one micro batch.
        passes: forward passes per optimizer step.
        checkpointed: whether the recipe asks for gradient checkpointing.
        optimized: whether the recipe's model is optimized: only then blocks have levels.
        experts: whether bare weights of experts are quantized, too.
        copies: of the weights: 2 with a reference model.
        extra_forward_passes: further forward passes, without gradients.
        copied: bytes of weights that ``async_save`` copies; None: it is not set.
        memory: the recipe's key.
        process: the memory of a process without the model.
    """

    blueprint: Blueprint
    units: Sequence[FSDPUnit]
    step: Step
    optimizer: str
    passes: int
    checkpointed: bool
    memory: str
    codegen: str
    process: Process
    optimized: bool = True
    experts: bool = False
    rate: float = 1.0
    copies: int = 1
    extra_forward_passes: int = 0
    copied: int | None = None

    def blocks(self, factor: float) -> list[Usages]:
        """The usage of each block of the whole model, for ``factor`` times the tokens."""
        packed = {u.name: sum(w.numbers * w.itemsize for w in u.weights if w.scales)
                  for u in self.units}  # fmt: skip
        return [
            usages
            for path, times in self.blueprint.times.items()
            for usages in [
                _Known(Scaled(self.step.usages[path], factor), self.all_levels(), packed[path])
            ] * times
        ]  # fmt: skip

    def levels(self) -> tuple[Level, ...]:
        """What a block may keep, the fastest first."""
        mode = Budget.parse(self.memory).mode
        levels = self.all_levels()
        if mode == "min":
            return ("input",)
        return levels[:1] if mode == "speed" else levels

    def all_levels(self) -> tuple[Level, ...]:
        """The same, if the planner were free to choose."""
        if not self.optimized:
            return ("input",) if self.checkpointed else ("all",)
        levels = allowed(self.codegen, host=not self.process.is_host)
        counted = [usages.get(levels[0]) for usages in self.step.usages.values()]
        if None in counted:  # a block that was counted in eager mode
            levels = ("all", *levels[1:])
        if self.checkpointed:
            return levels[1:] if levels[0] == "all" else levels
        return levels if self.blueprint.stored is None else ("weights", *levels)

    def with_bits(self, bits: int | None) -> TrainingJob:
        """The same job with frozen weights of ``bits`` bits; None: in the dtype that they have."""
        return replace(self, units=fsdp_units(self.blueprint, bits, self.experts))

    @property
    def hidden(self) -> int:
        """The size of a hidden state."""
        return int(self.blueprint.model.get_input_embeddings().weight.shape[1])

    def head_bytes(self, factor: float) -> int:
        """Bytes of the hidden states around the head, before and after the final norm."""
        return round(12 * self.step.tokens * self.hidden * factor)

    def logits_bytes(self, factor: float) -> int:
        """Bytes of the logits that exist at one time: tiles of them where the loss is fused."""
        head = self.blueprint.model.get_output_embeddings()
        rows = 0 if head is None else max((p.shape[0] for p in head.parameters()), default=0)
        if "linear_cross_entropy" not in self.step.rewrites:  # in fp32, softmax, and gradient
            return round(12 * self.step.tokens * rows * factor)
        most = most_logits(self.process.is_host)
        return min(round(8 * self.step.tokens * rows * factor), most)

    def dequantized_bytes(self) -> int:
        """Bytes of the largest quantized weight when it is dequantized for its product."""
        packed = [w for u in self.units for w in u.weights if w.scales]
        return max((w.numbers * w.itemsize for w in packed), default=0)


def estimate(
    job: TrainingJob,
    layout: ProcessLayout,
    room: int | None,
    factor: float = 1.0,
    level: Level | None = None,
) -> Memory:
    """The peak of the first process of a run.

    ``room`` are the bytes that the process may take on its device; blocks keep less where all that
    they keep does not fit. ``factor`` is how many times the counted tokens a micro batch has;
    ``level`` is what all blocks keep, by default what fits.
    """
    states = model_states(job.units, layout, job.optimizer, job.passes)
    fixed = _fixed(job, states, layout)
    part = factor / layout.context
    usages = job.blocks(part)
    head, logits = job.head_bytes(part), job.logits_bytes(part)
    setting = _setting(job, fixed, room, head, logits)
    levels = [level] * len(usages) if level else choose(usages, setting)
    used = [entry for u, v in zip(usages, levels, strict=True) if (entry := u.get(v)) is not None]
    activations = sum(u.saved for u in used)
    passing = max((max(u.forward, u.backward) - u.saved for u in used), default=0)
    passing += job.dequantized_bytes()
    if (images := job.step.images) is not None:  # towers run before any block keeps something
        activations += round(part * images.kept)
        passing = max(passing, round(part * images.passing) - activations)
    at_head = passing <= head + logits
    return replace(
        fixed,
        activations=activations + (head if at_head else 0),
        logits=logits if at_head else 0,
        working=0 if at_head else passing,
        slack=int(activations * job.process.slack),
        host=states.host
        + on_host(levels, usages)
        + (0 if fixed.checkpoint else _copy(job, states)),
        offloaded=on_host(levels, usages),
        levels={v: levels.count(v) for v in dict.fromkeys(levels)},
    )


def smallest_peak(
    job: TrainingJob, layout: ProcessLayout, room: int | None, factor: float = 1.0
) -> int:
    """The peak where all blocks keep as little as they may; arguments as for ``estimate``."""
    return min(estimate(job, layout, room, factor, level).peak for level in job.levels())


def _fixed(job: TrainingJob, states: ModelStates, layout: ProcessLayout) -> Memory:
    on_device = 0 if job.process.is_host else 1
    moved = on_device * states.host
    gradients, optimizer = states.gradients, states.optimizer
    weights = job.copies * states.weights
    if moved and layout.weights_on_host:
        weights = gradients = 0
    if moved and layout.states_on_host:
        optimizer = 0
    return Memory(
        process=job.process.device, weights=weights, gradients=gradients, optimizer=optimizer,
        activations=0, logits=0, working=0,
        communication=states.buffers + _gathered(job.units, layout),
        verification=job.process.compilation, slack=0, host=0, levels={},
        checkpoint=_copy(job, states) if job.process.is_host else 0,
    )  # fmt: skip


def _copy(job: TrainingJob, states: ModelStates) -> int:
    """Bytes of what ``async_save`` copies."""
    return 0 if job.copied is None else job.copied + states.optimizer


def _gathered(units: Sequence[FSDPUnit], layout: ProcessLayout) -> int:
    """Bytes of weights and gradients that are whole in passing.

    Two blocks: the one in use, and the next, which is fetched meanwhile; what is outside of them
    from forward to backward; and a block's gradients before and while they are reduced.
    """
    if not layout.shards_weights:
        return 0
    blocks = [u for u in units if u.name]
    outside = sum(w.bytes for u in units if not u.name for w in u.weights)
    largest = max((sum(w.bytes for w in u.weights) for u in blocks), default=0)
    trained = max((_trained(u) for u in blocks), default=0)
    whole: float = 2 * largest
    if layout.engine == "ZeRO-3":  # which frees weights once this many are there
        numbers = sum(u.times * w.numbers for u in units for w in u.weights)
        whole = max(whole, min(_MAX_LIVE / max(numbers, 1), 1.0) * _stored(blocks))
    elif not layout.reshards:
        whole = _stored(blocks)
    return round(outside + whole + 2 * trained)


def _stored(units: Sequence[FSDPUnit]) -> int:
    return sum(u.times * w.bytes for u in units for w in u.weights)


def _trained(unit: FSDPUnit) -> int:
    return sum(w.numbers * w.itemsize for w in unit.weights if w.trains)


def _setting(
    job: TrainingJob, fixed: Memory, room: int | None, head: int, logits: int
) -> PlanInputs:
    """The same record that a run plans with, for the memory of another device.

    The host is assumed to have as much memory for each device as the device has.
    """
    budget = None if room is None else int(SPARE * room)
    parsed = Budget.parse(job.memory)
    if parsed.bytes is not None:
        budget = parsed.bytes
    base = sum(fixed.parts().values()) + job.dequantized_bytes()
    # all of these logits exist at one time: none are left for the record's own tiles
    return PlanInputs(base, 0, head + logits, budget, job.levels(), room or 0, 0, job.process.slack)
