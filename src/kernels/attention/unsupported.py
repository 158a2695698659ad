"""Which inputs ``attention`` does not take, and with which it is no faster than PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import use_triton
from ..matmul import through_fp32
from ..processor import processor
from .first_keys import is_first_keys


def impossible(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, window: int | None,
    sinks: Tensor | None = None, softcap: float | None = None,
) -> list[str]:  # fmt: skip
    """Why the op has no meaning, or no implementation, for these inputs."""
    reasons = []
    on_cpu = q.device.type == k.device.type == v.device.type == "cpu"
    if not on_cpu and not (q.is_cuda and use_triton(q, k, v)):
        reasons.append("the tensors are not all on the CPU or, with Triton, on one GPU")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        reasons.append(f"one floating-point dtype is needed, not {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.ndim == k.ndim == v.ndim == 4:
        return [*reasons, "the tensors do not all have 4 dimensions"]
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        reasons.append(f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit")
    if q.shape[1] % k.shape[1]:
        reasons.append(f"{q.shape[1]} heads are not a multiple of {k.shape[1]}")
    if causal and (mask is not None or q.shape[2] != k.shape[2]):
        reasons.append("causal with a mask, or with more keys than positions")
    if window is not None and (not causal or window < 1):
        reasons.append("a window that is not causal or not positive")
    if mask is not None and mask.device != q.device:
        reasons.append(f"the mask is on {mask.device}, the rest on {q.device}")
    if mask is not None and (mask.ndim != 4 or mask.requires_grad):
        reasons.append("the mask has not 4 dimensions, or requires a gradient")
    if is_first_keys(mask):
        fits = mask.shape[0] in (1, q.shape[0]) and mask.shape[1:] == (1, q.shape[2], 1)
        if not fits or q.shape[2] != k.shape[2]:
            reasons.append(f"first keys of {tuple(mask.shape)} do not fit {tuple(q.shape)}")
    elif mask is not None and mask.ndim == 4:
        fits = mask.shape[0] in (1, q.shape[0]) and mask.shape[1] in (1, q.shape[1])
        if not fits:
            reasons.append(f"a mask of {tuple(mask.shape)} does not fit {tuple(q.shape)}")
    is_number = mask is not None and (mask.is_floating_point() or is_first_keys(mask))
    if mask is not None and mask.dtype is not torch.bool and not is_number:
        reasons.append(f"a mask of {mask.dtype} is neither boolean nor additive")
    if sinks is not None and (tuple(sinks.shape) != q.shape[1:2] or sinks.device != q.device):
        reasons.append(f"sinks of {tuple(sinks.shape)} on {sinks.device} are not one of each head")
    if sinks is not None and not sinks.is_floating_point():
        reasons.append(f"sinks are {sinks.dtype}, not floating-point")
    if softcap is not None and softcap <= 0:
        reasons.append("a softcap that is not positive")
    return reasons


def attention_unsupported(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool,
    mask: Tensor | None = None, window: int | None = None, sinks: Tensor | None = None,
    softcap: float | None = None,
) -> list[str]:  # fmt: skip
    """Why ``attention`` cannot take these inputs, or is no faster than PyTorch with them."""
    reasons = impossible(q, k, v, causal, mask, window, sinks, softcap)
    if sinks is not None or softcap is not None or is_first_keys(mask):
        return reasons  # PyTorch has no kernel for these
    if q.device.type != "cpu":
        return [*reasons, "on a GPU, PyTorch's own attention is as fast"]
    if through_fp32(q) and torch.bfloat16 in processor().slow_products:
        return reasons  # measured on AVX2 alone: PyTorch's kernel takes 2.4 to 8.7 times as long
    if q.dtype in (torch.float32, torch.float16):
        reasons.append(f"PyTorch's CPU kernel is as fast in {q.dtype}")
    if q.dtype is torch.bfloat16 and (why := _why_not_bfloat16()):
        reasons.append(why)
    return reasons


def _why_not_bfloat16() -> str:
    """Why PyTorch's kernel is as fast in bfloat16 on this CPU; empty where it is not."""
    # With AMX, PyTorch's kernel multiplies in tiles itself: measured on two cores over eleven
    # shapes (heads of 32 to 128, 128 to 2,048 positions), ours took 1.2 times its time in the
    # median, forward and backward together.
    if processor().amx:
        return "PyTorch's CPU kernel uses this CPU's AMX"
    if processor().avx512_bf16:
        return ""
    return "this CPU has no bfloat16 instructions"
