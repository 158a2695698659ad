"""The planner: what each block keeps for backward, so that a training step fits into a budget.

It knows what each level of ``passes.memory`` keeps and costs (``usage.predict``), and moves blocks
to leaner levels, those first that save the most bytes per operation computed again, until the
predicted peak fits. After the first step it compares its prediction with the measured peak, and
plans once more if it was wrong by more than a tenth.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from ..errors import OptimizeError
from ..memory_budget import GB, Budget, gigabytes
from ..passes.memory import LEVELS, Level
from .meter import Meter
from .usage import Usage

Usages = dict[Level, Usage]
"""What a block takes, at each level."""

TOLERANCE = 0.1
"""By how much of itself a measured peak may be off the prediction before a new plan is made."""


@dataclass(frozen=True)
class Setting:
    """What a plan is made for, besides the blocks.

    Attributes:
        base: bytes in use before the step.
        training: bytes that come with the first step whatever the plan: gradients of trainable
            parameters, two states of the optimizer for each, compilation.
        head: the most bytes that the head and its loss need at one time.
        budget: bytes that may be used; None is no limit.
        fastest: the level that no block may exceed.
    """

    base: int
    training: int
    head: int
    budget: int | None
    fastest: Level = "all"


def peak(levels: Sequence[Level], usages: Sequence[Usages], setting: Setting) -> int:
    """The predicted peak, in bytes, when block i keeps what ``levels[i]`` says.

    Everything that is kept is held when the head runs and when the last block runs backward; what a
    block needs beyond that exists in one block at a time.
    """
    used = [usages[i][level] for i, level in enumerate(levels)]
    passing = max((max(u.forward, u.backward) - u.kept for u in used), default=0)
    kept = sum(u.kept for u in used)
    return setting.base + setting.training + kept + max(passing, setting.head)


def choose(usages: Sequence[Usages], setting: Setting) -> list[Level]:
    """The level of each block: the least computed again that fits, or the leanest plan there is.

    Args:
        usages: of each block.
        setting: the budget and what else is in memory.
    """
    allowed = LEVELS[LEVELS.index(setting.fastest) :]
    levels: list[Level] = [allowed[0]] * len(usages)
    while setting.budget is not None and peak(levels, usages, setting) > setting.budget:
        step = _best_step(levels, usages, allowed)
        if step is None:
            break
        levels[step[0]] = step[1]
    return levels


def _best_step(
    levels: Sequence[Level], usages: Sequence[Usages], allowed: Sequence[Level]
) -> tuple[int, Level] | None:
    """The block to make leaner, and how lean: the most bytes saved per operation added."""
    best, found = 0.0, None
    for i, level in enumerate(levels):
        now = usages[i][level]
        for leaner in (v for v in allowed[allowed.index(level) + 1 :] if v in usages[i]):
            then = usages[i][leaner]
            ratio = (now.kept - then.kept) / max(then.flops - now.flops, 1)
            if ratio > best:
                best, found = ratio, (i, leaner)
    return found


@dataclass(eq=False)
class Planner:
    """Makes the plan of one session, and keeps its history.

    Attributes:
        budget: the user's ``memory=``.
        model: the optimized model, as a weak reference.
        blocks: its blocks.
        meter: measures the memory in use.
        fastest: the level at which a step takes the least time.
        levels: what each block keeps; empty until there is a plan.
        predicted: the peak that the plan was made for, in bytes.
        measured: the peak of the first step, in bytes; None if it is not known.
        first: the level of the block that the plan was made at.
        notes: what was decided, and why, for the report.
    """

    budget: Budget
    model: weakref.ref[nn.Module]
    blocks: weakref.WeakSet[nn.Module]
    meter: Meter
    fastest: Level = "all"
    levels: weakref.WeakKeyDictionary[nn.Module, Level] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    predicted: int | None = None
    measured: int | None = None
    notes: list[str] = field(default_factory=list)
    _known: weakref.WeakKeyDictionary[nn.Module, Usages] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    first: Level | None = None
    _setting: Setting | None = None
    _first: weakref.ref[nn.Module] | None = None
    _ended: bool = False

    def level(self, module: nn.Module) -> Level | None:
        """What ``module`` keeps; None while nothing is planned.

        A part of a block that could not be captured keeps what most blocks do.
        """
        if self.budget.mode in ("speed", "min"):
            return self.fastest if self.budget.mode == "speed" else "input"
        known = self.levels.get(module)
        if known is not None or not self.levels:
            return known
        return Counter(self.levels.values()).most_common(1)[0][0]

    def usages(self, module: nn.Module) -> Usages | None:
        """What ``module`` takes at each level, if it was predicted before."""
        return self._known.get(module)

    def trainable(self) -> list[nn.Parameter]:
        """The trainable parameters of the model, each once."""
        model = self.model()
        return [] if model is None else [p for p in model.parameters() if p.requires_grad]

    def plan(self, module: nn.Module, usages: Usages, setting: Setting) -> Level:
        """Make the plan from the first block whose usage is known; the others are taken as like it.

        Args:
            module: the block.
            usages: of this block.
            setting: the budget and what else is in memory.

        Returns:
            The level of ``module``.

        Raises:
            OptimizeError: no plan fits into a budget given in bytes.
        """
        self._known[module] = usages
        if module in self.levels:
            return self.levels[module]
        self._setting = setting
        self._decide()
        self.first = self.levels[module]
        return self.first

    def _decide(self) -> None:
        assert self._setting is not None
        known = next(iter(self._known.values()))
        blocks = list(self.blocks)
        usages = [self._known.get(b, known) for b in blocks]
        chosen = choose(usages, self._setting)
        self.predicted = peak(chosen, usages, self._setting)
        for block, level in zip(blocks, chosen, strict=True):
            self.levels[block] = level
        limit = self._setting.budget
        if limit is None or self.predicted <= limit:
            return
        if self.budget.bytes is None:
            self.notes.append(
                f"even the leanest plan may need {gigabytes(self.predicted)}, more than the "
                f"{gigabytes(limit)} that there is"
            )
            return
        self.levels.clear()
        raise OptimizeError(self._too_small(self._setting, self.predicted))

    def _too_small(self, s: Setting, needed: int) -> str:
        return (
            f"memory={self.budget.text!r} is too small for any plan: with everything computed "
            f"again that can be, a training step of this batch needs {gigabytes(needed)} "
            f"({gigabytes(s.base)} in use before it, {gigabytes(s.training)} for gradients, "
            f"optimizer and compilation). The smallest budget that fits is "
            f"memory={_round_up(needed)!r}; or use fewer tokens per batch."
        )

    def begin(self, module: nn.Module) -> None:
        """Note that a training call of ``module`` begins.

        The second call of the block that came first ends the first step: its peak is known then.
        """
        if self._first is None:
            self._first = weakref.ref(module)
            self.meter.start()
        elif not self._ended and self._first() is module:
            self._ended = True
            self.measured = self.meter.peak()
            if self.measured is not None and self.predicted is not None:
                self._replan(self.measured)

    def _replan(self, measured: int) -> None:
        assert self.predicted is not None
        assert self._setting is not None
        off = measured - self.predicted
        if abs(off) <= TOLERANCE * measured or self._setting.budget is None:
            return
        before, predicted = dict(self.levels), self.predicted
        s = self._setting
        self._setting = replace(s, training=s.training + off)
        try:
            self._decide()
        except OptimizeError:  # the step has just run: better over the budget than not at all
            self.levels.update({b: LEVELS[-1] for b in self.blocks})
        self.notes.append(
            f"the first step took {gigabytes(measured)} where {gigabytes(predicted)} were "
            + f"predicted: {'planned again' if dict(self.levels) != before else 'the plan stays'}"
        )

    def may_retry(self) -> bool:
        """Whether an out-of-memory error now makes the plan leaner: in the first step only."""
        return self.budget.mode == "auto" and not self._ended

    def leaner(self) -> bool:
        """After an out-of-memory error: move every block one level down; False if none can be."""
        if not self.may_retry() or not self.levels:
            return False
        lowest = LEVELS[-1]
        if all(level == lowest for level in self.levels.values()):
            return False
        for block, level in list(self.levels.items()):
            self.levels[block] = LEVELS[min(LEVELS.index(level) + 1, len(LEVELS) - 1)]
        self.notes.append("out of memory in the first step: every block keeps less")
        return True

    def describe(self) -> str:
        """One line for the report; empty while there is no plan."""
        counts = Counter(
            list(self.levels.values()) or [v for b in self.blocks if (v := self.level(b))]
        )
        parts = [f"{counts[v]} blocks keep {_MEANING[v]}" for v in LEVELS if counts[v]]
        line = f"{self.budget.text}: {', '.join(parts) or 'nothing is planned yet'}"
        if self.predicted is not None:
            line += f"; predicted peak {gigabytes(self.predicted)}"
            line += f", measured {gigabytes(self.measured)}" if self.measured is not None else ""
        return "; ".join([line, *self.notes])


_MEANING = {
    "all": "all that their ops keep",
    "products": "matrix products",
    "input": "their input",
    "tiles": "their input, MLPs in tiles",
}


def _round_up(size: int) -> str:
    return f"{-(-size * 10 // GB) / 10:.1f}GB"
