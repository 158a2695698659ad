"""Weights in 4 bits."""

from __future__ import annotations

from fusewright.kernels.linear.quant_linear_triton import _tile, dequantize_kernel
from fusewright.kernels.linear.quantized import NESTED as PER_OUTER
from tests.kernels.aot import AotCase

_POINTERS = {
    "packed": "*u8", "absmax": "*fp32", "absmax_8bit": "*u8", "code": "*fp32", "offset": "*fp32",
    "values": "*fp32",
}  # fmt: skip


def _aot_dequantize(dtype: str, blocksize: int, nested: bool) -> AotCase:
    return AotCase(
        name=f"dequantize-{dtype}-b{blocksize}-{'nested' if nested else 'plain'}",
        kernel=dequantize_kernel,
        signature=_POINTERS
        | {"absmax_8bit": "*u8" if nested else "*fp32", "out": f"*{dtype}"}
        | dict.fromkeys(("size", "size_packed"), "i32"),
        constants={"BLOCKSIZE": blocksize, "NESTED": nested, "OUTER": PER_OUTER} | _tile(blocksize),
        num_warps=4,
        divisible=("size", "size_packed"),
    )


AOT = (
    _aot_dequantize("bf16", 64, True),
    _aot_dequantize("fp16", 128, False),
    _aot_dequantize("fp32", 4096, True),
)
