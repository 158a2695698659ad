"""The ops that rewrites may call, by name, and how the matcher reads them afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..graph.canon import register
from ..graph.operations import Spec
from ..kernels.attention import attention, rope
from ..kernels.linear import dora, lora_linear, qkv_block, quant_linear, quant_lora_linear
from ..kernels.loss import linear_cross_entropy
from ..kernels.mlp import glu, mlp_block
from ..kernels.moe import moe_experts
from ..kernels.norms import add_rms_norm, layer_norm, rms_norm, rms_norm_linear
from ..kernels.scan import selective_scan, ssd

TABLE: dict[str, Callable[..., Any]] = {
    "rms_norm": rms_norm.rms_norm,
    "add_rms_norm": add_rms_norm.add_rms_norm,
    "rms_norm_linear": rms_norm_linear.rms_norm_linear,
    "layer_norm": layer_norm.layer_norm,
    "rope": rope.rope,
    "glu": glu.glu,
    "glu_packed": glu.glu_packed,
    "lora_linear": lora_linear.lora_linear,
    "quant_linear": quant_linear.quant_linear,
    "quant_lora_linear": quant_lora_linear.quant_lora_linear,
    "dora": dora.rescaled,
    "dora_row_norms": dora.row_norms,
    "mlp_block": mlp_block.mlp_block,
    "qkv_block": qkv_block.qkv_block,
    "linear_cross_entropy": linear_cross_entropy.linear_cross_entropy,
    "attention": attention.attention,
    "selective_scan": selective_scan.selective_scan,
    "ssd": ssd.ssd,
    "moe_route": moe_experts.moe_route,
    "moe_up": moe_experts.moe_up,
    "moe_down": moe_experts.moe_down,
}
"""Op name -> the function that a graph node calls."""

KEPT_OUTPUTS: dict[Any, tuple[int, ...]] = {op.call: op.kept_outputs for op in (add_rms_norm.OP,)}
"""The function of an op -> the places of the outputs that it keeps for backward."""

_NORM = ("x", "weight", "eps", "offset", "rounding")

register(TABLE["rms_norm"], "rms_norm", Spec(_NORM, (0.0, "inner")))
register(TABLE["add_rms_norm"], "add_rms_norm", Spec(("x", "residual", *_NORM[1:]), (0.0, "inner")))
register(TABLE["layer_norm"], "layer_norm", Spec(("x", "weight", "bias", "eps")))
register(
    TABLE["rope"], "rope",
    Spec(("tensors", "cos", "sin", "rotary_dim", "layout", "inverse"), ("halves", False)),
)  # fmt: skip
register(TABLE["glu"], "glu", Spec(("gate", "up", "activation")))
register(TABLE["glu_packed"], "glu_packed", Spec(("x", "activation", "gate_first"), (True,)))
register(
    TABLE["lora_linear"],
    "lora_linear",
    Spec(
        ("x", "weight", "bias", "lora_a", "lora_b", "scale", "x_lora", "lora_bias", "dtype"),
        (None, None, None),
    ),
)
register(
    TABLE["quant_linear"],
    "quant_linear",
    Spec(("x", "weight", "bias", "compute", "dtype"), (None, None, None)),
)
register(
    TABLE["quant_lora_linear"],
    "quant_lora_linear",
    Spec(
        (
            "x", "weight", "bias", "lora_a", "lora_b", "scale", "x_lora", "lora_bias", "dtype",
            "compute",
        ),
        (None, None, None, None),
    ),
)  # fmt: skip
register(
    TABLE["linear_cross_entropy"],
    "linear_cross_entropy",
    Spec(
        (
            "x", "weight", "bias", "labels", "ignore_index", "reduction", "label_smoothing",
            "softcap", "logit_scale",
        ),
        (-100, "mean", 0.0, None, 1.0),
    ),
)  # fmt: skip
register(
    TABLE["selective_scan"],
    "selective_scan",
    Spec(
        ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"),
        (None, None, None, False),
    ),
)
register(
    TABLE["ssd"],
    "ssd",
    Spec(
        ("x", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "dt_limit"),
        (None, None, False, (0.0, float("inf"))),
    ),
)
register(moe_experts.inverse_permutation, "inverse_permutation", Spec(("order",)))
