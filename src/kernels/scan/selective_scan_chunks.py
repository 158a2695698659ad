"""The selective scan in plain PyTorch, chunk of time by chunk of time.

Within a chunk the decays ``exp(delta A)`` and the states are held for all its steps, as
(T, B, N, D): time outermost, so that one step of the recurrence is one fused call over a contiguous
slab, and channels innermost, so that all else is long vectors. A chunk's buffers fit the cache, and
all chunks use the same ones. Between forward and backward only the states at the chunks' beginnings
are kept; backward computes the others again, chunk by chunk from the end.

No difference of cumulated exponents is ever taken, so nothing can overflow, whatever A is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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
    """The inputs in the dtype and the layout of the arithmetic.

    Attributes:
        x: u, (B, L, D).
        raw: delta with its bias, before the softplus, (B, L, D).
        dt: the step, (B, L, D).
        a: A transposed, (N, D).
        b: (L, B, N).
        c: (L, B, N).
        d: (D,) or None.
        z: (B, L, D) or None.
    """

    x: Tensor
    raw: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    z: Tensor | None


def prepare(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None,
    bias: Tensor | None, softplus: bool,
) -> Prepared:  # fmt: skip
    """Bring the inputs (as ``selective_scan`` has them) into one dtype and order."""
    wide = torch.promote_types(u.dtype, torch.float32)

    def rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2).to(wide).contiguous()

    raw = rows(delta)
    if bias is not None:
        raw = raw + bias.to(wide)
    return Prepared(
        rows(u), raw, F.softplus(raw) if softplus else raw,
        a.to(wide).t().contiguous(),
        b.permute(2, 0, 1).to(wide).contiguous(), c.permute(2, 0, 1).to(wide).contiguous(),
        None if d is None else d.to(wide), None if z is None else z.transpose(1, 2).to(wide),
    )  # fmt: skip


class _Chunk:
    """The part of the inputs that one chunk reads, and the arithmetic on it.

    Attributes:
        span: its steps of time.
        dt: (T, B, 1, D).
        xdt: x times dt, (T, B, 1, D).
    """

    def __init__(self, p: Prepared, span: slice) -> None:
        self.p, self.span = p, span
        x, dt = p.x[:, span].transpose(0, 1), p.dt[:, span].transpose(0, 1)
        self.dt, self.xdt = dt.unsqueeze(2), (x * dt).unsqueeze(2)

    def decays(self, out: Tensor) -> Tensor:
        """``exp(dt A)``, (T, B, N, D)."""
        return torch.mul(self.dt, self.p.a, out=out[: self.dt.shape[0]]).exp_()

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
        """The gradients of the states, (T, B, N, D).

        Args:
            decays: of this chunk.
            grad: of the outputs, (B, L, D).
            after: what the next chunk hands back to this one's last state.
            out: the buffer.
        """
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
    """The outputs before the gate, (B, L, D).

    Args:
        p: the inputs.
        starts: (K, B, N, D), written: the states before each chunk.
    """
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
    """As the inputs in ``Prepared``; ``y`` are the outputs before the gate, (B, L, D).

    The gradient of ``a`` is zero where it was not wanted.
    """

    x: Tensor
    raw: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    y: Tensor


def _over_channels(t: Tensor) -> Tensor:
    """The sum over the last dimension: of groups first, and of these in fp64.

    One sum in fp32 rounds more than eager's does; one in fp64 would copy all that it reads.
    """
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
