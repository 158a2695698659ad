"""Routed experts."""

from __future__ import annotations

import torch

from fusewright.kernels.moe.moe_experts_triton import (
    _OUTER,
    _block_r,
    _combine_kernel,
    _config,
    _grouped_mm_kernel,
    _grouped_outer_kernel,
)
from tests.kernels.aot import AotCase


def _aot_mm(
    dtype: str, places: int, gather: bool, bias: bool, precision: str, k_major: bool, rank: int = 0
) -> AotCase:
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    config = _config(torch_dtype, places, 1)
    signature = dict.fromkeys(("a", "weight", "bias", "out", "lora_b"), f"*{dtype}")
    signature |= {"low": "*fp32" if rank else f"*{dtype}", "rows": "*i64", "offsets": "*i32"}
    signature |= {"block_expert": "*i64", "block_start": "*i64"}
    strides = ("a_stride", "w_stride_e", "w_stride_k", "w_stride_n", "bias_stride")
    strides += ("b_stride_e", "b_stride_r")
    signature |= dict.fromkeys(("inner", "columns", "rank", *strides), "i32")
    # a stride of 1 is a constant to Triton, as it is in use
    signature.pop("w_stride_k" if k_major else "w_stride_n")
    constants = {k: v for k, v in config.items() if k.isupper()} | {
        "GATHER": gather, "BIAS": bias, "PRECISION": precision, "EXPERTS": 64,
        ("w_stride_k" if k_major else "w_stride_n"): 1, "b_stride_n": 1,
        "BLOCK_R": _block_r(rank),
        "LOW_PRECISION": precision if dtype == "fp32" else "tf32",
    }  # fmt: skip
    wide = ("a_stride", "w_stride_e", "w_stride_n" if k_major else "w_stride_k", "inner", "columns")
    return AotCase(
        f"grouped_mm-{dtype}-{places}-{gather}-{bias}-{precision}-{k_major}-{rank}",
        _grouped_mm_kernel, signature, constants, config["num_warps"], config["num_stages"], wide,
    )  # fmt: skip


def _aot_outer(dtype: str, gather: bool, precision: str) -> AotCase:
    signature = dict.fromkeys(("a", "b", "out"), f"*{dtype}") | {"rows": "*i64", "offsets": "*i32"}
    integers = ("inner", "columns", "a_stride", "b_stride", "o_stride_e", "o_stride_k")
    signature |= dict.fromkeys(integers, "i32")
    constants = {k: v for k, v in _OUTER.items() if k.isupper()}
    constants |= {"GATHER": gather, "PRECISION": precision, "o_stride_n": 1}
    return AotCase(
        f"grouped_outer-{dtype}-{gather}-{precision}", _grouped_outer_kernel, signature, constants,
        _OUTER["num_warps"], _OUTER["num_stages"], integers,
    )  # fmt: skip


def _aot_combine(dtype: str, weights: str, scaled: bool) -> AotCase:
    signature = {"y": f"*{dtype}", "out": f"*{dtype}", "weights": f"*{weights}", "where": "*i64"}
    signature |= dict.fromkeys(("columns", "active", "y_stride"), "i32")
    constants = {"WEIGHTS": scaled, "BLOCK": 1024}
    name = f"combine-{dtype}-{weights}-{scaled}"
    return AotCase(name, _combine_kernel, signature, constants, divisible=("columns", "y_stride"))


AOT = (
    *(_aot_mm("bf16", places, True, False, "ieee", True) for places in (32, 64, 128)),
    _aot_mm("bf16", 128, False, True, "ieee", False),
    _aot_mm("bf16", 128, True, False, "ieee", True, 16),
    _aot_mm("fp32", 32, False, True, "tf32", False, 64),
    _aot_mm("fp16", 64, False, False, "ieee", False),
    _aot_mm("fp32", 128, True, False, "tf32", True),
    _aot_mm("fp32", 32, False, False, "ieee", False),
    _aot_outer("bf16", True, "ieee"),
    _aot_outer("fp32", False, "ieee"),
    _aot_outer("fp32", True, "tf32"),
    _aot_combine("bf16", "fp32", True),
    _aot_combine("bf16", "bf16", False),
    _aot_combine("fp32", "fp32", True),
)
