"""Copies of tensors that ops keep for backward and the graph, or its caller, writes into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ...graph import facts
from ...rewrite.copies import copy_what_is_written
from ..unit import Feature, Run, Unit


class SavedCopies(Feature):
    """Copy what an op keeps for backward before anything writes into it."""

    name = "saved_copies"

    def close(self, unit: Unit) -> None:
        """Copy what the graph writes into; note the inputs that the caller may write into."""
        open_to_writes = unit.grad and unit.kind != "head"
        copy_what_is_written(unit.effects, open_to_writes)
        unit.graph.recompile()
        if open_to_writes:
            unit.notes.copied = _hidden_states(unit)

    def wrap(self, unit: Unit, run: Run) -> Run:
        """Clone those inputs at each call: that one step wrote nothing says nothing of the next."""
        places: Sequence[int] = unit.notes.copied
        if not places:
            return run

        def call(*args: Any) -> Any:
            inputs = list(args)
            for i in places:
                inputs[i] = args[i].clone()
            return run(*inputs)

        return call


def _hidden_states(unit: Unit) -> list[int]:
    """The places of the inputs that are hidden states: the first input, and inputs like results."""
    # In low precision eager allows ``x += layer(x)``: a norm keeps its own fp32 copy of x. Our ops,
    # a compiler's and a checkpoint keep x itself, and backward would refuse it. Whether the caller
    # writes is not known; in fp32, too, it may write where backward does not pass the norm. But it
    # mostly goes on to the result, and lets x go. Then the copies keep no memory, and take 0.4 to
    # 1.2% of a step (SmolLM2-135M, 4 x 256, bfloat16, full training, 2 cores, 2026-11-29).
    # Inputs that all blocks of a stack share (masks, positions, an encoder's states) are not
    # copied: a result has at most one input of its size.
    graph, first = unit.graph.graph, unit.call.first_input
    inputs, outputs = graph.find_nodes(op="placeholder"), graph.output_node().all_input_nodes
    results = [t for t in map(facts.tensor, outputs) if t is not None and t.requires_grad]
    left = Counter(str(t.shape) for t in results)
    is_first = [first is not None and facts.real(node) is first for node in inputs]
    places = []
    for i in sorted(unit.effects.open_inputs, key=lambda i: not is_first[i]):
        size = str(getattr(facts.tensor(inputs[i]), "shape", None))
        if is_first[i] or left[size]:
            left[size] -= 1
            places.append(i)
    return places
