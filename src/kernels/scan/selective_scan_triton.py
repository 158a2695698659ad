"""Triton kernels of the selective scan: one program for some channels of a sample.

A program goes through time chunk by chunk, with the tile (T, D, N) of a chunk in registers and an
associative scan along T. Forward keeps the states before each chunk; backward goes through the
chunks from the end and computes the others again. What many programs add to (the gradients of B and
C, which all channels share) is written once per program and added up afterwards, always in one
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import AotCase
from ..launch import FP_FUSION, cdiv, gpu_of, next_power_of_2
from ..launcher import launched
from .selective_scan_tiles_triton import (
    combine,
    decays,
    gradients_of_states,
    states_before,
    step,
    tile,
    vector,
)


@launched
@triton.jit
def _forward_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, segments_ptr, out_ptr,
    starts_ptr,
    ub, ud, ul, tb, td, tt, bb, bn, bl, cb, cn, cl, zb, zd, zl,
    length, channels, states, batch, blocks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Outputs (B, L, D) contiguous, and states (K, B, N, D) before each chunk."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    ds = (tl.program_id(0) % blocks).to(tl.int64) * D + tl.arange(0, D)
    ns, steps = tl.arange(0, N), tl.arange(0, T)
    dm, nm = ds < channels, ns < states
    dn = dm[:, None] & nm[None, :]
    a = tl.load(a_ptr + ds[:, None] * states + ns[None, :], mask=dn, other=0.0).to(tl.float32)
    bias = tl.zeros((D,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + ds, mask=dm, other=0.0).to(tl.float32)
    h = tl.zeros((D, N), tl.float32)
    for k in range(0, tl.cdiv(length, T)):
        rows = (k * T + steps).to(tl.int64)
        rm = rows < length
        td_mask, tn_mask = rm[:, None] & dm[None, :], rm[:, None] & nm[None, :]
        tl.store(
            starts_ptr + ((k * batch + sample) * states + ns[None, :]) * channels + ds[:, None],
            h, mask=dn,
        )  # fmt: skip
        place = u_ptr + sample * ub + rows[:, None] * ul + ds[None, :] * ud
        x = tl.load(place, mask=td_mask, other=0.0).to(tl.float32)
        place = delta_ptr + sample * tb + rows[:, None] * tt + ds[None, :] * td
        raw = tl.load(place, mask=td_mask, other=0.0).to(tl.float32) + bias[None, :]
        dt, _ = step(raw, td_mask, SOFTPLUS)
        place = b_ptr + sample * bb + rows[:, None] * bl + ns[None, :] * bn
        b = tl.load(place, mask=tn_mask, other=0.0).to(tl.float32)
        place = c_ptr + sample * cb + rows[:, None] * cl + ns[None, :] * cn
        c = tl.load(place, mask=tn_mask, other=0.0).to(tl.float32)
        decay = decays(dt, a, segments_ptr + sample * length, rows, rm, HAS_SEGMENTS)
        drive = (dt * x)[:, :, None] * b[:, None, :]
        total, local = tl.associative_scan((decay, drive), 0, combine)
        local += total * h[None, :, :]
        y = tl.sum(local * c[:, None, :], 2)
        h = tl.sum(tl.where((steps == T - 1)[:, None, None], local, 0.0), 0)
        if HAS_D:
            y += x * tl.load(d_ptr + ds, mask=dm, other=0.0).to(tl.float32)[None, :]
        if HAS_Z:
            place = z_ptr + sample * zb + rows[:, None] * zl + ds[None, :] * zd
            z = tl.load(place, mask=td_mask, other=0.0).to(tl.float32)
            y *= z / (1.0 + tl.exp(-z))
        place = out_ptr + (sample * length + rows[:, None]) * channels + ds[None, :]
        tl.store(place, y, mask=td_mask)


@launched
@triton.jit
def _backward_kernel(
    grad_ptr, u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, segments_ptr,
    starts_ptr,
    du_ptr, ddelta_ptr, dz_ptr, da_ptr, dd_ptr, db_ptr, dc_ptr,
    gb, gd, gl, ub, ud, ul, tb, td, tt, bb, bn, bl, cb, cn, cl, zb, zd, zl,
    length, channels, states, batch, blocks,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """du, ddelta, dz (B, L, D); da (B, D, N) and dd (B, D); db, dc (blocks, B, L, N), to add up."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    u_ptr, delta_ptr, b_ptr = u_ptr + sample * ub, delta_ptr + sample * tb, b_ptr + sample * bb
    segments_ptr += sample * length
    ds = block.to(tl.int64) * D + tl.arange(0, D)
    ns, steps = tl.arange(0, N), tl.arange(0, T)
    dm, nm = ds < channels, ns < states
    dn = dm[:, None] & nm[None, :]
    a = tile(a_ptr, ds, ns, states, 1, dn)
    bias, skip = vector(bias_ptr, ds, dm, HAS_BIAS), vector(d_ptr, ds, dm, HAS_D)
    after, da = tl.zeros((D, N), tl.float32), tl.zeros((D, N), tl.float32)
    dd = tl.zeros((D,), tl.float32)
    chunks = tl.cdiv(length, T)
    for i in range(0, chunks):
        k = chunks - 1 - i
        rows = (k * T + steps).to(tl.int64)
        rm = rows < length
        td_mask, tn_mask = rm[:, None] & dm[None, :], rm[:, None] & nm[None, :]
        x = tile(u_ptr, rows, ds, ul, ud, td_mask)
        raw = tile(delta_ptr, rows, ds, tt, td, td_mask) + bias[None, :]
        dt, slope = step(raw, td_mask, SOFTPLUS)
        b = tile(b_ptr, rows, ns, bl, bn, tn_mask)
        c = tile(c_ptr + sample * cb, rows, ns, cl, cn, tn_mask)
        decay = decays(dt, a, segments_ptr, rows, rm, HAS_SEGMENTS)
        place = starts_ptr + (k * batch + sample) * states * channels
        before = decay * states_before(
            u_ptr, delta_ptr, b_ptr, segments_ptr, ul, ud, tt, td, bl, bn, rows, rm, ds, ns,
            td_mask, tn_mask, bias, a, tile(place, ds, ns, 1, channels, dn), SOFTPLUS, HAS_SEGMENTS,
        )  # fmt: skip
        h = before + (dt * x)[:, :, None] * b[:, None, :]
        grad = tile(grad_ptr + sample * gb, rows, ds, gl, gd, td_mask)
        flat = (sample * length + rows[:, None]) * channels + ds[None, :]
        if HAS_Z:
            z = tile(z_ptr + sample * zb, rows, ds, zl, zd, td_mask)
            gate = 1.0 / (1.0 + tl.exp(-z))
            y = tl.sum(h * c[:, None, :], 2) + x * skip[None, :]
            tl.store(dz_ptr + flat, grad * y * gate * (1.0 + z * (1.0 - gate)), mask=td_mask)
            grad *= z * gate
        rise = grad[:, :, None] * c[:, None, :]
        g = gradients_of_states(
            delta_ptr, segments_ptr, tt, td, rows, ds, dm, length, bias, a, rise, after, SOFTPLUS,
            HAS_SEGMENTS,
        )  # fmt: skip
        after = tl.sum(tl.where((steps == 0)[:, None, None], g * decay, 0.0), 0)
        shared = ((block * batch + sample) * length + rows[:, None]) * states + ns[None, :]
        tl.store(dc_ptr + shared, tl.sum(h * grad[:, :, None], 1), mask=tn_mask)
        tl.store(db_ptr + shared, tl.sum(g * (dt * x)[:, :, None], 1), mask=tn_mask)
        gathered = tl.sum(g * b[:, None, :], 2)
        tl.store(du_ptr + flat, gathered * dt + grad * skip[None, :], mask=td_mask)
        exponents = g * before
        da += tl.sum(exponents * dt[:, :, None], 0)
        ddt = gathered * x + tl.sum(exponents * a[None, :, :], 2)
        tl.store(ddelta_ptr + flat, ddt * slope, mask=td_mask)
        dd += tl.sum(grad * x, 0)
    tl.store(da_ptr + (sample * channels + ds[:, None]) * states + ns[None, :], da, mask=dn)
    tl.store(dd_ptr + sample * channels + ds, dd, mask=dm)


