"""The planner: what each block keeps for backward, so that a training step fits into a budget.

It knows what each level of ``levels.py`` keeps and costs, and moves blocks to leaner levels
(``choice.py``) until the predicted peak fits. When the first step has ended, its prediction is
compared with the measured peak; if it was wrong by more than a tenth, it plans once more. A batch
with more tokens than any before gets a new plan.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import OptimizeError
from ..sharding import local_share
from .budget import GB, Budget, gigabytes
from .choice import PlanInputs, Scaled, Usages, choose, on_host, peak
from .levels import LEVELS, Level
from .meter import Meter
from .offload import Offload

TOLERANCE = 0.1
"""By how much of itself a measured peak may be off the prediction before a new plan is made."""


@dataclass(eq=False)
class Planner:
    """Makes the plan of one session, and keeps its history."""

    budget: Budget
    model: weakref.ref[nn.Module]
    blocks: weakref.WeakSet[nn.Module]  # those of the model, and those of its copies
    meter: Meter
    # the levels of blocks that run as this session's do, the fastest first
    allowed: tuple[Level, ...]
    # what each block keeps; empty until there is a plan
    levels: weakref.WeakKeyDictionary[nn.Module, Level] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    predicted: int | None = None  # the peak that the plan was made for, in bytes
    measured: int | None = None  # the peak of the first step, in bytes; None if it is not known
    host: int = 0  # the bytes of the host's memory that the plan takes
    unpacks: bool = False  # a block has weights by formula: the level "weights" is one of its own
    # runs the blocks whose input the plan keeps there
    offload: Offload = field(default_factory=Offload)
    first: Level | None = None  # the level of the block that the plan was made at
    notes: list[str] = field(default_factory=list)  # what was decided, and why, for the report
    has_stepped: bool = False  # an optimizer step has been made; no plan is too large from then on
    _known: weakref.WeakKeyDictionary[nn.Module, Usages] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    _setting: PlanInputs | None = None
    _rows: int = 0
    _first: weakref.ref[nn.Module] | None = None
    _stamp: tuple[float, ...] = ()
    _ended: bool = False

    def __post_init__(self) -> None:
        self.offload.note = self.note

    def level(self, module: nn.Module) -> Level | None:
        """What ``module`` keeps; None while nothing is planned."""
        # a part of a block that could not be captured keeps what most blocks do
        if self.budget.mode == "min":
            return "input"
        if self.budget.mode == "speed":
            return self.fastest()
        planned = self.levels.get(module)
        if planned is not None or not self.levels:
            return planned
        return Counter(self.levels.values()).most_common(1)[0][0]

    def fastest(self) -> Level:
        """What a block keeps that takes no account of memory."""
        return next(v for v in self.allowed if v != "weights" or self.unpacks)

    def trainable(self) -> list[nn.Parameter]:
        """The trainable parameters of the model, each once."""
        model = self.model()
        return [] if model is None else [p for p in model.parameters() if p.requires_grad]

    def note(self, text: str) -> None:
        """Remember a decision, once."""
        if text not in self.notes:
            self.notes.append(text)

    def plan(self, module: nn.Module, usages: Usages, setting: PlanInputs) -> Level:
        """Make the plan from the first block whose usage is known; the others are taken as like it.

        Returns its level. OptimizeError: no plan fits into a budget given in bytes.
        """
        self._known[module] = usages
        if not self.levels:
            self._setting = setting
            self._decide(setting)
            self.first = self.levels[module]
        return self.level(module) or setting.allowed[0]

    def _decide(self, setting: PlanInputs) -> None:
        blocks = list(self.blocks)
        usages = [self._usages(b) for b in blocks]
        levels = choose(usages, setting)
        total = self.predicted = peak(levels, usages, setting)
        if setting.budget is not None and total > setting.budget:
            if self.budget.bytes is not None and not self.has_stepped:
                self.levels.clear()
                raise OptimizeError(self._too_small(setting, total))
            # a run that has got somewhere: better over the budget than not at all
            self.note(
                f"even the leanest plan may need {gigabytes(total)}, more than the "
                f"{gigabytes(setting.budget)} that there is"
            )
        self.host = on_host(levels, usages)
        for block, level in zip(blocks, levels, strict=True):
            self.levels[block] = level

    def outlook(self, factor: float) -> tuple[list[Usages], PlanInputs] | None:
        """The usages of each block and the setting, for ``factor`` times the tokens, or None."""
        if self._setting is None:
            return None
        usages: list[Usages] = [Scaled(self._usages(b), factor) for b in self.blocks]
        return usages, self._setting.scaled(factor)

    def usages(self) -> list[tuple[nn.Module, Usages]]:
        """The blocks whose graphs were captured, each with what it takes at each level."""
        return list(self._known.items())

    def _usages(self, block: nn.Module) -> Usages:
        """Those of a block, or of one of its class that is known, or of any."""
        usages = self._known.get(block)
        alike = (u for b, u in self._known.items() if type(b) is type(block))
        return usages or next(alike, None) or next(iter(self._known.values()))

    def _too_small(self, s: PlanInputs, needed: int) -> str:
        return (
            f"memory={self.budget.text!r} is too small for any plan: with everything computed "
            f"again that can be, a training step of this batch needs {gigabytes(needed)} "
            f"({gigabytes(s.base)} in use before it, {gigabytes(s.training)} for gradients, "
            f"optimizer and compilation). The smallest budget that fits is "
            f"memory={_round_up(needed)!r}; or use fewer tokens per batch."
        )

    def begin(self, module: nn.Module, rows: int) -> None:
        """Note that a training call of ``module``, a block, begins with ``rows`` tokens.

        The first step has ended when the block that came first is called again and an optimizer has
        changed a parameter since. Its peak is known then.

        OptimizeError: there are more tokens than before, no plan fits into the budget, and no step
        has been made.
        """
        if rows > self._rows and self.levels and self._setting is not None:
            self._grow(rows / max(self._rows, 1))
        self._rows = max(rows, self._rows)
        if self._first is None:
            self._first = weakref.ref(module)
            self._stamp = self._values()
            self.meter.start()
        elif not self._ended and self._first() is module and self._values() != self._stamp:
            self._ended = self.has_stepped = True
            self.measured = self.meter.peak()
            if self.measured is not None and self.predicted is not None:
                self._replan(self.measured, self.predicted)

    def on_optimizer_step(self) -> None:
        """An optimizer step was made, which may have left no mark: its learning rate may be 0."""
        self.has_stepped = True

    def _values(self) -> tuple[float, ...]:
        """What shows whether an optimizer has stepped: fused ones leave no other mark."""
        local = (_local(p) for p in self.trainable()[:16])
        some = (p.reshape(-1) for p in local if p is not None)
        # a few numbers of each: a copy of a large matrix would take memory
        sums = [p[:: p.numel() // 64 + 1].float().abs().sum() for p in some]
        # all in one tensor: on a GPU, each number that is read is waited for
        return tuple(torch.stack([s.to(sums[0].device) for s in sums]).tolist()) if sums else ()

    def _grow(self, factor: float) -> None:
        """Plan anew for a batch of ``factor`` times the tokens; its step counts as the first."""
        assert self._setting is not None
        for block, usages in list(self._known.items()):
            self._known[block] = Scaled(usages, factor)
        self._setting = self._setting.scaled(factor)
        self.has_stepped |= bool(self._stamp) and self._values() != self._stamp
        self._first, self._ended, self.measured = None, False, None
        self._decide(self._setting)

    def _replan(self, measured: int, predicted: int) -> None:
        off = measured - predicted
        if abs(off) <= TOLERANCE * measured or self._setting is None:
            return
        before = dict(self.levels)
        self._setting = replace(self._setting, training=self._setting.training + off)
        self._decide(self._setting)
        decision = "planned again" if dict(self.levels) != before else "the plan stays"
        self.note(
            f"the first step took {gigabytes(measured)} where {gigabytes(predicted)} were "
            f"predicted: {decision}"
        )

    def may_retry(self) -> bool:
        """Whether an out-of-memory error now makes the plan leaner: in the first step only."""
        return self.budget.mode == "auto" and not self._ended

    def leaner(self) -> bool:
        """After an out-of-memory error: move every block one level down; False if none can be."""
        if not self.may_retry() or not self.levels:
            return False
        moved = {b: self._below(v) for b, v in self.levels.items()}
        if moved == dict(self.levels):
            return False
        self.levels.update(moved)
        self._first = None  # the step begins again
        self.note("out of memory in the first step: every block keeps less")
        return True

    def _below(self, level: Level) -> Level:
        place = self.allowed.index(level) if level in self.allowed else -1
        return self.allowed[min(place + 1, len(self.allowed) - 1)]

    def describe(self) -> str:
        """One line for the report; empty while there is no plan."""
        counts = Counter(
            list(self.levels.values()) or [v for b in self.blocks if (v := self.level(b))]
        )
        parts = [_blocks_at(counts[v], v) for v in LEVELS if counts[v]]
        line = f"{self.budget.text}: {', '.join(parts) or 'nothing is planned yet'}"
        if self.host:
            line += f" ({gigabytes(self.host)})"
        if self.predicted is not None:
            line += f"; predicted peak {gigabytes(self.predicted)}"
            line += f", measured {gigabytes(self.measured)}" if self.measured is not None else ""
        return "; ".join([line, *self.notes])


def _blocks_at(blocks: int, level: Level) -> str:
    if blocks == 1:
        return f"1 block keeps {_MEANING[level].replace('their', 'its')}"
    return f"{blocks} blocks keep {_MEANING[level]}"


def _local(p: Tensor) -> Tensor | None:
    """What this process has of a parameter; None where it has no values at all."""
    # the numbers of a sharded parameter are this process's own: no collective runs for them
    local = local_share(p)
    return None if local.is_meta or isinstance(local, FakeTensor) else local


_MEANING = {
    "weights": "what is fastest, unpacked weights included",
    "all": "all that their ops keep",
    "products": "matrix products",
    "input": "their input",
    "tiles": "their input, MLPs in tiles",
    "offload": "their input in host memory",
    "offload_tiles": "their input in host memory, MLPs in tiles",
}


def _round_up(size: int) -> str:
    return f"{-(-size * 10 // GB) / 10:.1f}GB"
