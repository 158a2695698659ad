"""What runs a rewritten graph: eager PyTorch, or Inductor."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from .graph import facts
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


def eager(module: fx.GraphModule) -> Callable[..., Any]:
    """Run the graph node by node, under ordinary autograd.

    Checkpointed parts are only tagged in a captured graph; here they are checkpointed for real.
    """
    for inner in facts.nested(module):
        for node in inner.graph.nodes:
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                node.target = _checkpointed
        inner.recompile()
    return module.forward


def _checkpointed(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``torch.utils.checkpoint`` of a nested graph, whichever variant the user had asked for."""
    kept = {
        k: v for k, v in kwargs.items() if k in ("preserve_rng_state", "determinism_check", "debug")
    }
    return checkpoint(body, *args, use_reentrant=False, **kept)


def inductor(module: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
    """Compile the graph with Inductor; our ops are traced through or called as they are."""
    import torch._functorch.config as functorch_config
    from torch._inductor.compile_fx import compile_fx

    # donated buffers would forbid a second backward over a retained graph, which eager allows
    with functorch_config.patch(donated_buffer=False):
        compiled = compile_fx(module, list(examples))
    return cast("Callable[..., Any]", compiled)
