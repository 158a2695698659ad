"""Launches the Triton kernels of attention, and chooses their tiles.

forward     ``attention_forward_triton``, over tables of masks from ``attention_tiles_triton``
backward    ``attention_backward_triton``: two kernels
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..aot import AotCase
from ..launch import FP_FUSION, Gpu, dot_precision, gpu_of, next_power_of_2
from .attention_backward_triton import keys_kernel, queries_kernel
from .attention_forward_triton import forward_kernel
from .attention_plain import of_sinks
from .attention_tiles_triton import STEP, table_kernel
from .first_keys import is_first_keys, last_positions
from .sizes import GRAIN, HEADS

CHUNK = 128
"""Entries of a table that are looked at together."""


def _config(
    kernel: str, dim: int, value_dim: int, dtype: torch.dtype, gpu: Gpu, mode: str
) -> dict[str, int]:  # fmt: skip
    """Tiles of M positions and N keys, by what fits into registers and shared memory."""
    d, e = (max(16, next_power_of_2(n)) for n in (dim, value_dim))
    wide, strong = max(d, e), gpu.multiplies_from_shared
    small_tiles = kernel == "keys" or (kernel == "queries" and wide > 128)
    if gpu.hip and small_tiles and dtype is not torch.float32:
        # four waves have 512 registers a thread
        m, n, warps, stages = 32, 32, 4, 1
    elif dtype is torch.float32:  # the operands of these products are in registers
        m, n, warps, stages = 32, 32, 4 if kernel == "forward" else 8, 2
    elif wide > 128:
        m, n, warps, stages = _WIDE[kernel]
    elif kernel == "forward":
        # with first keys, wider tiles spill registers where these hold a product's operands
        narrow = mode == "samples" and wide > 64 and not (strong or gpu.hip)
        m, n, warps, stages = 128, 32 if narrow else 64, 8, 2
    elif kernel == "queries":
        m, n, warps, stages = (128, 32, 8, 2) if wide <= 64 or strong else (64, 32, 4, 2)
    elif wide > 64:  # on Blackwell's data-centre cards, a second stage spills registers
        m, n, warps, stages = 32, 64, 8, 1 if gpu.generation == 10 else 2
    else:
        m, n, warps, stages = (32, 128, 8, 2) if strong else (32, 32, 4, 2)
    return {
        "M": m, "N": n, "D": d, "E": e, "GRAIN": GRAIN, "CHUNK": CHUNK,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


_WIDE = {"forward": (64, 32, 8, 2), "queries": (32, 32, 8, 2), "keys": (32, 32, 8, 1)}
"""The same for heads of 256 features in 16 bits."""


def plain(t: Tensor) -> Tensor:
    """``t`` (..., T, D) with adjacent features, and rows near enough for 32-bit offsets."""
    return t if t.stride(-1) == 1 and t.stride(-2) < 1 << 23 else t.contiguous()


def mask_table(mask: Tensor) -> Tensor:
    """The table of a mask, which is made once for all layers that read it.

    It is kept on the mask's storage, and released with it; what PyTorch knows to have been written
    to, is read again.
    """
    # A recorded graph is to read what will be in the mask; tensors of inference have no version.
    if mask.is_inference() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return _table(mask)
    stream = torch.cuda.current_stream(mask.device).cuda_stream if mask.is_cuda else 0
    view = mask.dtype, mask.storage_offset(), mask.shape, mask.stride(), stream
    kept: dict[Any, tuple[int, Tensor]] = mask.untyped_storage().__dict__.setdefault(_KEPT, {})
    version, table = kept.get(view, (-1, mask))
    if version != mask._version:
        if len(kept) >= _MOST_VIEWS:  # parts of one mask for all lengths
            kept.clear()
        table = _table(mask)
        kept[view] = mask._version, table
    return table.clone()  # compilers may write into what an op has returned


_KEPT = "_fusewright_mask_tables"
_MOST_VIEWS = 4


def _table(mask: Tensor) -> Tensor:
    """See ``table_kernel``: of a mask (B, H, T or 1, S), whose table is (B, H, blocks, blocks).

    Of first keys, the last position that sees each key.
    """
    if is_first_keys(mask):
        return last_positions(mask)
    batch, heads, rows, keys = mask.shape
    row_blocks, blocks = -(-rows // GRAIN), -(-keys // GRAIN)
    table = torch.empty(
        (batch, heads, row_blocks, blocks + 1), dtype=torch.int8, device=mask.device
    )
    if not table.numel():
        return table
    boolean = mask.dtype is torch.bool
    table_kernel[(batch * heads * row_blocks,)](
        mask.view(torch.uint8) if boolean else mask, table, rows, keys, blocks, heads,
        *mask.stride(), 0.0 if boolean else torch.finfo(mask.dtype).min,
        ADDITIVE=not boolean, GRAIN=GRAIN, STEP=STEP // 2 if gpu_of(mask).hip else STEP,
        num_warps=4, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip
    return table


class _Call:
    """What all kernels are told.

    Attributes:
        pointers: q, k, v, mask and table, where there are these two.
        strides: of q, k and v.
        of_mask: the strides of mask and table, and the sizes of the table.
        sizes: heads, heads of a group, positions, keys, the window, and in base 2 the scale and
            the softcap.
        flags: MODE, CAPPED, PRECISION, and the features of keys and of values.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
        table: Tensor | None, window: int | None, softcap: float | None,
    ) -> None:  # fmt: skip
        q, k, v = (plain(t) for t in (q, k, v))
        self.q, self.k, self.v = q, k, v
        time, keys = q.shape[2], k.shape[2]
        mode, self.of_mask = "causal" if causal else "none", [0] * 8
        if mask is not None and table is not None:
            mode = "boolean" if mask.dtype is torch.bool else "additive"
            mode = "samples" if is_first_keys(mask) else mode
            mask = mask.view(torch.uint8) if mode == "boolean" else mask
            if max(mask.stride()[2:]) >= 1 << 23:
                mask = mask.contiguous()
            # one for all samples, heads or positions
            strides = [*mask.stride(), *table.stride()[:2]]
            shape = [*mask.shape, *table.shape[:2]]
            effective = [0 if n == 1 else s for n, s in zip(shape, strides, strict=True)]
            self.of_mask = [*effective, table.shape[2], table.shape[3] - 1]
        self.pointers = (q, k, v, q if mask is None else mask, q if table is None else table)
        self.strides = [s for t in (q, k, v) for s in t.stride()[:3]]
        wide = time + keys if window is None else window
        self.heads, self.share = q.shape[1], q.shape[1] // k.shape[1]
        factors = scale * math.log2(math.e), (softcap or 0.0) * math.log2(math.e)
        self.sizes = (self.heads, self.share, time, keys, wide, *factors)
        self.flags: dict[str, Any] = {
            "MODE": mode, "PRECISION": dot_precision(q.dtype),
            "DIM": q.shape[3], "VALUE_DIM": v.shape[3], "CAPPED": softcap is not None,
        }  # fmt: skip

    def config(self, kernel: str) -> dict[str, Any]:
        """The constants and options of a launch."""
        dims = self.q.shape[3], self.v.shape[3]
        chosen = _config(kernel, *dims, self.q.dtype, gpu_of(self.q), self.flags["MODE"])
        return self.flags | chosen | {"enable_fp_fusion": FP_FUSION}


