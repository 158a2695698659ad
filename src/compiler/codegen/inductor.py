"""A rewritten graph compiled with Inductor."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, cast

import torch
import torch._functorch.config as _functorch
from torch import Tensor, fx
from torch.autograd.graph import get_gradient_edge

from ...graph import facts
from ...graph.effects import Effects
from ...graph.run import without_advice
from ...kernels.processor import processor
from ...rewrite.conditions import settings_around
from ..ranks.compile_lock import first_one_compiles
from ..ranks.verdicts import called, environment, has_native_kernels, versions
from ..sharing import UnfrozenWeight
from ..unit import Run, Unit
from .cpp_compiler import headers_for_new_kernels, is_proven, kernels_awaited_last

_logger = logging.getLogger(__name__)


def _disable_donation() -> None:
    """Say that backward may overwrite no saved tensor."""
    # without donation (see ``inductor``) the list is never made, and torch 2.13 takes a missing one
    # for one that is not empty when a graph is retained
    context = torch._guards.TracingContext.try_get()
    metadata = None if context is None else context.fw_metadata
    if metadata is not None and getattr(metadata, "bw_donated_idxs", ()) is None:
        metadata.bw_donated_idxs = []


def _draw_in_order(nodes: list[Any]) -> list[Any]:
    """A pass of Inductor's scheduler: draw random numbers in the order of the graph."""
    # Inductor moves each to where it saves memory: torch 2.13 those of a checkpoint, whose state is
    # kept for backward, and torch 2.11 all of them.
    from torch._inductor.dependencies import WeakDep
    from torch._inductor.ir import FallbackKernel

    # the kernels, and not what takes their outputs apart
    kernels = (n for n in nodes if isinstance(getattr(n, "node", None), FallbackKernel))
    drawing = [n for n in kernels if any(map(_is_random, n.node.get_origins()))]
    for before, after in itertools.pairwise(drawing):
        name, buffer = (next(iter(n.get_buffer_names())) for n in (before, after))
        after.add_fake_dep(WeakDep(name, mutating_buf=buffer, is_fake=True))
    if len(drawing) > 1:
        drawing[0].scheduler.compute_ancestors()  # which fusion asks for
    return nodes


