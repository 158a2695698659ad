"""The rewrite passes: one subject each, in one ordered tuple."""

from __future__ import annotations

from ..match.rule import Rule
from .attention import Attention
from .blocks import MLPBlock, QKVBlock
from .dora import DoRALinear
from .glu import GLU
from .layer_norm import LayerNorm
from .lora import LoRALinear
from .loss import LinearCrossEntropy
from .moe import MoEExperts
from .quant import QuantLinear
from .rms_norm import AddRMSNorm, RMSNorm, RMSNormLinear
from .rope import Rope, RopePair
from .scan import ChunkedScan, SelectiveScan

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
    SelectiveScan(),
    ChunkedScan(),
    MoEExperts(),
    # fuse: ops and their neighbours become larger ops
    RopePair(),
    AddRMSNorm(),
    RMSNormLinear(),
    MLPBlock(),
    QKVBlock(),
)
"""Every rule, in the order in which they run."""
