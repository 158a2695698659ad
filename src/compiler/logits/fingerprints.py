"""Fingerprints of the rows and weights that logits are computed from when they are read.

A late read equals what eager mode computed, or raises ``WeightsChanged``:

- A call reads aliases of its operands later. ``p.data = ...`` and ``model.to(...)`` give the
  parameter other memory, and leave the aliases unchanged. Without gradients the rows are copies.
- ``fingerprint`` sums all their bytes. Each read compares the sums with those of the call, so it
  notices every write into them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class WeightsChanged(RuntimeError):
    """The rows or weights of logits have changed since the call."""

    def __init__(self) -> None:
        super().__init__(
            "these logits were not read before the weights that make them were changed (by an "
            "optimizer, most likely). Read them earlier, or use "
            "fusewright.optimize(model, logits='always')."
        )


# ------------------------------------------------------------------------------------ fingerprints

_WORDS = 1 << 14
"""How many words have one sum."""
_CHUNK = {"cpu": 1 << 18}
"""How many words are multiplied at once, by the kind of device; elsewhere 2^22."""

Fingerprint = list[list[Tensor]]
"""Sums of the bytes of each value."""


def fingerprint(values: Iterable[Any]) -> Fingerprint:
    """Sums that tell later whether the tensors among ``values`` have other bytes.

    Each 32-bit word is multiplied with an odd number of 64 bits, its own among 16,384, and these
    are added up: one word that changes is always seen, and of several only those whose changes
    cancel out, by a chance of 2^-33 at most for each of the sums. It stays on the device, so that
    nobody waits. A head of 49,152 x 576 in bfloat16 takes 8 ms on two cores of an AMD EPYC, its
    product with 1,024 rows 174 (torch 2.13, 2026-11-29).
    """
    return [_sums(v) if isinstance(v, Tensor) else [] for v in values]


def is_unchanged(values: Iterable[Any], before: Fingerprint) -> bool:
    """Whether ``values`` are what ``fingerprint`` saw in ``before``; None is skipped."""
    pairs = zip(fingerprint(values), before, strict=True)
    return all(torch.equal(a, b) for now, then in pairs for a, b in zip(now, then, strict=False))


def _sums(t: Tensor) -> list[Tensor]:
    if is_traceable_wrapper_subclass(t):
        names, _ = t.__tensor_flatten__()  # type: ignore[attr-defined]
        return [part for name in names for part in _sums(getattr(t, name))]
    if t.is_meta or isinstance(t, FakeTensor):
        return []
    with torch.no_grad():
        data = t.detach().reshape(-1).view(torch.uint8)
        if data.storage_offset() % 4:
            data = data.clone()
        end = data.numel() // 4 * 4
        words, rest = data[:end].view(torch.int32), data[end:]
        weights = _weights(t.device)
        whole = words.numel() // _WORDS * _WORDS
        rows = words[:whole].view(-1, _WORDS)
        count = _CHUNK.get(t.device.type, 1 << 22) // _WORDS
        # in one buffer: to touch fresh memory for each chunk takes ten times as long on a CPU
        products = weights.new_empty(min(count, len(rows)), _WORDS)
        sums = [
            torch.mul(chunk, weights, out=products[: len(chunk)]).sum(1)
            for chunk in rows.split(count)
            if len(chunk)
        ]
        last = words[whole:]
        tail = torch.stack([(part * weights[: part.numel()]).sum() for part in (last, rest)])
        return [torch.cat([*sums, tail])]


@functools.cache
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(1 << 62), 1 << 62, (_WORDS,), generator=generator)
    return (numbers * 2 + 1).to(device)


# ------------------------------------------------------------------------- versions, as autograd's

Remembered = tuple[Tensor, int | None]
"""A tensor that backward reads, and its version; None where it has none, as in inference mode."""


def remembered(t: Tensor) -> Remembered:
    """``t`` without its history, which shares memory and version with it."""
    return t.detach(), None if t.is_inference() else t._version


def unchanged(kept: Remembered) -> Tensor:
    """The tensor that was remembered; RuntimeError, as autograd's, if it was written to since."""
    t, version = kept
    if version is not None and t._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: [{t.type()} {list(t.shape)}] is at version {t._version}; expected "
            f"version {version} instead. Write to a clone() of it, or call backward before."
        )
    return t