def _config(states: int, elements: int = 4096) -> dict[str, int]:
    """Tiles of so many elements at most: each thread holds several of them at once."""
    n = max(2, next_power_of_2(states))
    return {"T": 16, "D": max(2, min(16, elements // (16 * n))), "N": n}


def forward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, segments: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See ``kernels.selective_scan``; the states are those before each of our chunks."""
    (batch, channels, length), states = u.shape, a.shape[1]
    config = _config(states)
    out = u.new_empty(batch, length, channels, dtype=dtype)
    chunks = length // config["T"] + 2
    starts = u.new_empty(chunks, batch, states, channels, dtype=torch.float32)
    blocks = cdiv(channels, config["D"])
    if out.numel():
        _forward_kernel[(batch * blocks,)](
            u, delta, a.contiguous(), b, c, *_vectors(u, d, z, bias, segments), out, starts,
            *_strides(u, delta, b, c, u if z is None else z),
            length, channels, states, batch, blocks,
            HAS_D=d is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None,
            SOFTPLUS=softplus, HAS_SEGMENTS=segments is not None, **config, num_warps=4,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return out.transpose(1, 2), starts


def backward(
    grad: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    z: Tensor | None, bias: Tensor | None, starts: Tensor, softplus: bool,
    segments: Tensor | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed of (u, delta, a, b, c, d, z, bias)."""
    (batch, channels, length), states = u.shape, a.shape[1]
    hip = gpu_of(u).hip  # whose warps are twice as wide, and have half as many registers a thread
    config = _config(states, 2048 if hip else 4096)
    blocks = cdiv(channels, config["D"])
    rows = (batch, length, channels)
    du, ddelta = u.new_empty(rows), u.new_empty(rows, dtype=torch.float32)
    dz = du if z is None else z.new_empty(rows)
    wide = {"dtype": torch.float32, "device": u.device}
    da, dd = torch.zeros(batch, channels, states, **wide), torch.zeros(batch, channels, **wide)
    db, dc = torch.zeros(2, blocks, batch, length, states, **wide)
    if du.numel():
        _backward_kernel[(batch * blocks,)](
            grad, u, delta, a.contiguous(), b, c, *_vectors(u, d, z, bias, segments), starts,
            du, ddelta, dz, da, dd, db, dc,
            *_strides(grad, u, delta, b, c, u if z is None else z),
            length, channels, states, batch, blocks,
            HAS_D=d is not None, HAS_Z=z is not None, HAS_BIAS=bias is not None,
            SOFTPLUS=softplus, HAS_SEGMENTS=segments is not None, **config,
            num_warps=4 if hip else 8,
            enable_fp_fusion=FP_FUSION,
        )  # fmt: skip

    def summed(t: Tensor, like: Tensor | None) -> Tensor:
        return t if like is None else t.sum(0).to(like.dtype)

    makers = (
        lambda: du.transpose(1, 2), lambda: ddelta.to(delta.dtype).transpose(1, 2),
        lambda: summed(da, a),
        lambda: summed(db, b).transpose(1, 2), lambda: summed(dc, c).transpose(1, 2),
        lambda: summed(dd, d), lambda: dz.transpose(1, 2),
        lambda: summed(ddelta.sum(1), bias),
    )  # fmt: skip
    return [make() for make, needed in zip(makers, needs, strict=True) if needed]


def _vectors(
    u: Tensor, d: Tensor | None, z: Tensor | None, bias: Tensor | None, segments: Tensor | None
) -> list[Tensor]:
    """What may be missing; ``u`` stands in for it, unread."""
    dense = (None if t is None else t.contiguous() for t in (d, bias, segments))
    first, *rest = (u if t is None else t for t in dense)
    return [first, u if z is None else z, *rest]


def _strides(*tensors: Tensor) -> list[int]:
    return [s for t in tensors for s in t.stride()]


def _cases() -> tuple[AotCase, ...]:
    cases = []
    for dtype, states, full in (("bf16", 16, True), ("fp32", 8, False), ("fp16", 64, True)):
        for name, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel)):
            signature: dict[str, str] = {}
            for argument in kernel.arg_names:
                if argument.endswith("_ptr"):
                    is_fp32 = argument[:-4] in ("a", "d", "bias", "starts", "da", "dd", "db", "dc")
                    signature[argument] = "*fp32" if is_fp32 else f"*{dtype}"
                else:
                    signature[argument] = "i64" if len(argument) == 2 else "i32"
            signature |= {"ddelta_ptr": "*fp32", "segments_ptr": "*i32"}
            flags = dict.fromkeys(("HAS_D", "HAS_Z", "HAS_BIAS", "SOFTPLUS", "HAS_SEGMENTS"), full)
            constants = {**flags, **_config(states)}
            signature = {k: v for k, v in signature.items() if k in kernel.arg_names}
            cases.append(AotCase(f"scan_{name}_{dtype}_{states}", kernel, signature, constants))
    return tuple(cases)


AOT = _cases()