def _like(t: Tensor, dim: int, splits: int = 1) -> Tensor:
    """(splits, B, H, T, dim), in memory (splits, B, T, H, dim); in fp32 if there are several."""
    batch, heads, time, _ = t.shape
    dtype = t.dtype if splits == 1 else torch.float32
    return t.new_empty((splits, batch, time, heads, dim), dtype=dtype).transpose(2, 3)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, mask: Tensor | None,
    table: Tensor | None, window: int | None, sinks: Tensor | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs (B, H, T, E) and the statistics (B, H, T, 2) of their rows."""
    out = _like(q, v.shape[3])[0]
    stats = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    if not out.numel():
        return out, stats
    call = _Call(q, k, v, scale, causal, mask, table, window, softcap)
    config = call.config("forward")
    blocks = -(-q.shape[2] // config["M"])
    forward_kernel[(blocks * q.shape[0] * q.shape[1],)](
        *call.pointers, out, stats, q if sinks is None else sinks.contiguous(), *call.strides,
        *out.stride()[:3], *call.of_mask, *call.sizes, SINKS=sinks is not None, **config,
    )  # fmt: skip
    return out, stats


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, scale: float,
    causal: bool, mask: Tensor | None, table: Tensor | None, window: int | None,
    sinks: Tensor | None, softcap: float | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The needed ones of dq, dk, dv and the gradient of sinks."""
    need_q, need_k, need_v, need_sinks = needs
    if not (q.numel() and k.numel() and v.numel()):
        pairs = zip((q, k, v), needs[:3], strict=True)
        grads = [_like(t, t.shape[3])[0].zero_() for t, needed in pairs if needed]
        return grads if sinks is None or not need_sinks else [*grads, torch.zeros_like(sinks)]
    call = _Call(q, k, v, scale, causal, mask, table, window, softcap)
    grad, half = plain(grad), q.dtype is torch.float16
    delta, dq = stats.new_empty(q.shape[:3]), _like(q, q.shape[3])[0] if need_q else grad
    if need_q or need_k or need_sinks:
        config = call.config("queries")
        blocks = -(-q.shape[2] // config["M"])
        queries_kernel[(blocks * q.shape[0] * q.shape[1],)](
            *call.pointers, grad, out, stats, delta, dq, *call.strides, *grad.stride()[:3],
            *out.stride()[:3], *dq.stride()[:3], *call.of_mask, *call.sizes, scale,
            NEEDS_DQ=need_q, HALF=half, **config,
        )  # fmt: skip
    grads = [dq] if need_q else []
    if need_k or need_v:
        grads += _of_keys(call, grad, stats, delta, scale, need_k, need_v)
    if sinks is not None and need_sinks:
        grads.append(of_sinks(sinks, stats, delta))
    return grads


def _of_keys(
    call: _Call, grad: Tensor, stats: Tensor, delta: Tensor, scale: float, need_k: bool,
    need_v: bool,
) -> list[Tensor]:  # fmt: skip
    k, v, splits = call.k, call.v, -(-call.share // HEADS)
    config = call.config("keys")
    dk, dv = (
        _like(t, t.shape[3], splits) if needed else delta.new_empty((1,) * 5)
        for t, needed in ((k, need_k), (v, need_v))
    )
    blocks = -(-k.shape[2] // config["N"])
    keys_kernel[(blocks * splits * k.shape[0] * k.shape[1],)](
        *call.pointers, grad, stats, delta, dk, dv, *call.strides, *grad.stride()[:3],
        *dk.stride()[:4], *dv.stride()[:4], *call.of_mask, *call.sizes, scale,
        GRADS="both" if need_k and need_v else "k" if need_k else "v", HEADS=HEADS,
        PER_HEAD=call.of_mask[1] != 0, HALF=call.q.dtype is torch.float16, **config,
    )  # fmt: skip
    grads = [t for t, needed in ((dk, need_k), (dv, need_v)) if needed]
    return [t[0] if splits == 1 else t.sum(0).to(k.dtype) for t in grads]


def _case(kernel: Any, name: str, dtype: str, mask: str, dim: int, value_dim: int) -> AotCase:
    """A kernel in the arithmetic of ``dtype``, with a mask of ``mask`` or without one."""
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    modes = {"u8": "boolean", "causal": "causal", "i32": "samples"}
    mode = modes.get(mask, "additive")
    config = _config(name, dim, value_dim, torch_dtype, gpu_of(torch.empty(0)), mode)
    constants = {k: v for k, v in config.items() if k.isupper()} | {
        "MODE": mode, "PRECISION": "ieee", "HALF": dtype == "fp16",
        "DIM": dim, "VALUE_DIM": value_dim, "HEADS": HEADS, "PER_HEAD": mask == dtype,
        "GRADS": "both", "NEEDS_DQ": True, "mask_key": 1, "SINKS": mask != "u8",
        "CAPPED": mask == dtype,
    }  # fmt: skip
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    pointers = dict.fromkeys(("q", "k", "v", "grad", "out", "dq", "dk", "dv"), f"*{dtype}")
    pointers |= dict.fromkeys(("stats", "delta", "sinks"), "*fp32")
    pointers |= {"table": "*i32" if mask == "i32" else "*i8"}
    pointers |= {"mask": f"*{dtype if mask == 'causal' else mask}"}
    types = pointers | dict.fromkeys(("scale", "cap", "factor"), "fp32")
    rows = [a for a in kernel.arg_names if a.endswith("_row") and a != "mask_row"]
    return AotCase(
        name=f"attention_{name}-{dtype}-{mask}-{dim}-{value_dim}",
        kernel=kernel,
        signature={a: types.get(a, "i32") for a in kernel.arg_names if a not in constants},
        constants=constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        divisible=tuple(rows),
    )


def _cases() -> tuple[AotCase, ...]:
    cases = [
        AotCase(
            f"attention_table-{kind}", table_kernel,
            {a: "i32" for a in table_kernel.arg_names if a != "mask_key"}
            | {"mask": f"*{kind}", "table": "*i8", "smallest": "fp32"},
            {"ADDITIVE": kind != "u8", "GRAIN": GRAIN, "STEP": STEP, "mask_key": 1},
        )
        for kind in ("u8", "bf16", "fp32")
    ]  # fmt: skip
    kernels = ("forward", forward_kernel), ("queries", queries_kernel), ("keys", keys_kernel)
    for dtype, mask, dim, value_dim in (
        ("bf16", "u8", 64, 64), ("bf16", "bf16", 128, 128), ("bf16", "u8", 192, 128),
        ("fp16", "u8", 80, 80), ("fp32", "fp32", 64, 64), ("fp32", "causal", 40, 40),
        ("bf16", "i32", 64, 64),
    ):  # fmt: skip
        cases += (_case(k, name, dtype, mask, dim, value_dim) for name, k in kernels)
    return tuple(cases)


AOT = _cases()
