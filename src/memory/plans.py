"""Applying the plan to a block's graph, and making it when the first one is captured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from ..passes.memory import is_checkpointed, keep
from .planner import Planner, Setting, Usages, peak
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
    if inside_checkpoint():
        return graph  # a checkpoint around the block keeps no more than its input anyway
    if planner.budget.mode == "speed" and is_checkpointed(graph):
        return graph
    level = planner.level(block)
    if planner.budget.mode in ("auto", "bytes") and block in planner.blocks:
        made = setting(planner, examples, choice, is_checkpointed(graph))
        level = planner.plan(block, _usages(planner, block, graph, examples, choice, made), made)
    return keep(graph, level or "all")


def _usages(
    planner: Planner, block: nn.Module, graph: fx.GraphModule, examples: Sequence[Any], choice: str,
    made: Setting,
) -> Usages:  # fmt: skip
    """What the block takes: of every level, or of the fastest alone where memory is no question.

    Dividing a graph as Inductor does takes seconds, running it on fake tensors does not.
    """
    known = planner.usages(block)
    if known is None and planner.budget.mode == "auto":
        rough = usages(graph, examples, "eager", (made.fastest,))
        blocks = len(planner.blocks)
        rough_peak = peak([made.fastest] * blocks, [rough] * blocks, made)
        if made.budget is None or _AMPLE * rough_peak <= made.budget:
            return rough
    return known or usages(graph, examples, choice)


_AMPLE = 1.5
"""How much more memory than a rough estimate of a step there must be to plan no closer."""


def inside_checkpoint() -> bool:
    """Whether the block runs in somebody else's checkpoint, or is run again by one in backward."""
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and "_checkpoint_hook" in getattr(hooks[0], "__qualname__", "")