def _is_random(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "rng_state" in node.target.name()
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _patches(module: fx.GraphModule) -> dict[str, Any]:
    """Settings of Inductor with which a graph draws eager's random numbers."""
    # a checkpointed block may run eager first and compiled again
    if len(Effects(module).draws) < 2:
        return {"fallback_random": True}
    return {
        "fallback_random": True,
        "_pre_fusion_custom_pass": _draw_in_order,  # not a part of the key of Inductor's cache
        "reorder_for_peak_memory": False,
        "reorder_for_locality": False,
    }


@contextlib.contextmanager
def _as_in_every_process(module: fx.GraphModule) -> Iterator[None]:
    """While it lasts, a graph has the key in AOTAutograd's cache that it has in other processes."""
    # PyTorch leaves what is one process's own out of the key, but of the outermost graph alone,
    # and with a checkpoint around the block the captured graph is a nested one. Nor does it look at
    # the functions that a nested one calls: it has their names. What ours do when they are traced
    # depends on sources and settings, and what has no version is not looked for.
    inner = [m for m in module.modules() if isinstance(m, fx.GraphModule) and m is not module]
    others = versions(called(n for m in inner for n in m.graph.nodes))
    about = environment(), processor(), torch.get_num_threads(), has_native_kernels(), others
    before = [(m, {n: vars(m)[n] for n in _OF_ONE_PROCESS if n in vars(m)}) for m in inner]
    for m, fields in before:
        kept = {n: v for n, v in m.meta.items() if n == "_checkpoint_context_fn"}
        vars(m).update(dict.fromkeys(fields), meta=kept)
    vars(module)["environment"] = f"{about} {settings_around()}"
    try:
        with nullcontext() if others is not None else _functorch.patch(enable_autograd_cache=False):
            yield
    finally:
        for m, fields in before:
            vars(m).update(fields)


_OF_ONE_PROCESS = ("meta", "compile_subgraph_reason", "_param_name_to_source", "_backend_id")


def compiled_block(unit: Unit) -> Run:
    """Compile the graph of a block with Inductor; ``unit.notes`` says what its inputs need."""
    notes = unit.notes
    inputs = [t.detach() if i in notes.detached else t for i, t in enumerate(unit.examples)]
    placeholders = unit.graph.graph.find_nodes(op="placeholder")
    for i in notes.copied:  # whose copies have other strides, if they are no dense memory
        t: Any = facts.tensor(placeholders[i])
        inputs[i] = t.detach().clone().requires_grad_(inputs[i].requires_grad)
    _logger.info(
        "Inductor compiles a graph of %d operations; other sizes or settings may need another",
        len(unit.graph.graph.nodes),
    )
    absent = AbsentGradients(notes.inputs_of_outputs)
    settings = {"triton.cudagraphs": True} if unit.choices.options.cuda_graphs else {}
    run = inductor(unit.graph, inputs, unit.call.preparation, absent, settings)
    return _of_frozen(_with_detached(run, notes.detached), unit.examples)


def _with_detached(run: Run, places: Sequence[int]) -> Run:
    """``run`` with its arguments at ``places`` detached."""
    if not places:
        return run

    def call(*args: Any) -> Any:
        inputs = list(args)
        for i in places:
            inputs[i] = args[i].detach()
        return run(*inputs)

    return call


def _of_frozen(run: Run, examples: Sequence[Any]) -> Run:
    """``run``, a compiled graph, which refuses inputs that need a gradient and needed none."""
    # it would give them none, and TorchDynamo 2.11 does not ask whether a weight needs one now
    frozen = [i for i, t in enumerate(examples) if isinstance(t, Tensor) and not t.requires_grad]

    def call(*args: Any) -> Any:
        if any([args[i].requires_grad for i in frozen]) and torch.is_grad_enabled():
            raise UnfrozenWeight(
                "a weight needs a gradient and needed none when the block was compiled: call "
                "restore and optimize after weights are unfrozen, or use a newer PyTorch"
            )
        return run(*args)

    return call


def inductor(
    module: fx.GraphModule,
    examples: Sequence[Any],
    preparation: threading.Thread | None = None,
    absent: AbsentGradients | None = None,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., Any]:
    """Compile the graph with Inductor; our ops are traced through or called as they are.

    ``preparation``, from ``cpp_compiler.prepare``, is waited for as late as possible; ``absent``
    finds the gradients that eager mode does not have; ``settings`` are Inductor's.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def compile_prepared(*args: Any, **kwargs: Any) -> Any:
        if preparation is not None:
            preparation.join()
        _disable_donation()
        with first_one_compiles(*args[:2]):
            return compile_fx_inner(*args, **kwargs)

    if preparation is not None and is_proven():
        preparation.join()  # soon; what it finds loads kernels that are there
    # Donated buffers would forbid a second backward over a retained graph, which eager allows.
    with (
        _functorch.patch(donated_buffer=False),
        _as_in_every_process(module),
        without_advice(),
        headers_for_new_kernels(),
        nullcontext() if preparation is None else kernels_awaited_last(),
    ):
        compiled = compile_fx(
            module,
            list(examples),
            inner_compile=compile_prepared,
            config_patches={**_patches(module), **settings},
        )
    run = cast("Callable[..., Any]", compiled)
    return _with_checked_backward(run, absent or AbsentGradients(None))


def _with_checked_backward(
    compiled: Callable[..., Any], absent: AbsentGradients
) -> Callable[..., Any]:
    """Give no gradients where none come in, as eager; refuse to be differentiated, with advice."""

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        # an output that is an input has the node of whatever made it
        others = {None, *(t.grad_fn for t in args if isinstance(t, Tensor))}
        for node in {t.grad_fn for t in outputs if isinstance(t, Tensor)} - others:
            assert node is not None
            node.register_hook(absent.hook(node, args, outputs))
            node.register_hook(_refuse_second_backward)
        return outputs

    return run


def _refuse_second_backward(
    grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    if not torch.is_grad_enabled():
        return None
    return tuple(g if g is None else _NoDoubleBackward.apply(g) for g in grad_inputs)  # type: ignore[no-untyped-call]


class _NoDoubleBackward(torch.autograd.Function):
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


# --- where eager mode has no gradient -------------------------------------------------------------
#
# A compiled graph has none there either: None is not zeros. An optimizer decays a weight whose
# gradient is zero, and leaves one without a gradient alone.

Hook = Callable[[tuple[Any, ...], tuple[Any, ...]], "tuple[Any, ...] | None"]


class AbsentGradients:
    """Finds the inputs that get no gradient in a backward pass of a compiled graph."""

    # AOTAutograd treats a missing gradient of an output as zeros, and returns zeros

    def __init__(self, inputs: Sequence[frozenset[int]] | None) -> None:
        """Take ``Effects.inputs_of_outputs``."""
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
