"""Which calls of a causal LM without labels are a part of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..logits.awaiting import another_awaits
from ..session import Session

_CACHES = ("past_key_values", "cache", "cache_params")


def is_step(
    session: Session, head: nn.Module, outside: Sequence[str], kwargs: dict[str, Any]
) -> bool:
    """Whether a call without labels is a part of training: its caller makes the loss.

    One without gradients (a reference) says that it wants no cache: otherwise it may be generation.
    In evaluation mode it is one (of a teacher) where the loss of another model is to come.
    """
    if any(kwargs.get(name) is not None for name in _CACHES):
        return False
    if not head.training:
        return not kwargs.get("use_cache") and _is_teacher(session, head, outside)
    return torch.is_grad_enabled() or kwargs.get("use_cache") is False


def _is_teacher(session: Session, head: nn.Module, outside: Sequence[str]) -> bool:
    """Whether a call in evaluation mode is compared with another model's logits.

    Logits of a training call of that one wait for their loss. Parameters that are sharded would be
    gathered once more when they are read, by all processes: such a teacher's logits are made.
    """
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    if not another_awaits(session.log.reads):
        return False
    weight = getattr(getattr(head, "get_output_embeddings", lambda: None)(), "weight", None)
    if not isinstance(weight, nn.Parameter) or hasattr(weight, "ds_status") or weight._is_view():
        return False
    return not session.state.watches.get(head, outside).find_hooks(head).units
