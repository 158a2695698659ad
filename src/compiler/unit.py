"""A unit of compilation, one captured graph, and the base class of the features that change it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..graph.effects import Effects
from ..rewrite.findings import Finding
from .choices import Choices
from .graph_log import StageLog
from .logits.reads import Reads

Run = Callable[..., Any]
"""A callable that takes the inputs of a graph and returns its outputs."""


@dataclass(frozen=True, eq=False)
class CallInfo:
    """The call of a region during which its graph was captured.

    Attributes:
        module: the region's module.
        first_input: the first tensor among the arguments.
        has_leaf: a leaf that needs a gradient takes the place of the first input.
        is_unlabelled: a causal LM's head was called without labels, as a step of training.
        reads: counts the reads of lazy logits.
        preparation: the thread that prepares Inductor since the model's first call.
    """

    module: nn.Module | None = None
    first_input: Tensor | None = None
    has_leaf: bool = False
    is_unlabelled: bool = False
    reads: Reads = field(default_factory=Reads)
    preparation: threading.Thread | None = None


@dataclass(eq=False)
class Notes:
    """Findings of the compilation of one graph, and instructions to its caller.

    Attributes:
        findings: one for each place that a rule matched or nearly matched.
        gradient_reason: why a block's input must have the gradient that its caller gives it.
        detached: places of inputs that need a gradient and get none.
        copied: places of inputs that are cloned at every call.
        inputs_of_outputs: for each output, the places of the inputs that it depends on; None where
            it is not needed.
    """

    findings: list[Finding] = field(default_factory=list)
    gradient_reason: str | None = None
    detached: Sequence[int] = ()
    copied: Sequence[int] = ()
    inputs_of_outputs: Sequence[frozenset[int]] | None = None


@dataclass(eq=False)
class Unit:
    """A captured graph, and everything that its compilation depends on.

    Attributes:
        graph: the graph; stages change it in place or replace it.
        examples: the inputs of the captured call.
        kind: the kind of the region (``regions.py``).
        grad: whether gradients were enabled when it was captured.
        call: the call during which it was captured.
        choices: the settings of the ``optimize`` call.
        log: dumps the graph after each stage.
        codegen: ``"eager"`` or ``"inductor"``: what runs the graph.
    """

    graph: fx.GraphModule
    examples: Sequence[Any]
    kind: str
    grad: bool
    call: CallInfo
    choices: Choices
    log: StageLog
    codegen: str = "eager"
    notes: Notes = field(default_factory=Notes)
    _effects: Effects | None = None

    @property
    def effects(self) -> Effects:
        """The effects of the graph in its present form; unchanged graphs share one record."""
        if (
            self._effects is None
            or self._effects.module is not self.graph
            or not self._effects.is_current()
        ):
            self._effects = Effects(self.graph)
        return self._effects

    @property
    def is_trained_block(self) -> bool:
        """True for the graph of a block with gradients: those are planned and compiled."""
        return self.kind == "block" and self.grad


class Feature:
    """An optional behaviour of the compiler. An instance serves one unit.

    Every method is optional. Each may raise to refuse the graph: then the original code runs, with
    the error as the reason.

    Attributes:
        name: names the stages of the feature in the dump of a graph.
    """

    name = ""

    def open(self, unit: Unit) -> None:
        """Bring the captured graph into the form that the rules match."""

    def close(self, unit: Unit) -> None:
        """Bring what no rule has rewritten back into its original form."""

    def wrap(self, unit: Unit, run: Run) -> Run:
        """Return ``run``, the compiled graph, with what must happen at each call around it."""
        return run
