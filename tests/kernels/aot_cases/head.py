"""The head with its losses: rows of logits, and matmuls that end at a count on the device."""

from __future__ import annotations

import torch

from fusewright.kernels.launch import gpu_of
from fusewright.kernels.loss.head_matmul_triton import matmul_config, matmul_kernel
from fusewright.kernels.loss.head_rows_triton import row_config, rows_kernel
from tests.kernels.aot import AotCase


def _rows(dtype: str, vocabulary: int, softcap: bool, moments: bool, flags: str) -> AotCase:
    """A case of ``rows_kernel``; ``flags`` are those of its steps that run."""
    config = row_config(vocabulary, moments)
    steps = ("STATISTICS", "GRADIENT", "RESCALE", "CLEAR")
    pointers = {
        "logits": f"*{dtype}", "out": f"*{dtype}", "targets": "*i64", "scale": "*fp32",
        "found": "*fp32", "classes": "*i64", "upstream": "*fp32", "dfactor": "*fp32",
        "kept": "*i32",
    }  # fmt: skip
    integers = ("first", "rows", "vocabulary", "room", "stride_output", "stride_row")
    numbers = dict.fromkeys(integers, "i32") | dict.fromkeys(("softcap", "temperature"), "fp32")
    constants = {"SOFTCAP": softcap, "TEMPERATURE": moments, "TARGETS": True, "MOMENTS": moments}
    return AotCase(
        name=f"rows-{dtype}-{config['BLOCK_V']}-softcap{softcap:d}-moments{moments:d}-{flags}",
        kernel=rows_kernel,
        signature=pointers | numbers,
        constants=constants
        | {step: step in flags.split() for step in steps}
        | {"BLOCK_V": config["BLOCK_V"]},
        num_warps=config["num_warps"],
    )


def _matmul(dtype: str, role: str, precision: str = "ieee") -> AotCase:
    """The roles: logits = x·Wᵀ (+ bias), dx = dlogits·W, dweight += dlogitsᵀ·x."""
    bound = "inner" if role == "dweight" else "rows"
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    config = matmul_config(torch_dtype, precision, bound == "inner", gpu_of(torch.empty(0)))
    ones = {"logits": ("stride_ak", "stride_bk"), "dx": ("stride_ak", "stride_bn")}
    unit = ones.get(role, ("stride_am", "stride_bn"))
    integers = ("first", "rows", "columns", "inner", "rows_a", "inner_b", "columns_b")
    strides = ("stride_am", "stride_ak", "stride_bk", "stride_bn")
    out = "fp32" if role == "dweight" else dtype
    constants = {"BOUND": bound, "HAS_BIAS": role == "logits", "ACCUMULATE": bound == "inner"}
    return AotCase(
        name=f"matmul-{role}-{dtype}-{precision}",
        kernel=matmul_kernel,
        signature={"a": f"*{dtype}", "b": f"*{dtype}", "bias": f"*{dtype}", "c": f"*{out}"}
        | {"kept": "*i32"}
        | dict.fromkeys((*integers, *strides), "i32"),
        constants=constants
        | {"PRECISION": precision}
        | dict.fromkeys(unit, 1)
        | {k: config[k] for k in config if k.isupper()},
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )


AOT = (
    _rows("bf16", 49152, True, True, "STATISTICS"),
    _rows("fp32", 256, False, True, "STATISTICS"),
    _rows("bf16", 49152, False, False, "STATISTICS GRADIENT"),
    _rows("fp32", 49152, True, False, "STATISTICS GRADIENT CLEAR"),
    _rows("bf16", 49152, True, True, "STATISTICS GRADIENT RESCALE CLEAR"),
    _rows("fp16", 49152, False, True, "GRADIENT"),
    _rows("fp16", 256, False, False, "STATISTICS GRADIENT"),
    _matmul("bf16", "logits"),
    _matmul("bf16", "dx"),
    _matmul("fp16", "dweight"),
    _matmul("fp32", "logits"),
    _matmul("fp32", "dweight", "tf32"),
)
