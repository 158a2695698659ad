"""Applying the plan to a block's graph, and making it when the first one is captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..passes.memory import is_checkpointed, keep
from .planner import Planner
from .predictions import setting, usages


def planned(
    planner: Planner, block: nn.Module, graph: fx.GraphModule, examples: Sequence[Any], choice: str
) -> fx.GraphModule:
    """The graph that keeps for backward what the plan says.

    Args:
        planner: of the session.
        block: whose graph it is.
        graph: the rewritten graph.
        examples: its inputs, as Dynamo gave them.
        choice: what will run it: ``"eager"`` or ``"inductor"``.

    Raises:
        OptimizeError: no plan fits into the user's budget.
    """
    if inside_checkpoint() or planner.budget.mode == "speed":
        return graph  # a checkpoint around the block keeps no more than its input anyway
    level = planner.level(block)
    if planner.budget.mode in ("auto", "bytes") and block in planner.blocks:
        own = planner.usages(block) or usages(graph, examples, choice)
        made = setting(planner, examples, choice, is_checkpointed(graph))
        level = planner.plan(block, own, made)
    return keep(graph, level or "all")


def inside_checkpoint() -> bool:
    """Whether the block runs in somebody else's checkpoint, or is run again by one in backward."""
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
