"""Running a graph without compiling it: node by node, or divided as Inductor would divide it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.utils.checkpoint import checkpoint

from . import facts, modes
from .opaque.autograd_calls import free_in_backward


def eager(module: fx.GraphModule) -> Callable[..., Any]:
    """Run the graph node by node, under ordinary autograd.

    Checkpointed parts are only tagged in a captured graph; here they are checkpointed for real.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    _prepare(module, {n for n in placeholders if not facts.is_argument(n)})
    modes.restored_on_error(module)
    # a lazy module would be asked at each call whether its code is written
    _LazyGraphModule.force_recompile(module)
    return module.forward


def _prepare(module: fx.GraphModule, held: set[fx.Node]) -> None:
    """Replace what stands for checkpoints and autograd functions in ``module`` by what runs them.

    So in the graphs within it, too.

    Args:
        module: the graph.
        held: those of its placeholders that stand for what a module holds.
    """
    free_in_backward(module.graph)
    for node in module.graph.nodes:
        is_checkpoint = node.target is torch.ops.higher_order.tag_activation_checkpoint
        for inner in filter(None, map(facts.body, node.all_input_nodes)):
            own = zip(inner.graph.find_nodes(op="placeholder"), node.args[1:], strict=False)
            _prepare(inner, {p for p, given in own if is_checkpoint and given in held})
        if is_checkpoint:
            node.target = _checkpointed
            where = tuple(i for i, given in enumerate(node.args[1:]) if given in held)
            node.kwargs = {**node.kwargs, "held": where}
    module.recompile()


def _checkpointed(
    body: Callable[..., Any], *args: Any, held: tuple[int, ...] = (), **kwargs: Any
) -> Any:
    """``torch.utils.checkpoint`` of a nested graph, whichever variant the user had asked for.

    The arguments at the places ``held`` were none in the user's code, where its function reads them
    from its module. So the checkpoint does not keep them: it would refuse a buffer that is written.
    """
    kept = {
        k: v for k, v in kwargs.items() if k in ("preserve_rng_state", "determinism_check", "debug")
    }
    chosen = getattr(body, "meta", {}).get("_checkpoint_context_fn")  # what it keeps nevertheless
    if chosen is not None:
        kept["context_fn"] = chosen
    own, count = {i: args[i] for i in held}, len(args)

    def run(*others: Any) -> Any:
        rest = iter(others)
        return body(*(own[i] if i in own else next(rest) for i in range(count)))

    others = [a for i, a in enumerate(args) if i not in own]
    return checkpoint(run, *others, use_reentrant=False, **kept)


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
    """Run the graph as Inductor would divide it into forward and backward, without compiling it.

    What is kept between the two is then the same.
    """
    import torch._functorch.config as functorch_config
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def as_it_is(graph: fx.GraphModule, example_inputs: Any) -> Any:
        def run(values: list[Any]) -> Any:
            return graph.forward(*values)

        run.__dict__["_boxed_call"] = True  # PyTorch asks for it: takes its arguments in a list
        return run

    made: list[Callable[..., Any]] = []

    def run(*args: Any) -> Any:
        if not made:
            # both directions at once: inside a compilation none can be put off to the backward call
            with functorch_config.patch(force_non_lazy_backward_lowering=True), without_advice():
                made.append(
                    aot_module_simplified(
                        module,
                        list(args),
                        fw_compiler=as_it_is,  # type: ignore[arg-type]  # 2026-11-25: any callable
                        partition_fn=min_cut_rematerialization_partition,
                        decompositions=select_decomp_table(),
                    )
                )
        return made[0](*args)

    return run
