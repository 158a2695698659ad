"""Where eager mode has no gradient, a compiled graph has none either: None is not zeros.

An optimizer decays a weight whose gradient is zero, and leaves one without a gradient alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Hook = Callable[[tuple[Any, ...], tuple[Any, ...]], "tuple[Any, ...] | None"]


class AbsentGradients:
    """Finds the inputs that get no gradient in a backward pass of a compiled graph."""

    # AOTAutograd treats a missing gradient of an output as zeros, and returns zeros

    def __init__(self, inputs: Sequence[frozenset[int]] | None) -> None:
        """Take the inputs, by number, of each output (from ``reach.py``); None: not known."""
        self._outputs: dict[int, set[int]] = {}
        if inputs is not None and len(set(inputs)) > 1:
            for output, of in enumerate(inputs):
                for i in of:
                    self._outputs.setdefault(i, set()).add(output)

    def hook(self, node: Any, args: Sequence[Any], outputs: Sequence[Any]) -> Hook:
        """The hook for ``node``, autograd's of a call with these ``args`` and ``outputs``."""
        # inputs with hooks keep their zeros: the hooks would be called, with None
        if not self._outputs:
            return _none_for_none
        numbers = {
            i: t.output_nr
            for i, t in enumerate(outputs)
            if isinstance(t, Tensor) and t.grad_fn is node
        }
        reached: dict[Any, set[int]] = {}
        tensors_of: dict[Any, list[weakref.ref[Tensor]]] = {}
        hooked = set()  # now: a tensor that is no leaf may be gone before the backward pass
        for i, t in enumerate(args):
            if isinstance(t, Tensor) and t.requires_grad:
                edge = tuple(get_gradient_edge(t)[:2])
                sources = {numbers[o] for o in self._outputs.get(i, ()) if o in numbers}
                reached.setdefault(edge, set()).update(sources)
                tensors_of.setdefault(edge, []).append(weakref.ref(t))
                hooked |= {edge} if t._backward_hooks else set()
        edges = node.next_functions
        inputs = [None if edge in hooked else reached.get(edge) for edge in edges]
        tensors = [tensors_of.get(edge, []) for edge in edges]
        known = frozenset(numbers.values())

        def none_for_none(
            grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]
        ) -> tuple[Any, ...] | None:
            present = {i for i, g in enumerate(grad_outputs) if g is not None}
            if not present or len(inputs) != len(grad_inputs) or not present <= known:
                return _none_for_none(grad_inputs, grad_outputs)
            return tuple(
                None
                if of is not None and not of & present and not any(map(_has_hooks, refs))
                else g
                for of, refs, g in zip(inputs, tensors, grad_inputs, strict=True)
            )

        return none_for_none


def _has_hooks(tensor: weakref.ref[Tensor]) -> bool:
    alive = tensor()
    return alive is not None and bool(alive._backward_hooks)


def _none_for_none(
    grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    if all(g is None for g in grad_outputs):
        return (None,) * len(grad_inputs)
    return None
