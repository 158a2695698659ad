"""The rewrite passes: one subject each, in one ordered tuple."""

from __future__ import annotations

from ..rewrite.rule import Rule
from .attention import Attention, SegmentAttention, WrittenOutAttention
from .delta_rule import KDA, GatedDeltaRule
from .dora import DoRALinear
from .glu import GLU
from .layer_norm import LayerNorm
from .linear_blocks import MLPBlock, QKVBlock
from .linear_cross_entropy import LinearCrossEntropy
from .lora_linear import LoRALinear
from .moe_experts import MoEExperts
from .quant_linear import QuantLinear
from .rms_norm import AddRMSNorm, RMSNorm, RMSNormLinear
from .rope import Rope, RopePair
from .selective_scan import ChunkedScan, SelectiveScan, ShortConvolution

PIPELINE: tuple[Rule, ...] = (
    # recognise: formulas, in all their spellings, become ops
    LayerNorm(),
    RMSNorm(),
    Rope(),
    GLU(),
    QuantLinear(),
    DoRALinear(),
    LoRALinear(),
    LinearCrossEntropy(),
    Attention(),
    WrittenOutAttention(),
    SegmentAttention(),
    SelectiveScan(),
    ChunkedScan(),
    GatedDeltaRule(),
    KDA(),
    ShortConvolution(),
    MoEExperts(),
    # fuse: ops and their neighbours become larger ops
    RopePair(),
    AddRMSNorm(),
    RMSNormLinear(),
    MLPBlock(),
    QKVBlock(),
)
"""Every rule, in the order in which they run."""
