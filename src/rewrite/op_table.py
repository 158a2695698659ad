"""The ops that rewrites may call, by name, and how the matcher reads them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..graph.canon import register
from ..graph.operations import Spec
from ..kernels.attention import attention, rope
from ..kernels.linear import dora, lora_linear, qkv_block, quant_linear, quant_lora_linear
from ..kernels.loss import linear_cross_entropy, linear_divergence, linear_logprob
from ..kernels.mlp import glu, mlp_block
from ..kernels.moe import moe_experts
from ..kernels.norms import add_rms_norm, layer_norm, rms_norm, rms_norm_linear
from ..kernels.op import Op
from ..kernels.scan import selective_scan, ssd

OPS: tuple[Op, ...] = (
    rms_norm.OP, add_rms_norm.OP, rms_norm_linear.OP, layer_norm.OP, rope.OP, attention.OP,
    glu.OP, glu.OP_PACKED, mlp_block.OP, lora_linear.OP, quant_linear.OP, quant_lora_linear.OP,
    qkv_block.OP, dora.OP, dora.NORMS, moe_experts.UP, moe_experts.DOWN, linear_cross_entropy.OP,
    linear_logprob.OP, linear_divergence.OP, selective_scan.OP, ssd.OP,
)  # fmt: skip

TABLE: dict[str, Callable[..., Any]] = {op.name: op.call for op in OPS}
"""Op name -> the function that a graph node calls."""

OF_CALL: dict[Any, Op] = {op.call: op for op in OPS}
"""That function -> the op."""

for _op in OPS:
    register(_op.call, _op.name, Spec.of(_op.call))
register(
    moe_experts.inverse_permutation,
    "inverse_permutation",
    Spec.of(moe_experts.inverse_permutation),
)
