"""The gated delta rule with one decay per head on the CPU (``delta_rule.cpp``)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .library import are_real, check, library

_Strides = ctypes.c_int64 * 4
_DTYPES = (torch.float32, torch.bfloat16)


class _Inputs(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{name}_strides", ctypes.POINTER(ctypes.c_int64)) for name in ("q", "k", "v")),
        *((name, ctypes.c_void_p) for name in ("g", "beta", "segments")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "length", "groups", "heads", "features", "values")
        ),
        ("l2norm", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "g", "beta", "state", "out")),
        ("out_strides", ctypes.POINTER(ctypes.c_int64)),
    )


def takes(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> bool:
    """Whether there is a kernel for these inputs; waits for the compiler if need be."""
    return (
        q.dtype is k.dtype is v.dtype
        and q.dtype in _DTYPES
        and g.ndim == 3
        and q.device.type == "cpu"
        and v.numel() > 0 < q.numel()
        and are_real(q, k, v, g)
        and library("delta_rule") is not None
    )


def forward(
    inputs: tuple[Any, ...], epsilon: float, states: Tensor, out: Tensor, final: Tensor
) -> None:
    """Write the outputs (B, L, H, V), the last state, and those before chunks but the first.

    ``inputs`` are q, k, v, g, beta, whether q and k are normed, and the segments; all results are
    contiguous, as is ``states`` (N, B, H, K, V), whose first is given.
    """
    given, *held = _inputs(epsilon, *inputs)
    arguments = ctypes.byref(given), _at(states), _at(out), _at(final)
    _run("delta_rule_forward", arguments, inputs[0], held)


def backward(
    inputs: tuple[Any, ...], epsilon: float, states: Tensor, grad: Tensor | None, after: Tensor,
    results: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Write the gradients of q, k, v (like them, contiguous), g and beta (in fp32).

    ``after`` is the gradient of the last state, and becomes that of the first.
    """
    given, *held = _inputs(epsilon, *inputs)
    strides = None if grad is None else _Strides(*grad.stride())
    to = _Gradients(*(t.data_ptr() for t in (*results, after)), _address(grad), strides)
    arguments = ctypes.byref(given), _at(states), ctypes.byref(to)
    _run("delta_rule_backward", arguments, inputs[0], [held, to, strides])


def _run(name: str, arguments: tuple[Any, ...], q: Tensor, held: Any) -> None:
    kernels = library("delta_rule")
    if kernels is None:
        raise RuntimeError("there are no kernels: takes() has not been asked")
    threads = max(1, min(torch.get_num_threads(), q.shape[0] * q.shape[2]))
    check(kernels[name](*arguments, int(q.dtype is torch.bfloat16), threads))


def _inputs(
    epsilon: float, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, l2norm: bool,
    segments: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """The structure, and what must live as long as it."""
    g, beta = (t.to(torch.float32).contiguous() for t in (g, beta))
    segments = None if segments is None else segments.to(torch.int32).contiguous()
    strides = [_Strides(*t.stride()) for t in (q, k, v)]
    sizes = *v.shape[:2], q.shape[2], v.shape[2], q.shape[3], v.shape[3]
    given = _Inputs(
        *(t.data_ptr() for t in (q, k, v)),
        *strides,
        *map(_address, (g, beta, segments)),
        *sizes,
        l2norm,
        q.shape[3] ** -0.5,
        epsilon,
    )
    return given, g, beta, segments, strides


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _at(t: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr())
