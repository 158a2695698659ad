"""What each level would take of a captured block, and what else a plan must reckon with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..graph import run
from ..graph.fakes import fake, hint
from ..kernels.loss.head_tiles import most_logits
from .choice import PlanInputs
from .levels import HOSTED, Level, has_formulas, keep
from .offload import LEAST, carried
from .planner import Planner
from .usage import Usage, predict

_COMPILATION = {"eager": 80 << 20, "inductor": 200 << 20}
"""Bytes that capture, and Inductor's work, leave in a process that trains on the CPU: estimates."""

_SLACK = 0.15
"""On the CPU, bytes that malloc holds and cannot use again, for each byte that blocks keep. With
both, the first step's peak of seven plans of SmolLM2 (64 to 4,096 tokens, 25 to 1,300 MB kept) is
predicted to within 3% below and 7% above; later steps, with memory in more pieces, to within 7%."""

_SPARE = 0.9
"""The part of the device's memory that ``"auto"`` plans with."""

_HOST = 0.5
"""The part of the host's free memory that block inputs may take: pinned, nobody else can use it."""

_OPERATIONS_PER_BYTE = 5000
"""What a byte copied to the host or back costs, in operations: a link of 20 GB/s (PCIe 4 x16), and
100 TFLOP/s of the device meanwhile. Assumed: it ranks blocks; copies run during the work."""


def compilation_bytes(choice: str) -> int:
    """Bytes that capture and ``choice`` leave in a process on the CPU."""
    return _COMPILATION[choice]


class Predicted:
    """What a block's graph takes at each level, predicted when it is first asked for.

    ``module``, the rewritten graph, is left as it is. ``examples`` are its inputs as Dynamo gave
    them, with the sizes of the step at hand. ``choice`` is what will run it: ``"eager"`` or
    ``"inductor"``. ``note`` is told about a level that cannot be predicted, and why. Inputs of
    fewer bytes than ``least`` stay on the device.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        examples: Sequence[Any],
        choice: str,
        note: Callable[[str], None],
        least: int = LEAST,
    ) -> None:
        self._graph, self._examples = copy.deepcopy(module), list(map(_shape_of, examples))
        self._choice, self._note, self._least = choice, note, least
        self._usages: dict[Level, Usage | None] = {}

    def get(self, level: Level, /) -> Usage | None:
        """The usage at one level; None where an operation cannot run at it, or without contents."""
        if level in HOSTED and level not in self._usages:
            self._usages[level] = self._on_host(HOSTED[level])
        if level not in self._usages:
            try:
                self._usages[level] = self._predict(level)
            except Exception as error:  # whatever PyTorch raises: the level is not taken then
                self._usages[level] = None
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
                self._note(f"the memory of a block at {level!r} could not be predicted ({why})")
        return self._usages[level]

    def _on_host(self, level: Level) -> Usage | None:
        """The usage at ``level`` if the block's input is on the host; None if it has to stay."""
        usage = self.get(level)
        moved = [self._examples[i] for i in carried(self._examples, self._least)]
        sizes = [prod(hint(s) for s in t.shape) * t.itemsize for t in moved]
        if usage is None or not moved:
            return None
        # what leaves is counted at the block whose output it is: all blocks are taken as alike. Two
        # are there in passing: the one in use, and the one that leaves or comes meanwhile
        size = sum(sizes)
        return replace(
            usage,
            saved=max(usage.saved - size, 0),
            forward=usage.forward + 2 * size,
            backward=usage.backward + 2 * size,
            flops=usage.flops + 2 * size * _OPERATIONS_PER_BYTE,
            host=sum(1 << (s - 1).bit_length() for s in sizes),  # as PyTorch pins memory
        )

    def _predict(self, level: Level) -> Usage | None:
        if level == "weights" and not has_formulas(self._graph):
            return None
        graph = keep(copy.deepcopy(self._graph), level, self._choice)
        usage = predict(_dry(graph, self._choice), self._examples, hint)
        if self._choice == "eager" and level not in ("weights", "all"):
            # the state of the random numbers
            usage = replace(usage, saved=usage.saved + torch.get_rng_state().nbytes)
        return usage


def _shape_of(example: Any) -> Any:
    """A fake of an input: nothing that is computed in a step may live as long as a plan."""
    if isinstance(example, nn.Parameter):
        return example
    with torch._guards.tracing(None), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            return fake(example, hint)
        except (NotImplementedError, RuntimeError):  # it has no strides: nothing is predicted then
            return None


def _dry(graph: fx.GraphModule, choice: str) -> Callable[..., Any]:
    """What keeps for backward the tensors that ``choice`` will, without compiling anything."""
    if choice == "eager":
        return run.eager(graph)
    return run.partitioned(graph)


def setting(
    planner: Planner, examples: Sequence[Any], choice: str, checkpointed: bool
) -> PlanInputs:
    """What a plan is made for; ``checkpointed``: the user asked for it, so no block keeps all."""
    # a gradient and two states for each: AdamW, and what most others have
    parameters = planner.trainable()
    training = sum((2 + (p.grad is None)) * p.nbytes for p in parameters)
    on_cpu = planner.meter.device.type == "cpu"
    if on_cpu:
        training += compilation_bytes(choice)
    limit = planner.budget.bytes
    if planner.budget.mode == "auto":
        capacity = planner.meter.capacity()
        limit = None if capacity is None else int(_SPARE * capacity)
    levels = planner.allowed
    if checkpointed:
        levels = tuple(v for v in levels if v not in ("weights", "all"))
    host = int(_HOST * planner.meter.host())
    base, (head, logits) = planner.meter.used(), _head(planner, examples)
    slack = _SLACK if on_cpu else 0.0
    tiles = most_logits(on_cpu)
    return PlanInputs(base, training, head, limit, levels, host, logits, slack, tiles)


def _head(planner: Planner, examples: Sequence[Any]) -> tuple[int, int]:
    """Bytes that the head and its loss hold at one time, and of all logits."""
    # held are four hidden states: after the final norm, their gradient, and both before it, which
    # may be in fp32
    shapes = (
        [hint(s) for s in e.shape]
        for e in examples
        if isinstance(e, Tensor) and not isinstance(e, nn.Parameter) and e.is_floating_point()
    )
    largest = max(shapes, key=prod, default=[0, 0])
    model = planner.model()
    matrices = (p.shape[0] for p in model.parameters() if p.dim() == 2) if model else ()
    # logits and their gradient, in fp32, of the largest matrix that could be the vocabulary's
    return 12 * prod(largest), 8 * prod(largest[:-1]) * max(matrices, default=0)
