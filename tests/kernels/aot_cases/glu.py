"""Gated linear units."""

from __future__ import annotations

from fusewright.kernels.mlp.glu_triton import BLOCK, _backward_kernel, _forward_kernel
from tests.kernels.aot import AotCase


def _cases() -> tuple[AotCase, ...]:
    cases = []
    strides = ("gate_stride", "up_stride", "columns", "blocks_per_row")
    for dtype, act in (
        *(("bf16", a) for a in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid")),
        ("fp16", "silu"),
        ("fp32", "silu"),
    ):
        pointers = dict.fromkeys(("gate", "up", "out"), f"*{dtype}")
        cases.append(
            AotCase(
                f"glu_forward_{act}_{dtype}",
                _forward_kernel,
                pointers | dict.fromkeys(strides, "i64"),
                {"ACT": act, "BLOCK": BLOCK},
            )
        )
        pointers = dict.fromkeys(("grad", "gate", "up", "grad_gate", "grad_up"), f"*{dtype}")
        needs = [(True, True)] if act != "silu" else [(True, True), (True, False), (False, True)]
        for need_gate, need_up in needs:
            cases.append(
                AotCase(
                    f"glu_backward_{act}_{dtype}_{need_gate:d}{need_up:d}",
                    _backward_kernel,
                    pointers | dict.fromkeys((*strides, "grad_stride", "out_stride"), "i64"),
                    {"ACT": act, "NEED_GATE": need_gate, "NEED_UP": need_up, "BLOCK": BLOCK},
                )
            )
    return tuple(cases)


AOT = _cases()
