"""Whether the code that calls captured blocks writes into their inputs: ``x += layer(x)``.

In low precision eager allows that: a norm keeps its own fp32 copy of x. Our ops, a compiler's and
a checkpoint keep x itself, and backward would refuse it. So where the code around a block may
write, by the look of it, its input is copied first. And so is an input that needs no gradient,
which only a stack's first block has: it may be a buffer that is filled again before backward, and
eager mode keeps nothing of it.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn

from ...graph import facts
from ...graph.effects import writes


def with_changed_inputs(
    run: Callable[..., Any], places: Sequence[int], change: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    """``run``, a region's graph, with ``change`` applied to its arguments at ``places``."""
    # at every call: that one step wrote nothing says nothing of the next one
    if not places:
        return run

    def call(*args: Any) -> Any:
        inputs = list(args)
        for i in places:
            inputs[i] = change(args[i])
        return run(*inputs)

    return call


def inputs_to_copy(module: fx.GraphModule, callers_write: bool) -> list[int]:
    """The inputs of a region's graph that its callers may write into when it has run.

    These are hidden states: what has a gradient, or, as those of the first block need not, three
    dimensions or the sizes of a result. They are neither parameters, nor written or returned by the
    graph itself. Unless the code around the region looks like writing (``callers_write``), they are
    only what needs no gradient and has the sizes of a result.
    """
    graph = module.graph
    protected = {m for n in graph.nodes for t in writes(n) for m in facts.memories(t)}
    results = [t for n in graph.output_node().all_input_nodes if (t := facts.tensor(n)) is not None]
    for n in graph.output_node().all_input_nodes:
        protected |= facts.memories(n)
    sizes = {str(t.shape) for t in results if t.requires_grad}

    def may_be_written(t: Tensor) -> bool:
        is_hidden = t.is_floating_point() and str(t.shape) in sizes
        if not callers_write:
            return is_hidden and not t.requires_grad
        return is_hidden or t.requires_grad or (t.is_floating_point() and t.dim() == 3)

    return [
        i
        for i, n in enumerate(graph.find_nodes(op="placeholder"))
        if (t := facts.tensor(n)) is not None
        and may_be_written(t)
        and not isinstance(t, nn.Parameter)
        and not facts.memories(n) & protected
    ]


def may_write(model: nn.Module | None, region: nn.Module | None) -> bool:
    """Whether code of ``model`` around modules of the region's class looks like writing."""
    if model is None or region is None:
        return False
    return any(_function_may_write(type(m), inspect.unwrap(type(m).forward))
               for m in _callers(model, type(region)))  # fmt: skip


def _callers(model: nn.Module, kind: type) -> Iterator[nn.Module]:
    """The modules of ``model`` that hold modules of this class: a copy's regions have it, too."""
    paths = {
        ".".join(parts[:end])
        for name, m in model.named_modules()
        if type(m) is kind
        for parts in [name.split(".")]
        for end in range(len(parts) if name else 0)
    }
    return (m for name, m in model.named_modules() if name in paths)


def _function_may_write(owner: type, function: Any) -> bool:
    """Whether a method, or a function of its module that it names, has a write in its code."""
    if not isinstance(function, types.FunctionType):
        return False
    if (function.__module__ or "").startswith(_WRAPPERS):  # a function of exec() is of no module
        return False
    if _writes_by_code(function.__code__):
        return True
    names, scope = function.__code__.co_names, function.__globals__
    functions = (inspect.getattr_static(owner, n, scope.get(n)) for n in names)
    return any(
        isinstance(f, types.FunctionType)
        and f.__module__ == function.__module__
        and _writes_by_code(inspect.unwrap(f).__code__)
        for f in functions
    )


_WRAPPERS = ("torch.", "peft.")
"""Whose modules around a model hand its hidden states on: PEFT's write into prompts and caches."""


def _writes_by_code(code: types.CodeType) -> bool:
    """Whether there is ``+=`` or the like, ``x[...] =``, or a name that ends in an underscore."""
    if any(n.endswith("_") and not n.endswith("__") for n in code.co_names):
        return True
    key: Any = None
    for step in dis.get_instructions(code):
        if step.opname == "STORE_SUBSCR" and not isinstance(key, str):  # that of a dictionary
            return True
        key = step.argval if step.opname == "LOAD_CONST" else None
        if step.opname == "BINARY_OP" and step.argrepr.endswith("="):
            return True
    return any(_writes_by_code(c) for c in code.co_consts if isinstance(c, types.CodeType))
