"""The selective scan of state-space models (Gu & Dao, "Mamba", 2023).

Each channel d has N states h, driven by its input u and read out by C:

    h[t] = exp(delta[t] A) * h[t-1] + delta[t] u[t] B[t]
    y[t] = C[t] . h[t] + D u[t],   times silu(z[t]) where there is a gate

Backward keeps the inputs, and the states at the beginning of each chunk of time; the states in
between are computed again:

    g[t] = C[t] dy[t] + exp(delta[t+1] A) * g[t+1]      the gradient of h[t]
    dC = h dy;  dB = g delta u;  du = delta (B . g);  dA, ddelta by way of  g * exp(..) * h[t-1]

Where a segment begins (a sample that shares its row with others), ``exp(..)`` is zero.

In low precision all arithmetic is in fp32 and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..captured import capturable
from ..launch import library_op, without_base
from ..op import Maker, Op, kept_on_gpu, misshapen, on_several_devices
from ..second_order import differentiable, double_backward


# -- reference -------------------------------------------------------------------------------------
def scan_reference(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    segments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loop over time, rounding as model code does; see ``selective_scan``."""
    if delta_bias is not None:
        delta = delta + delta_bias.to(delta.dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    wide = torch.promote_types(u.dtype, torch.float32)
    state = torch.zeros(*u.shape[:2], A.shape[1], dtype=wide, device=u.device)
    outputs = []
    for t in range(u.shape[2]):
        step, drive = delta[:, :, t, None], B[:, None, :, t].to(wide)
        decay = torch.exp(A.to(wide) * step)
        if segments is not None:
            decay = decay.masked_fill((segments[:, t] == t)[:, None, None], 0)
        state = decay * state + step * drive * u[:, :, t, None].to(wide)
        outputs.append((state.to(u.dtype) @ C[:, :, t, None].to(u.dtype))[..., 0])
    y = torch.stack(outputs, dim=-1)
    if D is not None:
        y = y + u * D[:, None]
    return y if z is None else y * F.silu(z)


def output_dtype(u: Tensor, D: Tensor | None, z: Tensor | None) -> torch.dtype:
    """The dtype of the result: what the sum and the product promote to."""
    dtype = u.dtype
    for t in (D, z):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


# -- cpu -------------------------------------------------------------------------------------------
# Within a chunk of time the decays ``exp(delta A)`` and the states are held for all its steps, as
# (T, B, N, D): time outermost, so that one step of the recurrence is one fused call over a
# contiguous slab, and channels innermost, so that all else is long vectors. A chunk's buffers fit
# the cache, and all chunks use the same ones. Only the states at the chunks' beginnings are kept;
# backward computes the others again, chunk by chunk from the end. No difference of cumulated
# exponents is ever taken, so nothing can overflow, whatever A is.

_BUFFER = 1 << 18
"""Elements of one (T, B, N, D) buffer, as far as ``_SHORTEST`` allows."""

_SHORTEST, _LONGEST = 32, 128
"""Steps of time in a chunk. What is kept for backward shrinks with them, the buffers grow."""


def chunk_length(states: int, channels: int) -> int:
    """Steps of time in one chunk."""
    return max(_SHORTEST, min(_LONGEST, _BUFFER // max(1, states * channels)))


def samples_at_once(states: int, channels: int) -> int:
    """Samples that share a chunk's buffers."""
    return max(1, 2 * _BUFFER // max(1, chunk_length(states, channels) * states * channels))


@dataclass
class Prepared:
    """The inputs in the dtype and the layout of the arithmetic."""

    x: Tensor  # u, (B, L, D)
    raw: Tensor  # delta with its bias, before the softplus, (B, L, D)
    dt: Tensor  # the step, (B, L, D)
    a: Tensor  # A transposed, (N, D)
    b: Tensor  # (L, B, N)
    c: Tensor  # (L, B, N)
    d: Tensor | None  # (D,)
    z: Tensor | None  # (B, L, D)
    begins: Tensor | None  # whether a segment begins, (L, B)


def prepare(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, segments: Tensor | None = None,
) -> Prepared:  # fmt: skip
    """Bring the inputs (as ``selective_scan`` has them) into one dtype and order."""
    wide = torch.promote_types(u.dtype, torch.float32)

    def rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2).to(wide).contiguous()

    raw = rows(delta)
    if bias is not None:
        raw = raw + bias.to(wide)
    begins = None
    if segments is not None:
        places = torch.arange(segments.shape[1], device=segments.device)
        begins = (segments == places).t().contiguous()
    return Prepared(
        rows(u), raw, F.softplus(raw) if softplus else raw,
        a.to(wide).t().contiguous(),
        b.permute(2, 0, 1).to(wide).contiguous(), c.permute(2, 0, 1).to(wide).contiguous(),
        None if d is None else d.to(wide), None if z is None else z.transpose(1, 2).to(wide),
        begins,
    )  # fmt: skip


class _Chunk:
    def __init__(self, p: Prepared, span: slice) -> None:
        self.p, self.span = p, span
        x, dt = p.x[:, span].transpose(0, 1), p.dt[:, span].transpose(0, 1)
        self.dt, self.xdt = dt.unsqueeze(2), (x * dt).unsqueeze(2)  # (T, B, 1, D)

    def decays(self, out: Tensor) -> Tensor:
        """``exp(dt A)``, or zero where a segment begins: (T, B, N, D)."""
        decays = torch.mul(self.dt, self.p.a, out=out[: self.dt.shape[0]]).exp_()
        if self.p.begins is not None:
            begins = self.p.begins[self.span]
            if begins.is_cpu:  # a few slabs; elsewhere their number would be waited for
                decays[begins] = 0
            else:
                decays.masked_fill_(begins[..., None, None], 0)
        return decays

    def states(self, decays: Tensor, before: Tensor, out: Tensor) -> Tensor:
        """The states after each step, (T, B, N, D), from the one ``before`` the first."""
        h = torch.mul(self.xdt, self.p.b[self.span].unsqueeze(3), out=out[: self.dt.shape[0]])
        for now, decay in zip(h.unbind(0), decays.unbind(0), strict=True):
            now.addcmul_(decay, before)
            before = now
        return h

    def read(self, weights: Tensor, h: Tensor) -> Tensor:
        """The sum over the states, ``weights`` (L, B, N) times ``h``: (B, T, D)."""
        time, batch, states, channels = h.shape
        rows = weights[self.span].reshape(time * batch, 1, states)
        return torch.bmm(rows, h.view(-1, states, channels)).view(time, batch, -1).transpose(0, 1)

    def adjoints(self, decays: Tensor, grad: Tensor, after: Tensor, out: Tensor) -> Tensor:
        # The gradients of the states, (T, B, N, D); ``grad`` (B, L, D) is that of the outputs, and
        # ``after`` the next chunk's gradient of this one's last state.
        rows = grad[:, self.span].transpose(0, 1).unsqueeze(2)
        g = torch.mul(rows, self.p.c[self.span].unsqueeze(3), out=out[: self.dt.shape[0]])
        g[-1].add_(after)
        later = g[-1]
        steps = zip(g.unbind(0)[-2::-1], decays.unbind(0)[:0:-1], strict=True)
        for now, decay in steps:
            now.addcmul_(decay, later)
            later = now
        return g


def spans_of(length: int, size: int) -> Iterator[slice]:
    """Cut ``length`` into pieces of ``size``; the last may be shorter."""
    return (slice(i, min(i + size, length)) for i in range(0, length, size))


def _buffers(p: Prepared, size: int, count: int) -> list[Tensor]:
    (batch, length, channels), states = p.x.shape, p.a.shape[0]
    shape = (min(size, length), batch, states, channels)
    return [p.x.new_empty(shape) for _ in range(count)]


def forward(p: Prepared, starts: Tensor) -> Tensor:
    """The outputs before the gate, (B, L, D); writes the states before chunks to ``starts``."""
    length, size = p.x.shape[1], chunk_length(*p.a.shape)
    spans = list(spans_of(length, size))
    y = torch.empty_like(p.x)
    starts[:1] = 0
    decays, states = _buffers(p, size, 2)
    for k, span in enumerate(spans):
        chunk = _Chunk(p, span)
        h = chunk.states(chunk.decays(decays), starts[k], states)
        y[:, span] = chunk.read(p.c, h)
        if k + 1 < len(spans):
            starts[k + 1] = h[-1]
    if p.d is not None:
        y.addcmul_(p.x, p.d)
    return y


@dataclass
class Gradients:
    """Of ``Prepared``, ``a`` zero if not needed; ``y`` is the output before the gate, (B, L, D)."""

    x: Tensor
    raw: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    y: Tensor


def _over_channels(t: Tensor) -> Tensor:
    # The sum over the last dimension: of groups first, and of these in fp64. One sum in fp32 rounds
    # more than eager's does; one in fp64 would copy all that it reads.
    rest = t.shape[-1] % 64
    groups = t[..., rest:].unflatten(-1, (-1, 64)).sum(-1)
    total: Tensor = groups.sum(-1, dtype=torch.float64)
    return total + t[..., :rest].sum(-1, dtype=torch.float64) if rest else total


def backward(
    p: Prepared, grad: Tensor, starts: Tensor, softplus: bool, need_a: bool
) -> Gradients:  # fmt: skip
    """The gradients, from that of the outputs before the gate, (B, L, D)."""
    (batch, length, channels), size = p.x.shape, chunk_length(*p.a.shape)
    dx, ddt, y = (torch.empty_like(p.x) for _ in range(3))
    da, db, dc = p.a.new_zeros(p.a.shape, dtype=torch.float64), *map(torch.empty_like, (p.b, p.c))
    buffers = _buffers(p, size, 4)
    after = torch.zeros_like(starts[0])
    for k, span in reversed(list(enumerate(spans_of(length, size)))):
        chunk = _Chunk(p, span)
        time, shape = span.stop - span.start, (-1, p.a.shape[0], channels)
        decays = chunk.decays(buffers[0])
        h = chunk.states(decays, starts[k], buffers[1])
        y[:, span] = chunk.read(p.c, h)
        g = chunk.adjoints(decays, grad, after, buffers[2])
        rows = grad[:, span].transpose(0, 1).reshape(-1, channels, 1)
        dc[span] = torch.bmm(h.view(shape), rows).view(time, batch, -1)
        # as eager does: over many channels, a product of matrices is much less accurate than a sum
        db[span] = _over_channels(torch.mul(g, chunk.xdt, out=buffers[3][:time]))
        gathered = chunk.read(p.b, g)
        torch.mul(gathered, p.dt[:, span], out=dx[:, span])
        # the gradient of the exponents: a * g * (the state before)
        exponents = torch.mul(decays, g, out=g)
        after = exponents[0].clone()
        exponents[1:].mul_(h[:-1])
        exponents[0].mul_(starts[k])
        if need_a:
            da.add_(torch.mul(exponents, chunk.dt, out=decays).sum((0, 1)))
        from_decay = exponents.mul_(p.a).sum(2).transpose(0, 1)
        torch.addcmul(from_decay, gathered, p.x[:, span], out=ddt[:, span])
    if p.d is not None:
        dx.addcmul_(grad, p.d)
        y.addcmul_(p.x, p.d)
    if softplus:
        ddt.mul_(torch.where(p.raw > 20, 1.0, torch.sigmoid(p.raw)))
    return Gradients(dx, ddt, da, db, dc, y)


def _forward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, starts = _fake_forward(u, delta, a, b, c, d, z, bias, softplus)
    for rows in _groups(u, a):
        gate, begins = (None if t is None else t[rows] for t in (z, segments))
        p = prepare(u[rows], delta[rows], a, b[rows], c[rows], d, gate, bias, softplus, begins)
        y = forward(p, starts[:, rows])
        out[rows].transpose(1, 2).copy_(y if p.z is None else y.mul_(F.silu(p.z)))
    return without_base(out), starts


def _groups(u: Tensor, a: Tensor) -> list[slice]:
    channels, states = a.shape
    return list(spans_of(u.shape[0], samples_at_once(states, channels)))


def _backward(
    grad: Tensor, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
    z: Tensor | None, bias: Tensor | None, starts: Tensor, softplus: bool,
    segments: Tensor | None, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    every = _fake_gradients(u, delta, a, b, c, d, z, bias)
    du, ddelta, _, db, dc, _, dz, _ = every
    sums: list[Tensor | float] = [0.0, 0.0, 0.0]
    for rows in _groups(u, a):
        gate, begins = (None if t is None else t[rows] for t in (z, segments))
        p = prepare(u[rows], delta[rows], a, b[rows], c[rows], d, gate, bias, softplus, begins)
        outer = grad[rows].transpose(1, 2).to(p.x.dtype)
        inner = outer if p.z is None else outer * F.silu(p.z)
        g = backward(p, inner.contiguous(), starts[:, rows], softplus, needs[2])
        du[rows].transpose(1, 2).copy_(g.x)
        ddelta[rows].transpose(1, 2).copy_(g.raw)
        db[rows].copy_(g.b.permute(1, 2, 0))
        dc[rows].copy_(g.c.permute(1, 2, 0))
        if p.z is not None and needs[6]:
            s = torch.sigmoid(p.z)
            slope = (1 - s).mul_(p.z).add_(1).mul_(s)
            dz[rows].transpose(1, 2).copy_(slope.mul_(outer).mul_(g.y))
        sums[0] = sums[0] + g.a
        if needs[5]:
            sums[1] = sums[1] + (inner * p.x).sum((0, 1), dtype=torch.float64)
        if needs[7]:
            sums[2] = sums[2] + g.raw.sum((0, 1), dtype=torch.float64)
    for i, total in zip((2, 5, 7), sums, strict=True):
        every[i].copy_(total.t() if isinstance(total, Tensor) else every[i].new_zeros(()))
    return [g for g, needed in zip(every, needs, strict=True) if needed]


def _fake_forward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs (B, D, L), in memory (B, L, D) as the projection after it reads them; states."""
    (batch, channels, length), states = u.shape, a.shape[1]
    # never 1, for any length: that case would be a separate graph
    chunks = length // chunk_length(states, channels) + 2
    strides = (length * channels, 1, channels)  # no view: the model may write to it in place
    out = u.new_empty_strided((batch, channels, length), strides, dtype=output_dtype(u, d, z))
    wide = torch.promote_types(u.dtype, torch.float32)
    return out, u.new_empty(chunks, batch, states, channels, dtype=wide)


def _fake_gradients(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    every = []
    for t in (u, delta, a, b, c, d, z, bias):
        if t is None:
            every.append(u.new_empty(0))
        elif t.ndim == 3:  # in memory (B, L, ..), as the forward's output
            every.append(t.new_empty(t.shape[0], t.shape[2], t.shape[1]).transpose(1, 2))
        else:
            every.append(t.new_empty(t.shape))
    return every


def _fake_backward(grad: Tensor, *rest: Any) -> list[Tensor]:
    every = _fake_gradients(*rest[:8])
    return [g for g, needed in zip(every, rest[-1], strict=True) if needed]


# The loops over time would fix the length in a traced graph, so the two directions are opaque.
_INPUTS = (
    "Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? bias, "
)


def _flops(u: Tensor, delta: Tensor, a: Tensor, *_: Any) -> int:
    return 15 * u.numel() * a.shape[1]  # of a state: an exponential, taken as 8, and 7 more


def _backward_flops(grad: Tensor, *rest: Any) -> int:
    return 3 * _flops(*rest)


_forward_op = library_op(
    f"selective_scan_forward({_INPUTS}bool softplus, Tensor? segments) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
_backward_op = library_op(
    f"selective_scan_backward(Tensor grad, {_INPUTS}Tensor starts, bool softplus, "
    "Tensor? segments, bool[8] needs) -> Tensor[]",
    _backward,
    _fake_backward,
    _backward_flops,
)


# -- autograd --------------------------------------------------------------------------------------
@capturable
class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None,
        z: Tensor | None, bias: Tensor | None, softplus: bool, segments: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.set_materialize_grads(False)
        tensors = (u, delta, a, b, c, d, z, bias)
        ctx.options = softplus, segments
        out, starts = _forward_op(*tensors, *ctx.options)
        ctx.save_for_backward(*tensors, starts)
        result: Tensor = out
        return result

    @staticmethod
    @differentiable(double_backward(scan_reference, 8))
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:8])
        remaining = iter(_backward_op(grad, *tensors, starts, *ctx.options, needs))
        return *(next(remaining) if needed else None for needed in needs), None, None


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    segments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The outputs of a selective scan that starts from zero.

    Keeps its inputs and one state in ``chunk_length`` for backward; memory never grows with
    B * D * L * N.

    Args:
        u: (B, D, L), any strides.
        delta: (B, D, L): the steps.
        A: (D, N).
        B: (B, N, L).
        C: (B, N, L).
        D: (D,): how much of u is added, or None.
        z: (B, D, L): the gate, or None.
        delta_bias: (D,), added to delta, or None.
        delta_softplus: whether the steps are ``softplus(delta + delta_bias)``.
        segments: (B, L), int32: where the segment of each position begins, each scanned from zero;
            None: each row is one.

    Returns:
        (B, D, L), in memory (B, L, D), in the promoted dtype of u, D and z.

    Raises:
        ValueError: for what ``OP.unsupported`` lists.
    """
    reasons = scan_unsupported(u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments)
    if reasons:
        raise ValueError("; ".join(reasons))
    return _SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments)  # type: ignore[no-any-return, no-untyped-call]


# -- OP --------------------------------------------------------------------------------------------
def scan_unsupported(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    segments: Tensor | None = None,
) -> list[str]:  # fmt: skip
    """Why ``selective_scan`` cannot take these inputs; empty when it can."""
    tensors = [t for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]
    if any(not t.is_floating_point() for t in tensors):
        return ["an input is complex or an integer"]
    message = "the tensors are on different devices"
    if away := on_several_devices(*tensors, segments, message=message):
        return away
    if kept := kept_on_gpu(u):
        return kept
    if u.ndim != 3 or A.ndim != 2 or B.ndim != 3 or C.ndim != 3:
        return ["B and C are not one vector per position, or u has not 3 dimensions"]
    batch, channels, length = u.shape
    expected = (
        (delta, (batch, channels, length)), (A, (channels, A.shape[1])),
        (B, (batch, A.shape[1], length)), (C, (batch, A.shape[1], length)),
        (D, (channels,)), (z, (batch, channels, length)), (delta_bias, (channels,)),
        (segments, (batch, length)),
    )  # fmt: skip
    return misshapen("u", u, expected)


def _example(m: Maker) -> tuple[Any, ...]:
    channels, states = m.sizes.hidden, m.sizes.states
    u, delta, gate = (m.transposed(channels) for _ in range(3))
    b, c = m.transposed(states), m.transposed(states)
    skip, bias = m.weight(channels, dtype=m.wide), m.weight(channels, dtype=m.wide)
    return u, delta, m.decays(channels, states), b, c, skip, gate, bias, True


def _plain_example(m: Maker) -> tuple[Any, ...]:
    u, delta, *rest = _example(m)[:5]
    return u, delta.detach().abs().requires_grad_(), *rest


def _example_of_segments(m: Maker) -> tuple[Any, ...]:
    return *_example(m), m.segments()


OP = Op(
    "selective_scan",
    scan_reference,
    selective_scan,
    scan_unsupported,
    example=_example,
    variants={"plain": _plain_example, "segments": _example_of_segments},
)
