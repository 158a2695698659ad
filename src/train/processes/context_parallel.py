"""Context parallelism: torch's ring attention, through accelerate and transformers.

Each process of a group has two parts of every sequence, one from either end, and attention sees the
keys and values of all of them. It knows the causal mask and no other, so rows are not packed, and
padding comes after everything that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RecipeError
from ..recipe.strategy import Strategy

_KEY = "context_parallel_size"
_IGNORED = -100


def require_ring_attention(strategy: Strategy) -> None:
    """Raise RecipeError unless torch has ring attention for the devices of this machine."""
    if strategy.context > 1 and not torch.cuda.is_available():
        raise RecipeError(
            f"{_KEY}: torch's ring attention has no kernel for CPUs: train this on GPUs, or leave "
            "the key out"
        )


def require_causal(model: Any) -> None:
    """Raise RecipeError unless all layers are of full causal attention, which accelerate hooks."""
    from ...compiler.regions import find

    name, config = type(model).__name__, model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds and getattr(config, "sliding_window", None):
        kinds = {"sliding_attention"}
    other = sorted(kinds - {"full_attention"})
    instead = f"leave {_KEY} out"
    if other:
        raise RecipeError(
            f"{_KEY}: {name} has layers of {other[0]}, and torch's ring attention knows the whole "
            f"causal mask alone: {instead}"
        )
    blocks = [region.module for region in find(model) if region.kind == "block"]
    if not blocks or not all(hasattr(block, "self_attn") for block in blocks):
        raise RecipeError(
            f"{_KEY}: {name} has layers without self_attn, for which accelerate has no ring "
            f"attention: {instead}"
        )
    if config._attn_implementation != "sdpa":
        raise RecipeError(f"{_KEY}: {name} does not compute attention with torch's sdpa: {instead}")


def divisible(batch: Mapping[str, Tensor], size: int, pad_id: int) -> dict[str, Tensor]:
    """A batch whose sequences ``size`` processes can share, with what transformers needs.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` and ``shift_labels`` (B, T'), where T' is a
        multiple of twice ``size``. There is no mask: a causal one hides the padding.
    """
    width = batch["input_ids"].shape[1]
    rest = -width % (2 * size)
    ids = F.pad(batch["input_ids"], (0, rest), value=pad_id)
    labels = F.pad(batch["labels"], (0, rest), value=_IGNORED)
    positions = torch.arange(width + rest).expand(len(ids), -1)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions.contiguous(),
        # the label of each token is the next one: a part of a sequence cannot see that
        "shift_labels": F.pad(labels[:, 1:], (0, 1), value=_IGNORED),
    }
