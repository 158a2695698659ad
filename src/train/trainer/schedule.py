"""Learning rate schedules that transformers has no name for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR
from transformers import TrainingArguments, get_scheduler

from ...errors import RecipeError
from ..recipe.recipe import Recipe


def try_schedule(recipe: Recipe, args: TrainingArguments) -> None:
    """Make the schedule once, because only it knows its arguments; RecipeError if it fails."""
    if any(isinstance(v, list) for v in (recipe.lr_scheduler_kwargs or {}).values()):
        return  # one for each group of parameters, which are not known yet
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=recipe.learning_rate)
    warmup, total = args.get_warmup_steps(args.max_steps), args.max_steps
    try:
        if custom_schedule(recipe, optimizer, warmup, total) is None:
            get_scheduler(
                args.lr_scheduler_type, optimizer, warmup, total,
                scheduler_specific_kwargs=recipe.lr_scheduler_kwargs,
            )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"lr_scheduler: {recipe.lr_scheduler} cannot be created with lr_scheduler_kwargs "
            f"{recipe.lr_scheduler_kwargs or {}}: {error}"
        ) from error


def custom_schedule(
    recipe: Recipe, optimizer: Optimizer, warmup: int, total: int
) -> LRScheduler | None:
    """The schedule of ``recipe`` for ``warmup`` and ``total`` steps; None: transformers has it."""
    if recipe.jagged_restart_steps:
        return _restarted(recipe, optimizer, warmup, total)
    return _single(recipe, optimizer, warmup, total)


def follow(schedule: Any) -> None:
    """Set the rates of a schedule that is longer than that of the checkpoint it was loaded from.

    Those that the losses decide (``reduce_lr_on_plateau``, ``greedy``) have no length.
    """
    schedule = getattr(schedule, "scheduler", schedule)  # accelerate may have wrapped it
    if not isinstance(schedule, LambdaLR):
        return
    bases = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    rates = [base * factor(schedule.last_epoch) for base, factor in bases]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def _restarted(recipe: Recipe, optimizer: Optimizer, warmup: int, total: int) -> LRScheduler:
    """Decay before each restart, warm up after it, as ReLoRA; ValueError without rates by step."""
    inner = _single(recipe, optimizer, warmup, total) or get_scheduler(
        recipe.lr_scheduler, optimizer, warmup, total,
        scheduler_specific_kwargs=recipe.lr_scheduler_kwargs,
    )  # fmt: skip
    if not isinstance(inner, LambdaLR):
        raise ValueError("jagged_restart_steps needs a schedule that only depends on the step")
    every = recipe.jagged_restart_steps or 1
    rise = recipe.jagged_restart_warmup_steps or 0
    fall = recipe.jagged_restart_anneal_steps or 1

    def share(step: int) -> float:
        progress = step % every
        if step < every - fall:  # the schedule's own warm-up
            return 1.0
        if progress < rise:
            part = progress / rise
        elif progress > every - fall:
            part = (every - progress) / fall
        else:
            part = 1.0
        return _LEAST + (1 - _LEAST) * part

    def scaled(rate: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: rate(step) * share(step)

    return LambdaLR(optimizer, [scaled(factor) for factor in inner.lr_lambdas])


_LEAST = 0.001
"""The fraction of the learning rate that a restart begins with."""


def _single(recipe: Recipe, optimizer: Optimizer, warmup: int, total: int) -> LRScheduler | None:
    if recipe.lr_scheduler == "one_cycle":
        options = {"div_factor": recipe.lr_div_factor or 25.0, **(recipe.lr_scheduler_kwargs or {})}
        if warmup:
            options.setdefault("pct_start", warmup / total)
        # Adam's momentum stays as in the recipe; and the last step asks for one rate more
        options.setdefault("cycle_momentum", False)
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, max_lr=rates, total_steps=total + 1, **options)
    floor, until = recipe.cosine_min_lr_ratio, recipe.cosine_constant_lr_ratio
    if recipe.eta_min is not None:
        floor = recipe.eta_min / recipe.learning_rate
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
