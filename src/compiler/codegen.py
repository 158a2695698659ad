"""What runs a rewritten graph: eager PyTorch, or Inductor."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..graph import facts
from ..graph.effects import draws
from ..graph.run import without_advice
from ..kernels.launch import has_triton
from .ranks.compile_lock import first_one_compiles

_MIN_PARAMETERS = 10_000_000
"""Parameters in the blocks above which Inductor's seconds of compilation are soon earned back."""


def choose(
    codegen: str, blocks: Sequence[nn.Module], elsewhere: str | None = None
) -> tuple[str, str]:
    """Decide what runs the leftovers of the blocks' graphs.

    Args:
        codegen: the user's choice: ``"auto"``, ``"eager"`` or ``"inductor"``.
        blocks: the decoder blocks of the model.
        elsewhere: the type of the device that will run them, where they are not on it: the CPU of
            this machine, or a GPU of another one, which is taken to have Triton.

    Returns:
        ``"eager"`` or ``"inductor"``, and the reason.
    """
    if codegen != "auto":
        return codegen, "as asked"
    if not blocks:
        return "eager", "the model has no repeated blocks"
    size = sum(p.numel() for b in blocks for p in b.parameters())
    if size < _MIN_PARAMETERS:
        return "eager", f"the blocks have only {size / 1e6:.1f} M parameters"
    device = next((p.device.type for b in blocks for p in b.parameters()), "cpu")
    missing = "" if elsewhere == "cuda" else _missing_compiler(elsewhere or device)
    if missing:
        return "eager", missing
    return "inductor", "one compilation serves all blocks"


def _missing_compiler(device: str) -> str:
    if device == "cpu":
        found = any(shutil.which(c) for c in ("g++", "clang++", "c++"))
        return "" if found else "no C++ compiler was found (g++ or clang++)"
    return "" if has_triton() else "Triton is not installed"


def prepare(module: nn.Module) -> threading.Thread | None:
    """Start what Inductor must have before its first kernel for the CPU, in the background.

    It finds the vector instructions by test programs, and compiles the headers that all kernels
    include: several seconds, which pass beside the capture instead of after it.

    Args:
        module: a captured module; its device decides.

    Returns:
        The thread to wait for before ``inductor``, or None if there is nothing to prepare.
    """
    if any(p.device.type != "cpu" for p in module.parameters()):
        return None
    # imported here: two threads that import PyTorch's packages, which are cyclic, can fail
    from torch._inductor import codecache, compile_fx, cpu_vec_isa  # noqa: F401

    probe = threading.Thread(target=_quietly, args=(_find_vector_instructions,), daemon=True)

    def compile_headers() -> None:
        probe.join()
        # a kernel's headers are compiled before its compilation is asked for, which it is not
        codecache.CppPythonBindingsCodeCache.load_async("// nothing", device_type="cpu")

    probe.start()
    threading.Thread(target=_quietly, args=(compile_headers,), daemon=True).start()
    return probe


def _quietly(run: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):  # what fails here fails again in use, with its message
        run()


def _find_vector_instructions() -> None:
    """Let Inductor try a program with the best vector instructions that the CPU has.

    It would try one with each kind that the CPU has, two seconds of the C++ compiler for each, and
    then take the best. Those that come after one that works are taken to work.
    """
    from torch._inductor import config, cpu_vec_isa

    known = cpu_vec_isa.x86_isa_checker()
    kinds = cpu_vec_isa.supported_vec_isa_list if known else ()
    found = any(isa for isa in kinds if all(flag in known for flag in str(isa).split()))
    with config.patch({"cpp.vec_isa_ok": True}) if found else contextlib.nullcontext():
        cpu_vec_isa.pick_vec_isa()


def _disable_donation() -> None:
    """Say that backward may overwrite no saved tensor.

    Without donation (see ``inductor``) the list is never made, and torch 2.13 takes a missing one
    for one that is not empty when a graph is retained.
    """
    context = torch._guards.TracingContext.try_get()
    known = None if context is None else context.fw_metadata
    if known is not None and getattr(known, "bw_donated_idxs", ()) is None:
        known.bw_donated_idxs = []


def _draw_in_order(nodes: list[Any]) -> list[Any]:
    """A pass of Inductor's scheduler: let random numbers be drawn in the order of the graph.

    Inductor moves each to where it saves memory: torch 2.13 those of a checkpoint, whose state is
    kept for backward, and torch 2.11 all of them.

    Args:
        nodes: of the scheduler, in an order in which they can run.
    """
    from torch._inductor.dependencies import WeakDep
    from torch._inductor.ir import FallbackKernel

    # the kernels, and not what takes their outputs apart
    kernels = (n for n in nodes if isinstance(getattr(n, "node", None), FallbackKernel))
    drawing = [n for n in kernels if any(map(_is_random, n.node.get_origins()))]
    for before, after in itertools.pairwise(drawing):
        name, own = (next(iter(n.get_buffer_names())) for n in (before, after))
        after.add_fake_dep(WeakDep(name, mutating_buf=own, is_fake=True))
    if len(drawing) > 1:
        drawing[0].scheduler.compute_ancestors()  # which fusion asks for
    return nodes


def _is_random(node: fx.Node) -> bool:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return "rng_state" in node.target.name()
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _patches(module: fx.GraphModule) -> dict[str, Any]:
    """Settings of Inductor with which a graph draws eager's random numbers.

    A checkpointed block may run eager first and compiled again.
    """
    drawn = sum(draws(n) for inner in facts.nested(module) for n in inner.graph.nodes)
    if drawn < 2:
        return {"fallback_random": True}
    return {
        "fallback_random": True,
        "_pre_fusion_custom_pass": _draw_in_order,  # not a part of the key of Inductor's cache
        "reorder_for_peak_memory": False,
        "reorder_for_locality": False,
    }


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

    def compile_prepared(*args: Any, **kwargs: Any) -> Any:
        if preparation is not None:
            preparation.join()
        _disable_donation()
        with first_one_compiles(*args[:2]):
            return compile_fx_inner(*args, **kwargs)

    # donated buffers would forbid a second backward over a retained graph, which eager allows
    with functorch_config.patch(donated_buffer=False), without_advice():
        compiled = compile_fx(
            module,
            list(examples),
            inner_compile=compile_prepared,
            config_patches=_patches(module),
        )
    return _with_checked_backward(cast("Callable[..., Any]", compiled))


def _with_checked_backward(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Let its backward pass give no gradients where none come in, as eager mode's does.

    What goes wrong when the pass is differentiated says what to do instead.
    """

    def run(*args: Any) -> Any:
        outputs = compiled(*args)
        for node in {t.grad_fn for t in outputs if isinstance(t, Tensor)}:
            if node is not None:
                node.register_hook(_check_backward)
        return outputs

    return run


def _check_backward(
    grad_inputs: tuple[Any, ...], grad_outputs: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    if all(g is None for g in grad_outputs):  # AOTAutograd takes that for zeros
        return (None,) * len(grad_inputs)
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
