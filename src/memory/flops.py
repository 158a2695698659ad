"""What is not seen of operations from outside: their FLOPs, and what opaque ones hold meanwhile."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry


def operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """The floating-point operations of one call; 0 where they do not count beside the products."""
    schema = getattr(func, "_schema", None)
    ours = _OURS.get(schema.name) if schema is not None else None
    if ours is not None:
        return ours(*args)
    formula = flop_registry.get(getattr(func, "_overloadpacket", None))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def held(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that a call of one of our ops holds while it runs: weights that it has unpacked."""
    schema = getattr(func, "_schema", None)
    found = _UNPACKED.get(schema.name) if schema is not None else None
    return 0 if found is None else found(*args)


def _sum_of_products(
    bias: Tensor | None, lefts: list[Tensor], rights: list[Tensor], *_: Any
) -> int:
    return 2 * lefts[0].shape[0] * sum(r.numel() for r in rights)


def _quantized(x: Tensor, *rest: Any) -> int:
    (out, into), right = rest[5:7], rest[-2]
    update = 0 if right is None else int(right.numel())
    return 2 * (x.numel() // x.shape[-1]) * (int(out) * int(into) + update)


def _sum_of_quantized(xs: list[Tensor], weights: Any, sizes: list[int], *rest: Any) -> int:
    updates = sum(int(right.numel()) for right in rest[-2])
    return 2 * xs[0].shape[0] * (_elements(sizes) + updates)


def _elements(sizes: list[int]) -> int:
    """Those of quantized matrices: (out, in, blocksize) each."""
    return sum(out * into for out, into in zip(sizes[::3], sizes[1::3], strict=True))


def _mlp(
    x: Tensor, tensors: list[Tensor | None], scales: list[float], sizes: list[int], *_: Any
) -> int:
    own = tensors[: 4 * len(scales)]
    plain = [t for i, t in enumerate(own) if t is not None and not (sizes and i % 4 == 0)]
    return 2 * x.shape[0] * (_elements(sizes) + sum(t.numel() for t in plain if t.dim() == 2))


def _mlp_backward(grad: Tensor, *rest: Any) -> int:
    return 2 * _mlp(*rest)  # gate and up again, and what flows back through all three


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    return pairs * (q.shape[3] + v.shape[3])  # half of a multiply-add's two: causal


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return 3 * _attention(q, k, v)  # the scores again, and two products for each of forward's


_OURS: dict[str, Callable[..., int]] = {
    "fusewright::lora_sum_of_products": _sum_of_products,
    "fusewright::quant_product": _quantized,
    "fusewright::quant_sum_of_products": _sum_of_quantized,
    "fusewright::mlp_block_forward": _mlp,
    "fusewright::mlp_block_backward": _mlp_backward,
    "fusewright::attention_forward": _attention,
    "fusewright::attention_backward": _attention_backward,
}

_UNPACKED: dict[str, Callable[..., int]] = {
    "fusewright::quant_product": lambda x, *rest: x.element_size() * rest[5] * rest[6],
    "fusewright::quant_sum_of_products": lambda xs, weights, sizes, *_: (
        xs[0].element_size() * max(map(math.prod, zip(sizes[::3], sizes[1::3], strict=True)))
    ),
    "fusewright::mlp_block_forward": lambda x, tensors, scales, sizes, *_: (
        x.element_size() * _elements(sizes)
    ),
    "fusewright::mlp_block_backward": lambda grad, x, tensors, scales, sizes, *_: (
        x.element_size() * _elements(sizes)
    ),
}
