"""The courses of the learning rate that transformers has no name for."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .recipe import Recipe


def own_schedule(
    recipe: Recipe, optimizer: Optimizer, warmup: int, total: int
) -> LRScheduler | None:
    """The schedule of ``recipe`` if it is one of ours; None: transformers has it.

    Args:
        recipe: the recipe.
        optimizer: whose learning rates are set.
        warmup: steps of warm-up.
        total: steps of the run.
    """
    if recipe.lr_scheduler == "one_cycle":
        options = {"div_factor": recipe.lr_div_factor or 25.0, **(recipe.lr_scheduler_kwargs or {})}
        if warmup:
            options.setdefault("pct_start", warmup / total)
        # Adam's momentum stays as the recipe says; and the last step asks for one rate more
        options.setdefault("cycle_momentum", False)
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=rates, total_steps=total + 1, **options)
    floor, until = recipe.cosine_min_lr_ratio, recipe.cosine_constant_lr_ratio
    if recipe.lr_scheduler == "cosine" and (
        floor is not None or until is not None or recipe.lr_quadratic_warmup
    ):
        end = max(warmup + 1, round(total * (1.0 if until is None else until)))
        return _cosine(optimizer, warmup, end, floor or 0.0, recipe.lr_quadratic_warmup)
    return None


def _cosine(
    optimizer: Optimizer, warmup: int, end: int, floor: float, quadratic: bool
) -> LRScheduler:
    """Warm up, fall along half a cosine to ``floor`` at step ``end``, and stay there."""

    def factor(step: int) -> float:
        if step < warmup:
            grown = step / warmup
            return grown * grown if quadratic else grown
        progress = min(1.0, (step - warmup) / (end - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
