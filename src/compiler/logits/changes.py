"""Whether what logits are made of is still what it was in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def versions(values: tuple[Any, ...]) -> tuple[list[int], list[Tensor]]:
    """What tells later whether the tensors among ``values`` have been written to.

    Their versions, and of trained weights some of the bytes: an optimizer that writes ``p.data``
    leaves the version as it is, and so does FSDP, where it gathers them anew. FSDP1's are views.
    """
    tensors = [v for v in values if isinstance(v, Tensor) and not v.is_inference()]
    trained = [
        t.detach() for t in tensors
        if t.requires_grad and (type(t) is nn.Parameter or (t.ndim <= 2 and t._is_view()))
    ]  # fmt: skip
    parts = (t.diagonal() if t.ndim == 2 else t.reshape(-1) for t in trained)
    some = [t.clone().view(torch.uint8) for t in parts]
    return [t._version for t in tensors], some


def is_unchanged(values: tuple[Any, ...], before: tuple[list[int], list[Tensor]]) -> bool:
    """Whether none of ``values`` was written to since ``versions`` returned ``before``."""
    now, some = versions(values)
    return now == before[0] and all(map(torch.equal, some, before[1]))
