"""Running a graph without compiling it: node by node, or divided as Inductor would divide it."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils.checkpoint import checkpoint

from . import facts
from .effects import CHECKPOINT, switches_mode
from .opaque.autograd_functions import free_in_backward


def eager(module: fx.GraphModule) -> Callable[..., Any]:
    """Run the graph node by node, under ordinary autograd."""
    # checkpointed parts are only tagged in a captured graph; here they are checkpointed for real
    placeholders = module.graph.find_nodes(op="placeholder")
    _prepare(module, {n for n in placeholders if not facts.is_argument(n)})
    restored_on_error(module)
    # a lazy module would be asked at each call whether its code is written
    _LazyGraphModule.force_recompile(module)
    return module.forward


def _prepare(module: fx.GraphModule, held: set[fx.Node]) -> None:
    """Replace checkpoints and autograd functions in ``module`` and within by what runs them."""
    # ``held`` are those of its placeholders that are what a module holds
    free_in_backward(module.graph)
    for node in module.graph.nodes:
        is_checkpoint = node.target is CHECKPOINT
        for inner in filter(None, map(facts.body, node.all_input_nodes)):
            pairs = zip(inner.graph.find_nodes(op="placeholder"), node.args[1:], strict=False)
            _prepare(inner, {p for p, arg in pairs if is_checkpoint and arg in held})
        if is_checkpoint:
            node.target = _checkpointed
            where = tuple(i for i, arg in enumerate(node.args[1:]) if arg in held)
            node.kwargs = {**node.kwargs, "held": where}
    module.recompile()


def _checkpointed(
    body: Callable[..., Any], *args: Any, held: tuple[int, ...] = (), **kwargs: Any
) -> Any:
    """``torch.utils.checkpoint`` of a nested graph, whichever variant the user had asked for."""
    # The arguments at the places ``held`` were none in the user's code, where its function reads
    # them from its module. The checkpoint does not keep them: it would refuse a buffer that is
    # written.
    options = {
        k: v for k, v in kwargs.items() if k in ("preserve_rng_state", "determinism_check", "debug")
    }
    # what it keeps nevertheless
    context_fn = getattr(body, "meta", {}).get("_checkpoint_context_fn")
    if context_fn is not None:
        options["context_fn"] = context_fn
    fixed, count = {i: args[i] for i in held}, len(args)

    def run(*others: Any) -> Any:
        rest = iter(others)
        return body(*(fixed[i] if i in fixed else next(rest) for i in range(count)))

    others = [a for i, a in enumerate(args) if i not in fixed]
    return checkpoint(run, *others, use_reentrant=False, **options)


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Without PyTorch's advice about in-place operations in checkpoints: graphs have none left."""
    logger = logging.getLogger("torch._higher_order_ops.wrap")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def partitioned(module: fx.GraphModule) -> Callable[..., Any]:
    """Run the graph as Inductor would divide it into forward and backward: it keeps the same."""
    import torch._functorch.config as functorch_config
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def as_it_is(graph: fx.GraphModule, example_inputs: Any) -> Any:
        def run(values: list[Any]) -> Any:
            return graph.forward(*values)

        run.__dict__["_boxed_call"] = True  # PyTorch asks for it: takes its arguments in a list
        return run

    memo: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not memo:
            # both directions at once: inside a compilation none can be put off to the backward call
            with functorch_config.patch(force_non_lazy_backward_lowering=True), without_advice():
                memo.append(
                    aot_module_simplified(
                        module,
                        list(args),
                        fw_compiler=as_it_is,  # type: ignore[arg-type]  # 2026-11-25: any callable
                        partition_fn=min_cut_rematerialization_partition,
                        decompositions=select_decomp_table(),
                    )
                )
        return memo[0](*args)

    return run


# --- leaving no mode switched when a graph raises -------------------------------------------------
#
# A captured ``with torch.autocast(...)`` is two calls in the graph, and nothing undoes the first
# when the code between them raises. A checkpoint's recomputation always ends so, as soon as it has
# what backward needs. An autocast that is never left keeps its casts of the weights: every later
# one in the process would use them, whatever the optimizer has written since.


class _Entered(threading.local):
    """What graphs have entered in this thread and not left yet, the innermost last."""

    def __init__(self) -> None:
        self.modes: list[Any] = []


_entered = _Entered()


@functools.cache
def _entering(enter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(enter)
    def run(*args: Any, **kwargs: Any) -> Any:
        mode = enter(*args, **kwargs)
        _entered.modes.append(mode)
        return mode

    return _as_ours(run)


@functools.cache
def _exiting(leave: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(leave)
    def run(mode: Any) -> None:
        leave(mode)
        _entered.modes[:] = [m for m in _entered.modes if m is not mode]

    return _as_ours(run)


def _as_ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, under a name of this module: else a graph's code would name what it wraps."""
    function.__module__ = __name__
    return function


def restored_on_error(module: fx.GraphModule) -> None:
    """Let ``module``, and the graphs in it, undo on an exception what they switched themselves."""
    switching = False
    for inner in module.children():
        if isinstance(inner, fx.GraphModule):
            restored_on_error(inner)
            switching = switching or "forward" in vars(inner)
    for node in filter(switches_mode, module.graph.nodes):
        switching = True
        name = node.target.__name__  # type: ignore[union-attr]
        if name.startswith("_enter_"):
            node.target = _entering(node.target)  # type: ignore[arg-type]
        elif name.startswith("_exit_"):
            node.target = _exiting(node.target)  # type: ignore[arg-type]
    if switching:
        module.recompile()
        module.forward = functools.partial(_run, module)


def _run(module: fx.GraphModule, *args: Any) -> Any:
    grad, depth = torch.is_grad_enabled(), len(_entered.modes)
    try:
        return type(module).forward(module, *args)
    except BaseException:
        while len(_entered.modes) > depth:
            _entered.modes.pop().__exit__(None, None, None)
        torch._C._set_grad_enabled(grad)
        raise
