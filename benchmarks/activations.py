"""How many bytes a forward pass keeps for its backward pass, whatever the allocator does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Held:
    """A tensor that autograd saved; it lives as long as autograd wants it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def kept_for_backward(model: Any, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Run ``forward`` and count what it left for backward.

    Counted are the storages of all tensors that autograd saved and still holds when the loss is
    there: each storage once, and whole, for a view keeps all of it. The inputs that a checkpoint
    keeps are among them, for it saves them with autograd. Parameters and buffers are left out.

    Args:
        model: whose parameters and buffers do not count.
        forward: computes the loss.

    Returns:
        The loss, ready for ``backward``, and the number of bytes.
    """
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        holder = _Held(tensor)
        held.add(holder)
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        loss = forward()
    own = {_address(t) for part in (model.parameters(), model.buffers()) for t in part}
    sizes = {_address(h.tensor): h.tensor.untyped_storage().nbytes() for h in held}
    return loss, sum(size for address, size in sizes.items() if address not in own)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
