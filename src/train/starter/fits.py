"""Whether a recipe fits into memory: the one place that ``init`` asks.

The answer is that of ``fusewright plan``. A step is counted once for each way of training; other
lengths and batches are multiples of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ...errors import FusewrightError, first_line
from ...memory.budget import GB, gigabytes
from ..model.load import load_config, quiet
from ..model.positions import positions
from ..model.precision import dtype_for_training
from ..plan.count.layout import layout_of
from ..plan.estimate import SPARE, TrainingJob, smallest_peak
from ..plan.here import CPU, devices_here
from ..plan.plan import make_job
from ..plan.recommend import method_of
from ..recipe.recipe import Recipe


@dataclass(frozen=True)
class MemoryVerdict:
    """Whether a recipe fits.

    Attributes:
        fits: None: it cannot be said.
        needs: bytes that it needs at least, if that is known.
        note: the same in words.
    """

    fits: bool | None
    needs: int | None
    note: str


class Fits(Protocol):
    """Judges a recipe."""

    def __call__(self, recipe: Recipe, memory: int | None) -> MemoryVerdict:
        """Whether ``recipe`` trains in ``memory`` bytes; None: in what this machine has."""
        ...


class PlanJudge:
    """Judges by the plan of a run on one device of this machine."""

    def __init__(self) -> None:
        self._jobs: dict[str, TrainingJob] = {}
        self._failed: dict[str, MemoryVerdict] = {}
        self._devices = devices_here(torch.float32, 1)

    def __call__(self, recipe: Recipe, memory: int | None) -> MemoryVerdict:
        """Whether ``recipe`` trains in ``memory`` bytes; None: in what this machine has.

        A method whose step cannot be planned is tried once: the model may be on the hub, which
        cannot be reached, and its code may raise anything.
        """
        method = method_of(recipe)
        if method not in self._failed:
            try:
                with quiet():
                    return self._planned(recipe, memory)
            except Exception as error:
                self._failed[method] = MemoryVerdict(None, None, f"not checked: {_reason(error)}")
        return self._failed[method]

    def _planned(self, recipe: Recipe, memory: int | None) -> MemoryVerdict:
        room = self._devices.card.memory if memory is None else memory
        job = self._job(recipe)
        tokens = recipe.micro_batch_size * recipe.sequence_len
        needs = smallest_peak(job, layout_of(recipe, 1), room, tokens / job.step.tokens)
        said = (
            f"needs at least {gigabytes(needs)} of {gigabytes(room)}, according to fusewright plan"
        )
        return MemoryVerdict(needs <= SPARE * room, needs, said)

    def _job(self, recipe: Recipe) -> TrainingJob:
        method = method_of(recipe)
        if method == "QLoRA":
            dense = {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": False}
            return self._job(recipe.model_copy(update=dense)).with_bits(4)
        if method not in self._jobs:
            dtype = dtype_for_training(recipe.precision(), recipe.adapter is not None)
            on_cpu = self._devices.card.name == CPU
            self._jobs[method] = make_job(recipe, dtype, on_cpu)
        return self._jobs[method]


def positions_of(recipe: Recipe) -> int | None:
    """How many tokens the recipe's model can read; None: it does not say, or is not here."""
    with quiet():
        try:
            return positions(load_config(recipe))
        except Exception:  # it is on the hub, or not readable, which planning says
            return None


def _reason(error: Exception) -> str:
    """An error in one line; with its class, unless it is one of ours."""
    line = first_line(error)
    if isinstance(error, FusewrightError) or line == type(error).__name__:
        return line
    return f"{type(error).__name__}: {line}"


def smallest(budget: int | None) -> str:
    """A budget in words, for a message."""
    return "the memory of this machine" if budget is None else f"{budget / GB:g} GB"
