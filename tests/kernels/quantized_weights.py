"""Quantized weights for tests, made of random bytes: bitsandbytes need not be installed."""

from __future__ import annotations

import torch

from fusewright.kernels.linear.quantized import NESTED, FourBits, Quantized


def random_weight(
    shape: tuple[int, int], kind: str = "nf4", blocksize: int = 64, nested: bool = False
) -> Quantized:
    """Random codes and positive scales, so that products are about one."""
    size, spread = shape[0] * shape[1], shape[1] ** -0.5
    if kind == "int8":
        packed = torch.randint(-127, 128, shape, dtype=torch.int8)
        return Quantized((packed, spread * (1 + torch.rand(shape[0]))), shape, shape[1], kind)
    packed = torch.randint(0, 256, ((size + 1) // 2, 1), dtype=torch.uint8)
    blocks = -(-size // blocksize)
    if not nested:
        tensors = FourBits(packed, spread * (1 + torch.rand(blocks)))
        return Quantized(tensors, shape, blocksize, kind)
    tensors = FourBits(
        packed,
        spread * torch.rand(-(-blocks // NESTED)),
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.linspace(-1, 1, 256),
        torch.tensor(2 * spread),
    )
    return Quantized(tensors, shape, blocksize, kind)


def packed_as(w: Quantized, packed: torch.Tensor) -> Quantized:
    """The same weight in other storage."""
    return w._replace(tensors=(packed, *w.tensors[1:]))
