"""Applying the plan to a block's graph, and making it when the first one is captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..graph.effects import Effects
from .levels import HOSTED, allowed, has_formulas, keep, why_not
from .planner import Planner
from .predict import Predicted, setting


def planned(
    planner: Planner, block: nn.Module, effects: Effects, examples: Sequence[Any], choice: str
) -> fx.GraphModule:
    """The rewritten graph, which ``choice`` will run, changed to keep what the plan says.

    Raises:
        OptimizeError: no plan fits into the user's budget.
    """
    graph = effects.module
    if inside_checkpoint():
        return graph  # a checkpoint around the block keeps no more than its input anyway
    checkpointed = any(n.graph is graph.graph for n in effects.checkpoints)
    if planner.budget.mode == "speed" and checkpointed:
        return graph
    reason = why_not(effects)
    if reason is not None:
        planner.note(f"a block runs once, and keeps what it did: {reason}")
        return graph
    planner.unpacks = planner.unpacks or has_formulas(graph)
    level = planner.level(block)
    if planner.budget.mode in ("auto", "bytes") and _is_whole(planner, block):
        planner.blocks.add(block)  # one of a copy of the model is new
        predicted = Predicted(graph, examples, choice, planner.note, planner.offload.least)
        level = planner.plan(block, predicted, setting(planner, examples, choice, checkpointed))
    level = level or "all"
    can = allowed(choice, host=True, formulas=True)
    result = keep(graph, level if level in can else allowed(choice)[0], choice)
    result.meta[_LEAVES] = level in HOSTED
    return result


_LEAVES = "fusewright_leaves"
"""In the ``meta`` of a graph: whether the block's input goes to the host."""


def offloaded(
    planner: Planner, graph: fx.GraphModule, run: Callable[..., Any]
) -> Callable[..., Any]:
    """``run`` of a ``planned`` graph, which keeps its input where the plan says."""
    return planner.offload.around(run) if graph.meta.get(_LEAVES) else run


def _is_whole(planner: Planner, block: nn.Module) -> bool:
    """Whether it is a block, and no part of one that could not be captured."""
    return not any(block is not b and block in set(b.modules()) for b in planner.blocks)


def inside_checkpoint() -> bool:
    """Whether the block runs in somebody else's checkpoint, or is run again by one in backward."""
    if in_backward():
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")


def in_backward() -> bool:
    """Whether a backward pass is under way, in which a checkpoint runs again what it surrounds."""
    return torch._C._current_graph_task_id() != -1
