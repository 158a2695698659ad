"""Whether what logits and losses are made of is still what it was in the forward pass."""

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


Remembered = tuple[Tensor, int | None]
"""A tensor that backward reads, and its version; None where it has none, as in inference mode."""


def remembered(t: Tensor) -> Remembered:
    """``t`` without its history, which shares memory and version with it."""
    return t.detach(), None if t.is_inference() else t._version


def unchanged(kept: Remembered) -> Tensor:
    """The tensor that was remembered.

    Raises:
        RuntimeError: it was written to since, as autograd says of what it has saved.
    """
    t, version = kept
    if version is not None and t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{t.type()} {list(t.shape)}] is at version {t._version}; expected "
            f"version {version} instead. Write to a clone() of it, or call backward before."
        )
    return t
