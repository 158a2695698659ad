"""Attention in bf16 on the CPU, in C++ (``attention.cpp``)."""

from __future__ import annotations

import ctypes
from typing import cast

import torch
from torch import Tensor

from .library import are_real, check, library

_Strides = ctypes.c_int64 * 3
_SCORES = 1 << 14
"""Scores that are worth another thread."""


class _Call(ctypes.Structure):
    """``struct Attention``: sizes, and strides of samples, heads and positions."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "groups", "time", "keys")),
        *((name, ctypes.c_int64) for name in ("dim", "value_dim", "causal", "window", "samples")),
        *((name, _Strides) for name in ("q", "k", "v", "mask", "out", "grad", "dq", "dk", "dv")),
    )


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel computes this call; waits for the compiler where it does."""
    return fits(q, k, v, mask) and are_real(q, k, v) and library() is not None


def fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel is made for such a call."""
    # a mask is (B or 1, H or 1, T, S), or first keys
    every = q, k, v
    return (
        all(t.dtype is torch.bfloat16 and t.device.type == "cpu" for t in every)
        and all(t.shape[-1] % 16 == 0 and t.numel() > 0 for t in every)
        and (mask is None or mask.dtype in (torch.bool, torch.int32))
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    window: int | None, sinks: Tensor | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """The outputs (B, H, T, E), in memory (B, T, H, E), of a call that ``takes`` is true of."""
    out = _like(q, v.shape[-1])
    tensors = _dense({"q": q, "k": k, "v": v, "mask": mask}) | {"out": out}
    _run("attention_forward", tensors, (_fp32(sinks),), scale, softcap, causal, window)
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    window: int | None, sinks: Tensor | None, softcap: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of (dq, dk, dv, dsinks), the first three in the order of projections."""
    pairs = zip(("dq", "dk", "dv"), (q, k, v), needs[:3], strict=True)
    gradients = {name: _like(t, t.shape[-1]) if need else None for name, t, need in pairs}
    tensors = _dense({"grad": grad, "q": q, "k": k, "v": v, "mask": mask}) | gradients
    rows = None  # what each row adds to the gradient of its head's sink
    if needs[3]:
        rows = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _run("attention_backward", tensors, (_fp32(sinks), rows), scale, softcap, causal, window)
    grads = [t for t in gradients.values() if t is not None]
    if sinks is not None and rows is not None:
        grads.append(rows.sum((0, 2)).to(sinks.dtype))
    return grads


_Tensors = dict[str, Tensor | None]


def _run(
    name: str, operands: _Tensors, of_sinks: tuple[Tensor | None, ...], scale: float,
    softcap: float | None, causal: bool, window: int | None,
) -> None:  # fmt: skip
    """Call a function of the library: the tensors are in the order of its arguments."""
    q, v = (cast("Tensor", operands[key]) for key in ("q", "v"))
    (batch, heads, time, dim), (_, groups, keys, value_dim) = q.shape, v.shape
    sizes = batch, heads, groups, time, keys, dim, value_dim
    mask = operands["mask"]
    is_first_keys = mask is not None and mask.dtype is torch.int32
    call = _Call(*sizes, causal, window or keys + time, is_first_keys)
    for key, t in operands.items():
        if t is not None:  # a dimension of size 1 is the same element for all
            strides = (0 if t.shape[i] == 1 else t.stride(i) for i in range(3))
            setattr(call, key, _Strides(*strides))
    every = *operands.values(), *of_sinks
    addresses = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in every]
    # in backward each thread may have separate sums: no more memory than that of the queries
    threads = min(
        torch.get_num_threads(), 1 + batch * heads * time * keys // _SCORES, batch * heads
    )
    kernels = library()
    if kernels is None:
        raise RuntimeError("there are no kernels: takes() has not been asked")
    factors = ctypes.c_float(scale), ctypes.c_float(softcap or 0.0)
    check(kernels[name](ctypes.byref(call), *addresses, *factors, threads))


def _fp32(sinks: Tensor | None) -> Tensor | None:
    return None if sinks is None else sinks.to(torch.float32).contiguous()


def _dense(operands: _Tensors) -> _Tensors:
    return {
        key: t if t is None or t.stride(-1) == 1 else t.contiguous() for key, t in operands.items()
    }


def _like(t: Tensor, dim: int) -> Tensor:
    """Heads as projections have them in memory; no view, for the model may write to it."""
    batch, heads, time, _ = t.shape
    strides = (time * heads * dim, dim, heads * dim, 1)
    return torch.empty_strided((batch, heads, time, dim), strides, dtype=t.dtype, device=t.device)
