"""What libraries have for the same calls as our ops: rivals that ``ops.py`` measures beside them.

A rival is made from the arguments of a call, which it may prepare: what a model makes once a step,
such as a table of blocks, is not part of its time. Whatever a rival cannot do here (another device,
a package or a version of PyTorch that is not there) raises, and is kept as its row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Rival = Callable[..., Callable[..., Any]]
"""From a call's arguments to a function of them."""


def _sdpa(backend: SDPBackend) -> Rival:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Any = None, *_: Any
    ) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True
            )

    return lambda *_: attend


def _varlen(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *rest: Any) -> Any:
    """FlashAttention over rows without padding, whose samples a mask tells."""
    from torch.nn.attention.varlen import varlen_attn

    length = q.shape[2]
    starts = torch.zeros(length, dtype=torch.bool, device=q.device)
    starts[0] = True
    if rest and rest[0] is not None:  # a pack: the first position that the last one of each sees
        starts[rest[0][0, 0].int().argmax(-1)] = True
    begins = starts.nonzero()[:, 0]
    rows = torch.arange(q.shape[0], device=q.device)[:, None] * length
    ends = torch.tensor([q.shape[0] * length], device=q.device)
    cu = torch.cat([(rows + begins).flatten(), ends]).int()
    longest = int(cu.diff().max())

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        options = {"scale": scale, "window_size": (-1, 0), "enable_gqa": True}
        out = varlen_attn(*rows, cu, cu, longest, longest, **options)
        return out.view(q.shape[0], length, *out.shape[1:]).transpose(1, 2)

    return attend


def _flex(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, *rest: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = rest[0] if rest else None

    def sees(batch: Any, head: Any, row: Any, column: Any) -> Any:
        return row >= column if mask is None else mask[0, 0, row, column]

    length = q.shape[2]
    blocks = create_block_mask(sees, None, None, length, length, device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, *_: attend(
        q, k, v, block_mask=blocks, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def _rms_norm(x: Tensor, weight: Tensor, eps: float, *_: Any) -> Any:
    return lambda x, weight, *_: F.rms_norm(x, x.shape[-1:], weight, eps)


def _liger_rms_norm(*_: Any) -> Any:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight, eps, *_: LigerRMSNormFunction.apply(
        x, weight, eps, 0.0, "llama", False
    )


def _liger_glu(*_: Any) -> Any:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    # its backward writes over what it was given: the next call's inputs
    return lambda gate, up, *_: LigerSiLUMulFunction.apply(gate.clone(), up.clone())


def _linear_cross_entropy(*_: Any) -> Any:
    def loss(x: Tensor, head: Tensor, bias: Any, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(x.flatten(0, 1), head, labels.flatten(), ignore_index=-100)

    return loss


def _liger_loss(*_: Any) -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, head, _, labels: loss(head, x.flatten(0, 1), labels.flatten())


def _bitsandbytes_state(weight: Any, dtype: torch.dtype) -> Any:
    from bitsandbytes.functional import QuantState

    _, scales, codes, values, offset = weight.tensors
    table = {"code": _table(weight.kind, scales.device), "quant_type": weight.kind}
    shared = {"shape": torch.Size(weight.shape), "dtype": dtype, "blocksize": weight.blocksize}
    if codes is None:
        return QuantState(absmax=scales, **table, **shared)
    nested = QuantState(absmax=scales, code=values, blocksize=256, dtype=torch.float32)
    return QuantState(absmax=codes, offset=offset, state2=nested, **table, **shared)


def _table(kind: str, device: torch.device) -> Tensor:
    from fusewright.kernels.linear.quantized import VALUES

    return torch.tensor(VALUES[kind], device=device)


def _bitsandbytes(x: Tensor, weight: Any, *_: Any) -> Any:
    """Its dequantization and a product, as in its layers."""
    import bitsandbytes

    state = _bitsandbytes_state(weight, x.dtype)
    packed = weight.tensors[0].view(torch.uint8).reshape(-1, 1)
    return lambda x, *_: bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)


def _grouped_mm(*_: Any) -> Any:
    def up(
        x: Tensor, weight: Tensor, bias: Any, order: Tensor, where: Any, ends: Tensor, active: int,
        *_: Any,
    ) -> Tensor:  # fmt: skip
        return F.grouped_mm(x[order // active], weight, offs=ends)

    return lambda *_: up


_ATTENTION: dict[str, Rival] = {
    "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "varlen": _varlen,
    "flex": _flex,
}
RIVALS: dict[str, dict[str, Rival]] = {
    "attention": _ATTENTION,
    "attention-packed": _ATTENTION,
    "rms_norm": {"F.rms_norm": _rms_norm, "liger": _liger_rms_norm},
    "glu": {"liger, on copies": _liger_glu},
    "linear_cross_entropy": {"F.linear_cross_entropy": _linear_cross_entropy, "liger": _liger_loss},
    "quant_linear": {"bitsandbytes": _bitsandbytes},
    "moe_up": {"F.grouped_mm": _grouped_mm()},
}
"""Case of ``op_cases.py`` -> name -> rival."""
