"""How long a launch is kept by the issue of its instructions, by a model of the card.

The machine code says how many instructions a warp issues, outside of loops and in an iteration of
each; the launch says how many iterations, warps and programs there are. A multiprocessor has four
schedulers, each of which issues one instruction a cycle, of warps in turn; what a warp alone
issues waits for its own results. No cache, no conflict and no barrier is in the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fusewright.kernels.launch import cdiv
from launches import Launch
from machine_code import CARDS, compiled, instructions, read

_CARD = next(card for card in CARDS if card.name == "sm_90")
_MULTIPROCESSORS, _SCHEDULERS = 132, 4
_CLOCK = 1.7e9
_ALONE = 2.5
"""Cycles from one instruction of a warp to its next, where no other warp is there: assumed, as
results of arithmetic take 4 to 6 cycles, and about every second instruction waits for one."""


def _steps(size: str, block: str) -> Callable[[dict[str, Any]], int]:
    return lambda a: cdiv(a[size], a[block])


_ITERATIONS: dict[str, tuple[Callable[[dict[str, Any]], int], ...]] = {
    "rank_update": (_steps("rank", "BLOCK_R"),),
    "wide_product": (lambda a: cdiv(a.get("share", a["inner"]), a["BLOCK_K"]),),
    "rope": (_steps("q_heads", "HEADS"), _steps("k_heads", "HEADS")),
    "backward": (lambda a: a["tiles"],),
    "loss": (_steps("vocabulary", "BLOCK_V"),) * 2,
    "statistics": (_steps("vocabulary", "BLOCK_V"),),
    "slope": (_steps("vocabulary", "BLOCK_V"),),
    "matmul": (_steps("inner", "BLOCK_K"),),
}
"""Kernel -> how often each of its loops runs, in the order of the code; of those without, none."""


def seconds(launch: Launch) -> float:
    """The least time in which an H100 issues the instructions of a launch."""
    programs = 1
    for n in launch.grid:
        programs *= n
    return cycles(launch, programs) / _CLOCK


def cycles(launch: Launch, programs: int) -> float:
    """Cycles of the multiprocessor that has most of so many programs."""
    outside, loops, warps, resident = _code(_Once(launch))
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    if arguments.get("CLEAR"):  # a loop for rows that do not count: it stores, and no more
        loops = tuple(n for n in loops if n != min(loops))
    counts = [count(arguments) for count in _ITERATIONS.get(launch.name, ())] if loops else []
    if len(counts) != len(loops):
        raise ValueError(f"{launch.name} has {len(loops)} loops, and {len(counts)} are known")
    of_warp = outside + sum(n * count for n, count in zip(loops, counts, strict=True))
    total, left = 0.0, cdiv(programs, _MULTIPROCESSORS)
    while left > 0:
        together = min(left, resident)
        total += of_warp * max(cdiv(together * warps, _SCHEDULERS), _ALONE)
        left -= together
    return total


class _Once:
    """A launch, equal to those that run the same code."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        kinds = (
            a if isinstance(a, (int, float)) else str(a.dtype) if a else a for a in launch.args
        )
        self._key = (id(launch.kernel), *kinds, *launch.options.items())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once) and self._key == other._key


@functools.cache
def _code(once: _Once) -> tuple[int, tuple[int, ...], int, int]:
    """Instructions outside of loops and in each, warps, and programs of a multiprocessor."""
    made = compiled(once.launch, _CARD)
    code = read(made, _CARD)
    resident = round(code.occupancy * _CARD.threads / 32 / code.warps)
    return (*instructions(made), code.warps, max(resident, 1))
