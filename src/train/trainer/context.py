"""What all parts of a run share while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from ..data.images.features import Featurizer
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
        tokenizer: saved with every checkpoint.
        featurizer: makes what batches have of images; None: there are none.
        answering: makes it of the image that ``sample_prompt`` is about; None: it is about none.
        interrupts: whose signal ends the loop.
        validation: batches by the name of their dataset.
        data: the fingerprint of the prepared rows.
        carried: returns what else of the run a checkpoint keeps.
        timed: adds the seconds of a block to those of the run's part of that name.
        on_ready: called with the trainer once its model is wrapped, before the first step.
    """

    recipe: Recipe
    tokenizer: Any
    console: Console
    interrupts: Interrupts
    meter: ThroughputMeter = field(default_factory=ThroughputMeter)
    validation: Mapping[str, Batches] = field(default_factory=dict)
    data: str = ""
    carried: Callable[[], dict[str, Any]] = dict
    timed: Callable[[str], AbstractContextManager[Any]] = nullcontext
    world: World = field(default_factory=World)
    on_ready: Callable[[Any], None] | None = None
    featurizer: Featurizer | None = None
    answering: Featurizer | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)
