"""bf16 in Triton's interpreter, as GPUs have it.

The interpreter keeps a bf16 number as the sixteen bits of a ``uint16``. It casts fp32 to bf16 by
cutting bits off, where GPUs round to nearest, and it multiplies and adds those integers as if they
were the numbers. ``correct`` rounds casts to nearest even, and computes ``tl.dot`` of bf16 factors
as tensor cores do: exact products, added in the accumulator's type. Any other arithmetic in bf16
raises: no kernel here means to do it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_FP32_ONLY = "is computed in bf16: the kernel must cast to fp32 first"
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """The numbers whose bf16 bits are given, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """The bf16 bits of fp32 numbers, rounded to nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(numbers)).bfloat16()
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(numbers.shape)


def _cast(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    @functools.wraps(convert)
    def corrected(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return to_bf16(data)
        return convert(data, source, target, mode)

    return corrected


def _dot(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create_dot)
    def corrected(builder: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        assert (a.dtype.scalar == tl.bfloat16) == (b.dtype.scalar == tl.bfloat16), "two types"
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(to_fp32(t.data), tl.float32) for t in (a, b))
        return create_dot(builder, a, b, d, *rest)

    return corrected


def _refuse(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Raise where an operator would take bf16 numbers for integers."""

    @functools.wraps(compute)
    def corrected(builder: Any, *given: Any) -> Any:
        *operands, op = given
        if op is not np.where and op not in _BITWISE:
            for t in operands:
                assert t.dtype.scalar != tl.bfloat16, f"{op.__name__} {_FP32_ONLY}"
        return compute(builder, *given)

    return corrected


def correct() -> None:
    """Correct the interpreter of this process."""
    builder = interpreter.InterpreterBuilder
    interpreter._convert_float = _cast(interpreter._convert_float)
    builder.create_dot = _dot(builder.create_dot)
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, _refuse(getattr(builder, name)))
