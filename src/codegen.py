"""What runs a rewritten graph: eager PyTorch, or Inductor."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from .graph import facts, modes
from .kernels.launch import has_triton

_WORTH = 10_000_000
"""Parameters in the blocks above which Inductor's seconds of compilation are soon earned back."""


def choose(codegen: str, blocks: Sequence[nn.Module]) -> tuple[str, str]:
    """Decide what runs the leftovers of the blocks' graphs.

    Args:
        codegen: the user's choice: ``"auto"``, ``"eager"`` or ``"inductor"``.
        blocks: the decoder blocks of the model.

    Returns:
        ``"eager"`` or ``"inductor"``, and the reason.
    """
    if codegen != "auto":
        return codegen, "as asked"
    if not blocks:
        return "eager", "the model has no repeated blocks"
    size = sum(p.numel() for b in blocks for p in b.parameters())
    if size < _WORTH:
        return "eager", f"the blocks have only {size / 1e6:.1f} M parameters"
    device = next((p.device for b in blocks for p in b.parameters()), torch.device("cpu"))
    missing = _missing_compiler(device)
    if missing:
        return "eager", missing
    return "inductor", "one compilation serves all blocks"


def _missing_compiler(device: torch.device) -> str:
    if device.type == "cpu":
        found = any(shutil.which(c) for c in ("g++", "clang++", "c++"))
        return "" if found else "no C++ compiler was found (g++ or clang++)"
    return "" if has_triton() else "Triton is not installed"


def prepare(module: nn.Module) -> threading.Thread | None:
    """Start what Inductor must know before its first kernel for the CPU, in the background.

    It finds the vector instructions by test programs, six runs of the C++ compiler one after the
    other: as many seconds, which pass beside the capture instead of after it.

    Args:
        module: a captured module; its device decides.

    Returns:
        The thread to wait for before ``inductor``, or None if there is nothing to prepare.
    """
    if any(p.device.type != "cpu" for p in module.parameters()):
        return None
    # imported here: two threads that import PyTorch's packages, which are cyclic, can fail
    from torch._inductor import compile_fx, cpu_vec_isa  # noqa: F401

    def probe() -> None:
        with contextlib.suppress(Exception):  # what fails here fails again, and is told, in use
            cpu_vec_isa.pick_vec_isa()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    return thread


def eager(module: fx.GraphModule) -> Callable[..., Any]:
    """Run the graph node by node, under ordinary autograd.

    Checkpointed parts are only tagged in a captured graph; here they are checkpointed for real.
    """
    placeholders = module.graph.find_nodes(op="placeholder")
    _checkpoint(module, {n for n in placeholders if not facts.is_argument(n)})
    modes.restored_on_error(module)
    return module.forward


def _checkpoint(module: fx.GraphModule, held: set[fx.Node]) -> None:
    """Let the checkpoints in ``module``, and in the graphs within it, be real ones.

    Args:
        module: the graph.
        held: those of its placeholders that stand for what a module holds.
    """
    for node in module.graph.nodes:
        is_checkpoint = node.target is torch.ops.higher_order.tag_activation_checkpoint
        for inner in filter(None, map(facts.body, node.all_input_nodes)):
            own = zip(inner.graph.find_nodes(op="placeholder"), node.args[1:], strict=False)
            _checkpoint(inner, {p for p, given in own if is_checkpoint and given in held})
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
def _no_advice() -> Iterator[None]:
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
            with functorch_config.patch(force_non_lazy_backward_lowering=True), _no_advice():
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


def _donate_nothing() -> None:
    """Say that backward may overwrite no saved tensor.

    Without donation (see ``inductor``) the list is never made, and torch 2.13 takes a missing one
    for one that is not empty when a graph is retained.
    """
    context = torch._guards.TracingContext.try_get()
    known = None if context is None else context.fw_metadata
    if known is not None and getattr(known, "bw_donated_idxs", ()) is None:
        known.bw_donated_idxs = []


def inductor(
    module: fx.GraphModule, examples: Sequence[Any], preparation: threading.Thread | None = None
) -> Callable[..., Any]:
    """Compile the graph with Inductor; our ops are traced through or called as they are.

    Args:
        module: the graph.
        examples: its inputs, as Dynamo gave them.
        preparation: what ``prepare`` returned; waited for as late as possible.
    """
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def prepared(*args: Any, **kwargs: Any) -> Any:
        if preparation is not None:
            preparation.join()
        _donate_nothing()
        return compile_fx_inner(*args, **kwargs)

    # donated buffers would forbid a second backward over a retained graph, which eager allows
    with functorch_config.patch(donated_buffer=False), _no_advice():
        # eager's random numbers: a checkpointed block may run eager first and compiled again
        compiled = compile_fx(
            module,
            list(examples),
            inner_compile=prepared,
            config_patches={"fallback_random": True},
        )
    return _explaining(cast("Callable[..., Any]", compiled))


def _explaining(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Let what goes wrong when its backward pass is differentiated say what to do instead."""

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        for node in {t.grad_fn for t in outputs if isinstance(t, Tensor)}:
            if node is not None:
                node.register_hook(_explained)
        return outputs

    return run


def _explained(grad_inputs: tuple[Any, ...], _: Any) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled():
        return None
    return tuple(g if g is None else _CompiledOnce.apply(g) for g in grad_inputs)  # type: ignore[no-untyped-call]


class _CompiledOnce(torch.autograd.Function):
    """The identity, of a gradient that compiled code has made."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "the backward pass of a compiled block cannot be differentiated. For gradients of "
            "gradients (create_graph=True), use fusewright.optimize(model, codegen='eager'), or "
            "call fusewright.restore(model) first."
        )
