"""Quantized weights for tests, made of random bytes: bitsandbytes need not be installed."""

from __future__ import annotations

import torch

from fusewright.kernels.linear.quantized import NESTED, Quantized


def random_weight(
    shape: tuple[int, int], kind: str = "nf4", blocksize: int = 64, nested: bool = False
) -> Quantized:
    """Random codes and positive scales, so that products are about one."""
    size, spread = shape[0] * shape[1], shape[1] ** -0.5
    if kind == "int8":
        packed = torch.randint(-127, 128, shape, dtype=torch.int8)
        return Quantized(packed, spread * (1 + torch.rand(shape[0])), shape, shape[1], kind)
    packed = torch.randint(0, 256, ((size + 1) // 2, 1), dtype=torch.uint8)
    blocks = -(-size // blocksize)
    if not nested:
        return Quantized(packed, spread * (1 + torch.rand(blocks)), shape, blocksize, kind)
    return Quantized(
        packed,
        spread * torch.rand(-(-blocks // NESTED)),
        shape,
        blocksize,
        kind,
        torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        torch.linspace(-1, 1, 256),
        torch.tensor(2 * spread),
    )
