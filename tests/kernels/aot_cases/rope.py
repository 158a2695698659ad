"""Rotary embeddings."""

from __future__ import annotations

from fusewright.kernels.attention.rope_triton import _config, _rope_kernel, _sides
from tests.kernels.aot import AotCase


def _cases() -> tuple[AotCase, ...]:
    arguments = _rope_kernel.arg_names
    cases = []
    for dtype, table, rotary_dim, dim, layout, transpose in (
        ("bf16", "fp32", 64, 64, "halves", False),
        ("bf16", "bf16", 128, 128, "halves", False),
        ("bf16", "bf16", 128, 128, "halves", True),
        ("bf16", "bf16", 128, 128, "pairs", True),
        ("fp16", "fp16", 64, 128, "pairs", False),
        ("fp32", "fp32", 32, 80, "halves", False),
        ("bf16", "bf16", 256, 256, "halves", False),
        ("bf16", "bf16", 16, 64, "halves", True),
        ("bf16", "bf16", 64, 64, "pairs_to_halves", False),
        ("bf16", "bf16", 64, 64, "pairs_to_halves", True),
    ):
        signature = dict.fromkeys(arguments[:4], f"*{dtype}")
        signature |= dict.fromkeys(arguments[4:6], f"*{table}")
        signature |= dict.fromkeys(arguments[6:22], "i64")
        signature |= dict.fromkeys(arguments[22:27], "i32")
        if dtype != table and not transpose:
            signature |= dict.fromkeys(arguments[2:4], f"*{table}")
        constants = {**_sides(layout, transpose), **_config(rotary_dim, dim)}
        name = f"rope_{dtype}_{table}_{rotary_dim}of{dim}_{layout}{transpose:d}"
        cases.append(AotCase(name, _rope_kernel, signature, constants))
    return tuple(cases)


AOT = _cases()
