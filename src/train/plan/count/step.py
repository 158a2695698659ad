"""One training step of a model on fake tensors: what its blocks keep, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ....compiler.options import Codegen
from ....compiler.pipeline import explain, optimize, planner_of
from ....errors import ModelError
from ....memory.choice import PlanInputs, Usages
from ....passes import PIPELINE
from ...model.load import quiet
from ...recipe.recipe import Recipe
from .blueprint import Blueprint, kind_of


@dataclass(frozen=True)
class Step:
    """What a step of one micro batch takes.

    Attributes:
        usages: of each block of the blueprint, by its path.
        setting: what the head needs, and what the allocator and the compiler take besides.
        rewrites: how many formulas of the blueprint's blocks and head are rewritten, by rule.
        tokens: of the micro batch that was counted.
    """

    usages: Mapping[str, Usages]
    setting: PlanInputs
    rewrites: Mapping[str, int]
    tokens: int


def take(blueprint: Blueprint, recipe: Recipe, codegen: Codegen) -> Step:
    """Run one step of the blueprint on fake tensors.

    Args:
        blueprint: its model's tensors become fake ones.
        recipe: says how large a micro batch is.
        codegen: what would run the graphs.

    Raises:
        ModelError: the model cannot run on tensors without contents.
    """
    model, (rows, length) = blueprint.model, (recipe.micro_batch_size, recipe.sequence_len)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, quiet():
        _make_fake(model)
        passes = PIPELINE if recipe.optimize else ()
        optimize(model, codegen=codegen, memory="auto", passes=passes)
        ids = torch.zeros(rows, length, dtype=torch.long)
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        except Exception as error:  # a model's own code raises anything
            raise ModelError(f"the model cannot be planned without its weights: {error}") from error
    planner = planner_of(model)
    outlook = None if planner is None else planner.outlook(1.0)
    if planner is None or outlook is None:
        raise ModelError("none of the model's blocks was captured, so that nothing can be planned")
    known = {kind_of(block): usages for block, usages in planner.usages()}
    any_known = next(iter(known.values()))
    return Step(
        {path: known.get(kind_of(b), any_known) for path, b in blueprint.blocks.items()},
        outlook[1],
        explain(model).by_rule(),
        rows * length,
    )


def _make_fake(model: nn.Module) -> None:
    """Put fake tensors of the CPU in the place of those of the meta device; under a fake mode."""
    made: dict[int, Tensor] = {}

    def fake(t: Tensor) -> Tensor:
        if id(t) not in made:
            empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
            is_parameter = isinstance(t, nn.Parameter)
            made[id(t)] = nn.Parameter(empty, t.requires_grad) if is_parameter else empty
        return made[id(t)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            tensors: dict[str, Any] = own
            tensors.update({k: fake(t) for k, t in tensors.items() if t is not None})
