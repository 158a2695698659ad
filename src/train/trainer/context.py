"""What all parts of a run share while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from ..processes.signals import Interrupts
from ..processes.world import World
from ..recipe.recipe import Recipe
from ..report.throughput import ThroughputMeter
from ..terminal import say
from .evaluation import Batches


@dataclass
class Context:
    """What the trainer needs besides the model and the rows.

    Attributes:
        recipe: the recipe.
        tokenizer: saved with every checkpoint.
        console: where to print.
        interrupts: whose signal ends the loop.
        meter: counts the steps.
        validation: batches by the name of their dataset.
        data: the fingerprint of the prepared rows.
        carried: says what else of the run a checkpoint has to keep.
        world: the processes of the run.
        on_ready: called with the trainer once its model is wrapped, before the first step; or None.
    """

    recipe: Recipe
    tokenizer: Any
    console: Console
    interrupts: Interrupts
    meter: ThroughputMeter = field(default_factory=ThroughputMeter)
    validation: Mapping[str, Batches] = field(default_factory=dict)
    data: str = ""
    carried: Callable[[], dict[str, Any]] = dict
    world: World = field(default_factory=World)
    on_ready: Callable[[Any], None] | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)
