"""Hooks on what autograd saves: what one may keep, and how to save out of their sight."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor


def saved_by_hook(t: Tensor) -> Tensor:
    """What a hook on saved tensors may keep of ``t``, and give back to backward."""
    # A node that saves its own output would keep itself alive, for good if backward never runs.
    # Parameters are returned as they are: ZeRO-3 frees one by way of its parameter.
    return t if t.grad_fn is None else t.detach()


def without_saved_tensor_hooks() -> contextlib.AbstractContextManager[object]:
    """Hide from hooks on saved tensors what is saved for another purpose than the call at hand."""
    # a region's first call may be counted: a checkpoint compares what it saves with the second
    hooks: Any = torch._C._autograd  # 2026-11-26: torch does not type all of it
    is_hooked = hooks._top_saved_tensors_default_hooks(True) is not None
    if not is_hooked or not hooks._saved_tensors_hooks_is_enabled():
        return contextlib.nullcontext()  # a call of Python for each tensor would be timed, too
    return torch.autograd.graph.saved_tensors_hooks(saved_by_hook, lambda t: t)
