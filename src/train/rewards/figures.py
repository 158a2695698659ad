"""The figures of completions that several rewards have judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def reward_figures(
    sets: Mapping[str, Tensor], names: Sequence[str], weights: Tensor
) -> dict[str, float]:
    """The mean reward of the completions of validation prompts, and what goes with it.

    Args:
        sets: of each dataset the rewards, (completions, rewards); NaN: not judged.
        names: of the rewards.
        weights: of the rewards, (rewards,).

    Returns:
        ``eval_reward`` and ``eval_reward_std`` of the weighted sums, ``eval_rewards/NAME/mean`` of
        each reward; and, of several datasets, ``eval_NAME_reward`` each.
    """
    everything = torch.cat(list(sets.values())).cpu().double()
    weights = weights.cpu().double()
    total = _total(everything, weights)
    judged = total[~total.isnan()]
    found = {"eval_reward": _mean(total), "eval_reward_std": float(judged.std(correction=0))}
    for i, name in enumerate(names):
        found[f"eval_rewards/{name}/mean"] = _mean(everything[:, i])
    if len(sets) > 1:
        for name, own in sets.items():
            found[f"eval_{name}_reward"] = _mean(_total(own.cpu().double(), weights))
    return found


def means(measured: Mapping[str, Sequence[float]], sizes: Sequence[int]) -> dict[str, float]:
    """The means of what was measured of each batch, by the sizes of the batches; NaN is left out.

    Args:
        measured: the figures of the batches, by name.
        sizes: completions of each batch. What was not measured once for each is not weighed.
    """
    found = {}
    for name, values in measured.items():
        weights = sizes if len(values) == len(sizes) else [1] * len(values)
        parts = [(v, n) for v, n in zip(values, weights, strict=True) if not math.isnan(v)]
        if parts:
            found[name] = sum(v * n for v, n in parts) / sum(n for _, n in parts)
    return found


def _total(rewards: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the rewards of each completion; NaN where none has judged it."""
    total = (rewards * weights).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = math.nan
    return total


def _mean(values: Tensor) -> float:
    return float(values.nanmean())
