"""Choosing what each block keeps: the least computed again that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..kernels.loss.head_tiles import most_logits
from .levels import Level
from .usage import Usage


class Usages(Protocol):
    """What a block takes at each level; a mapping, or what predicts when it is asked."""

    def get(self, level: Level, /) -> Usage | None:
        """The usage at one level; None if it cannot run at it."""


@dataclass(frozen=True)
class PlanInputs:
    """What a plan is made for, besides the blocks."""

    base: int  # bytes in use before the step
    # bytes that come with the first step whatever the plan: gradients of trainable parameters, two
    # states of the optimizer for each, compilation
    training: int
    head: int  # the most bytes that the head and its loss need at one time, without logits
    budget: int | None  # bytes that may be used; None is no limit
    allowed: tuple[Level, ...]  # the levels that a block may have, the fastest first
    host: int = 0  # bytes that blocks may keep in the memory of the host
    logits: int = 0  # bytes of all logits
    slack: float = 0.0  # bytes that the allocator holds besides, for each byte that blocks keep
    tiles: int = most_logits(on_cpu=True)  # bytes of logits that exist at one time, at most

    def scaled(self, factor: float) -> PlanInputs:
        """The same for a batch of ``factor`` times the tokens."""
        return replace(self, head=int(self.head * factor), logits=int(self.logits * factor))


@dataclass
class Scaled:
    """Usages of a batch that has ``factor`` times the tokens of the one that was predicted."""

    usages: Usages
    factor: float

    def get(self, level: Level, /) -> Usage | None:
        """The usage at one level."""
        base = self.usages.get(level)
        if base is None:
            return None
        larger = {
            name: int(getattr(base, name) * self.factor)
            for name in ("saved", "forward", "flops", "host")
        }
        # the gradients of parameters are as large whatever the batch
        backward = int((base.backward - base.gradients) * self.factor) + base.gradients
        return replace(base, **larger, backward=backward)


def peak(levels: Sequence[Level], usages: Sequence[Usages], setting: PlanInputs) -> int:
    """The predicted peak, in bytes, when block i keeps what ``levels[i]`` says."""
    # everything that is kept is held when the head runs and when the last block runs backward; what
    # a block needs beyond that exists in one block at a time
    pairs = zip(usages, levels, strict=True)
    current = [usage for block, level in pairs if (usage := block.get(level)) is not None]
    passing = max((_passing(u) - u.saved for u in current), default=0)
    saved_bytes = int(sum(u.saved for u in current) * (1 + setting.slack))
    head = setting.head + min(setting.logits, setting.tiles)
    return setting.base + setting.training + saved_bytes + max(passing, head)


def on_host(levels: Sequence[Level], usages: Sequence[Usages]) -> int:
    """The bytes that are kept in the memory of the host when block i is at ``levels[i]``."""
    per_block = (block.get(level) for block, level in zip(usages, levels, strict=True))
    return sum(u.host for u in per_block if u is not None)


def choose(usages: Sequence[Usages], setting: PlanInputs) -> list[Level]:
    """The level of each block: the least computed again that fits, or the leanest plan there is."""
    levels = [_fastest(block, setting.allowed) for block in usages]
    while setting.budget is not None and peak(levels, usages, setting) > setting.budget:
        step = _best_step(levels, usages, setting)
        if step is None:
            break
        levels[step[0]] = step[1]
    return levels


def _fastest(usages: Usages, allowed: Sequence[Level]) -> Level:
    """The fastest level whose usage is known; of a block of which nothing is known, the fastest."""
    return next((v for v in allowed if usages.get(v) is not None), allowed[0])


def _passing(usage: Usage) -> int:
    return max(usage.forward, usage.backward)


def _best_step(
    levels: Sequence[Level], usages: Sequence[Usages], setting: PlanInputs
) -> tuple[int, Level] | None:
    """The block to make leaner, and how lean: the most bytes saved per operation added."""
    # inputs move to the host when nothing computed again saves bytes any more; when none keeps
    # less, the next level is taken for what it needs in passing
    best, step, lower = (False, 0.0), None, None
    room = setting.host - on_host(levels, usages)
    for i, level in enumerate(levels):
        now = usages[i].get(level)
        for leaner in setting.allowed[setting.allowed.index(level) + 1 :]:
            then = usages[i].get(leaner)
            if now is None or then is None or then.host - now.host > max(room, 0):
                continue
            ratio = (now.saved - then.saved) / max(then.flops - now.flops, 1)
            rank = then.host <= now.host, ratio
            if ratio > 0 and rank > best:
                best, step = rank, (i, leaner)
            elif lower is None and _passing(then) < _passing(now):
                lower = i, leaner
    return step or lower
