"""Linear attention by the gated delta rule, in chunks of time that are products of matrices.

Each head has a state S (K, V) that decays, forgets what it holds for the key, and takes the value:

    S[t] = exp(g[t]) S[t-1];   S[t] += beta[t] k[t] (v[t] - k[t] S[t])^T;   o[t] = q[t] S[t]

In ``gated_delta_rule`` the decay is one number per head (Yang et al., "Gated Delta Networks",
2024), in ``kda`` one for each feature of the key (Kimi Team, "Kimi Linear", 2025).

Within a chunk, with G the sum of g from its beginning, and S the state before it,

    P[i,j] = q[i] exp(G[i] - G[j]) k[j],  j <= i;     M likewise, of k[i] for j < i
    Z = (1 + beta M)^-1 beta (v - exp(G) k S)         what is written: one triangular system
    o = exp(G) q S + P Z;     S' = exp(G[last]) S + (exp(G[last] - G) k)^T Z

Exponents are of differences that are negative wherever decays are: where each feature has its own,
P and M are made of blocks in whose middle both factors are split, so that nothing overflows.

Backward keeps the inputs and the states between chunks, and computes the rest again, chunk by chunk
from the end; nothing of length x length is ever made. In low precision all arithmetic is in fp32
and the result is rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..captured import capturable
from ..launch import cdiv, library_op
from ..native import delta_rule as native
from ..op import Maker, Op, kept_on_gpu, misshapen, not_floating, on_several_devices
from ..second_order import differentiable, double_backward

EPSILON = 1e-6
"""Added to the squares of a query or a key before their root is taken."""

CHUNK = 64
"""Steps of time in a chunk."""

_LANE = 1 << 17
"""Elements of the states of the heads that are computed at a time on the CPU: its cache's."""


# -- reference -------------------------------------------------------------------------------------
def delta_rule_reference(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, l2norm: bool = False, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One chunk of the whole length, rounding as model code does; see ``gated_delta_rule``."""
    wide, each = _wide(query), value.shape[2] // key.shape[2]
    q, k, v, g, beta = (t.to(wide).transpose(1, 2) for t in (query, key, value, g, beta))
    if l2norm:
        q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + EPSILON) for t in (q, k))
    q, k = (t.repeat_interleave(each, 1) for t in (q * q.shape[-1] ** -0.5, k))
    g, beta = (g if g.ndim == 4 else g.unsqueeze(-1)), beta.unsqueeze(-1)
    below = torch.ones(v.shape[2], v.shape[2], dtype=torch.bool, device=v.device).tril()
    seen = below if segments is None else below & _same(segments)[:, None]
    # decay[i, j] is what is left at step i of what was written at step j: (B, H, L, L, 1 or K)
    total = g.cumsum(2)
    decay = total.unsqueeze(3) - total.unsqueeze(2)
    decay = decay.masked_fill(~seen.unsqueeze(-1), -torch.inf).exp()
    if g.shape[-1] == 1:
        p, m = (t @ k.mT * decay.squeeze(-1) for t in (q, k))
    else:
        p, m = ((t.unsqueeze(3) * k.unsqueeze(2) * decay).sum(-1) for t in (q, k))
    read = total.exp()
    state = v.new_zeros(v.shape[0], v.shape[1], k.shape[3], v.shape[3])
    if initial_state is not None:
        state = initial_state.to(wide)
    rows = beta * (v - read * k @ state)
    z = torch.linalg.solve_triangular(beta * m, rows, upper=False, unitriangular=True)
    out = (read * q @ state + p @ z).transpose(1, 2).to(query.dtype)
    return out, read[:, :, -1, :, None] * state + (k * decay[:, :, -1]).mT @ z


def _same(segments: Tensor) -> Tensor:
    """Whether position j is not before the segment of position i: (B, L, L)."""
    places = torch.arange(segments.shape[1], device=segments.device)
    return places >= segments.unsqueeze(-1)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# -- cpu -------------------------------------------------------------------------------------------
# In fp32 and bf16, with one decay per head, a kernel in C++ does all this
# (``native/delta_rule.py``) where there is a compiler; elsewhere PyTorch's calls do. Some heads of
# some samples, the *lanes* of a tile, go through all chunks together: small enough for the cache,
# enough of them for products of matrices to be fast. Tensors of a tile have the chunks first,
# (N, lanes, C, ...), zero beyond the end. Query and key are neighbours, (.., C, 2, K): what is done
# to both is one product.


@dataclass
class _Tile:
    """The inputs of some heads of some samples."""

    x: Tensor  # query, scaled, and key: (N, lanes, C, 2, K)
    v: Tensor  # (N, lanes, C, V)
    g: Tensor  # sums of the decays from the beginning of the chunk: (N, lanes, C, 1 or K)
    beta: Tensor  # (N, lanes, C, 1)
    begins: Tensor | None  # the segment's first step, from the chunk's: (N, lanes, C)
    norms: Tensor | None  # what both were multiplied by, (N, lanes / each, C, 2, 1)
    each: int  # heads of values for each of the keys


def _places(whole: Tensor, chunked: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Equal parts of (B, L, H, ..) and of (N, B H, C, ..), as views: whole chunks, and the rest."""
    apart = chunked.unflatten(1, (whole.shape[0], whole.shape[2]))  # type: ignore[no-untyped-call]
    apart = apart.transpose(0, 1).transpose(2, 3)
    full, rest = divmod(whole.shape[1], apart.shape[2])
    if full:
        cut = whole[:, : whole.shape[1] - rest].unflatten(1, (full, -1))  # type: ignore[no-untyped-call]
        yield cut, apart[:, :full]
    if rest:
        yield whole[:, whole.shape[1] - rest :], apart[:, full, :rest]


def _chunked(t: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """(B, L, H, ..) as (N, B H, C, ..), zero beyond the end; ``out`` is zero there."""
    if out is None:
        shape = cdiv(t.shape[1], CHUNK), t.shape[0] * t.shape[2], CHUNK, *t.shape[3:]
        out = t.new_zeros(shape, dtype=dtype)
    for source, target in _places(t, out):
        target.copy_(source)
    return out


def _write(chunked: Tensor, whole: Tensor) -> None:
    for target, source in _places(whole, chunked):
        target.copy_(source)


def _spans(q: Tensor, v: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """(samples, heads of keys, heads of values) of each tile."""
    (batch, _, heads, width), each = q.shape, v.shape[2] // max(1, q.shape[2])
    lanes = max(1, _LANE // max(1, width * v.shape[3])) if q.is_cpu else batch * v.shape[2]
    count = max(1, min(heads, lanes // max(1, each)))
    samples = max(1, lanes // max(1, heads * each))
    for b in range(0, batch, samples):
        for h in range(0, heads, count):
            stop = min(h + count, heads)
            yield slice(b, b + samples), slice(h, stop), slice(h * each, stop * each)


def _tile(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, l2norm: bool,
    segments: Tensor | None, at: tuple[slice, slice, slice],
) -> _Tile:  # fmt: skip
    rows, keys, values = at
    q, k = q[rows, :, keys], k[rows, :, keys]
    v, g, beta = (t[rows, :, values] for t in (v, g, beta))
    wide, (batch, length, heads, width), each = _wide(q), q.shape, v.shape[2] // q.shape[2]
    units = q.new_zeros((cdiv(length, CHUNK), batch * heads, CHUNK, 2, width), dtype=wide)
    for t, place in zip((q, k), units.unbind(3), strict=True):
        _chunked(t, wide, place)
    norms = None
    if l2norm:
        norms = units.square().sum(-1, keepdim=True).add_(EPSILON).rsqrt_()
        units.mul_(norms)
    x = units if each == 1 else units.repeat_interleave(each, 1)
    x[:, :, :, 0] *= width**-0.5
    decays = _chunked(g if g.ndim == 4 else g.unsqueeze(-1), wide).cumsum(2)
    begins = None
    if segments is not None:
        # beyond the end, the last segment goes on
        begins = torch.cat((segments[rows], segments[rows, -1:].expand(-1, -length % CHUNK)), 1)
        begins = begins.view(batch, -1, CHUNK).transpose(0, 1)
        begins = begins - CHUNK * torch.arange(begins.shape[0], device=q.device)[:, None, None]
        begins = begins.repeat_interleave(v.shape[2], 1)
    return _Tile(
        x,
        _chunked(v, wide),
        decays,
        _chunked(beta.unsqueeze(-1), wide),
        begins,
        norms,
        each,
    )


class _Chunk:
    """One chunk of a tile: its decays, and the matrices that they make of queries and keys."""

    def __init__(self, tile: _Tile, index: int) -> None:
        self.x, self.v, self.beta = tile.x[index], tile.v[index], tile.beta[index]
        self.k = self.x[:, :, 1].contiguous()
        g, steps = tile.g[index], self.x.shape[1]
        self.seen = torch.ones(steps, steps, dtype=torch.bool, device=g.device).tril_()
        read, write = g.exp(), (g[:, -1:] - g).exp_()  # from the state before, and to the one after
        if tile.begins is not None:
            first = tile.begins[index].unsqueeze(-1)
            places = torch.arange(steps, device=g.device)
            self.seen = self.seen & (places >= first)
            read.mul_(first < 0)
            write.mul_(places.unsqueeze(-1) >= first[:, -1:])
        self.through = read[:, -1].unsqueeze(-1)  # (lanes, 1 or K, 1)
        self.read, self.write = read.unsqueeze(2), write
        self.both = torch.mul(self.x, self.read)  # (lanes, C, 2, K), as all that follows
        self.written = self.k * write
        self.split = _Blocks(self.x, g) if g.shape[-1] > 1 else None
        if self.split is None:
            self.decay = (g - g.mT).masked_fill_(~self.seen, -torch.inf).exp_().unsqueeze(2)
            scores = self.flat(self.x) @ self.k.mT
            scores = scores.view(*self.x.shape[:3], -1).mul_(self.decay)
        else:
            scores = self.split.scores()
            if tile.begins is not None:
                scores.mul_(self.seen.unsqueeze(-2))
        self.p, self.m = scores[:, :, 0].contiguous(), scores[:, :, 1]
        self.system = self.m * self.beta  # what is on and above the diagonal is not read

    @staticmethod
    def flat(t: Tensor) -> Tensor:
        """(lanes, C, 2, ..) -> (lanes, 2 C, ..)."""
        return t.flatten(1, 2)

    def read_state(self, state: Tensor) -> Tensor:
        """What queries and keys find in the state before the chunk: (lanes, C, 2, V)."""
        found: Tensor = (self.flat(self.both) @ state).unflatten(1, (-1, 2))  # type: ignore[no-untyped-call]
        return found

    def solve(self, rows: Tensor) -> Tensor:
        result: Tensor = torch.linalg.solve_triangular(
            self.system, rows, upper=False, unitriangular=True
        )
        return result

    def backward(self, state: Tensor, grad: Tensor, after: Tensor) -> tuple[Tensor, ...]:
        """Gradients of x, v, g, beta and ``state``, from those of the outputs and the state after.

        ``state`` is the one before the chunk; the gradient of x does not know of the scale.
        """
        error = self.v - self.read_state(state)[:, :, 1]
        z = self.solve(error * self.beta)
        dz = torch.baddbmm(self.written @ after, self.p.mT, grad)
        dy = torch.linalg.solve_triangular(self.system.mT, dz, upper=True, unitriangular=True)
        dscores = self.flat(torch.stack((grad, -dy), 2)) @ z.mT
        dscores = dscores.view(*self.x.shape[:3], -1)
        dm = dscores[:, :, 1]
        dm.diagonal(dim1=1, dim2=2).zero_()
        dbeta = (dm * self.m).sum(-1) + (dy * error).sum(-1)
        dm.mul_(self.beta)
        dv = dy.mul_(self.beta)
        outer = self.flat(torch.stack((grad, -dv), 2))
        dx = (outer @ state.mT).view(self.x.shape).mul_(self.read)
        before = torch.baddbmm(after * self.through, self.flat(self.both).mT, outer)
        dcolumns = (z @ after.mT).mul_(self.write)
        last = (self.k * dcolumns).sum(1) + (self.through * state * after).sum(-1)
        if self.split is None:
            dscores.mul_(self.decay)
            flat = self.flat(dscores)
            dx.add_((flat @ self.k).view(self.x.shape))
            dcolumns.baddbmm_(flat.mT, self.flat(self.x))
        else:
            dscores.mul_(self.seen.unsqueeze(-2))
            self.split.backward(dscores, dx, dcolumns)
        dg = (self.x * dx).sum(2).sub_(self.k * dcolumns)
        dx[:, :, 1].add_(dcolumns)
        dg[:, -1].add_(last)
        if self.split is None:
            dg = dg.sum(-1, keepdim=True)
        # a step's decay counts in all sums of its segment from there on
        return dx, dv, self.seen.mT.to(dg.dtype) @ dg, dbeta.unsqueeze(-1), before


class _Blocks:
    """P and M where each feature has its own decay, in blocks.

    The steps of a chunk are halved, and these again. From a step j of a lower half to a step i of
    the upper one, ``exp(G[i] - G[j])`` is the product of what the decay is from the middle to i,
    and from j to the middle; both are at most 1.
    """

    def __init__(self, x: Tensor, g: Tensor) -> None:
        self.x, size = x, x.shape[1] // 2
        self.levels = []
        while size:
            halves: Tensor = g.unflatten(1, (-1, 2, size))  # type: ignore[no-untyped-call]
            middle = halves[:, :, 0, -1:]
            up = (halves[:, :, 1] - middle).exp_().unsqueeze(3)
            down = (middle - halves[:, :, 0]).exp_()
            parts: Tensor = x.unflatten(1, (-1, 2, size))  # type: ignore[no-untyped-call]
            rows, columns = parts[:, :, 1] * up, parts[:, :, 0, :, 1] * down
            self.levels.append((size, up, down, rows, columns))
            size //= 2

    def scores(self) -> Tensor:
        """(lanes, C, 2, C), zero above the diagonal; M is on it, too."""
        x = self.x
        out = x.new_zeros(*x.shape[:3], x.shape[1])
        own = (x * x[:, :, 1:]).sum(-1)
        out.diagonal(dim1=1, dim2=3).copy_(own.transpose(1, 2))
        for size, _, _, rows, columns in self.levels:
            product = rows.flatten(0, 1).flatten(1, 2) @ columns.flatten(0, 1).mT
            self._block(out, size).copy_(product.view(*rows.shape[:-1], size))
        return out

    @staticmethod
    def _block(scores: Tensor, size: int) -> Tensor:
        """From lower to upper halves of blocks, (lanes, blocks, size, 2, size), a view."""
        apart = scores.unflatten(3, (-1, 2, size)).unflatten(1, (-1, 2, size))  # type: ignore[no-untyped-call]
        lower: Tensor = apart[:, :, 1, :, :, :, 0].diagonal(dim1=1, dim2=4)
        return lower.movedim(-1, 1)

    def backward(self, dscores: Tensor, dx: Tensor, dcolumns: Tensor) -> None:
        """Add the gradients of x, and of the keys as columns."""
        x = self.x
        own = dscores[:, :, 0].diagonal(dim1=1, dim2=2).unsqueeze(-1)
        dx[:, :, 0].addcmul_(own, x[:, :, 1])
        dcolumns.addcmul_(own, x[:, :, 0])
        for size, up, down, rows, columns in self.levels:
            block = self._block(dscores, size).flatten(0, 1).flatten(1, 2)
            drows = (block @ columns.flatten(0, 1)).view(rows.shape)
            dx.unflatten(1, (-1, 2, size))[:, :, 1].addcmul_(drows, up)  # type: ignore[no-untyped-call]
            dlower = (block.mT @ rows.flatten(0, 1).flatten(1, 2)).view(columns.shape)
            dcolumns.unflatten(1, (-1, 2, size))[:, :, 0].addcmul_(dlower, down)  # type: ignore[no-untyped-call]


def _states(k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """What is kept, as (N, B, H, K, V)."""
    return kept.view(cdiv(v.shape[1], CHUNK), v.shape[0], v.shape[2], k.shape[3], v.shape[3])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial: Tensor | None, l2norm: bool,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, final, kept = _fake_forward(q, k, v, g, beta)
    if not v.shape[1]:
        return out, final.zero_() if initial is None else final.copy_(initial), kept
    states = _states(k, v, kept)
    if native.takes(q, k, v, g):
        states[:1] = 0 if initial is None else initial
        native.forward((q, k, v, g, beta, l2norm, segments), EPSILON, states, out, final)
        return out, final, kept
    for at in _spans(q, v):
        tile, (rows, _, heads) = _tile(q, k, v, g, beta, l2norm, segments, at), at
        state = states[0, rows, heads]
        state = state.zero_() if initial is None else state.copy_(initial[rows, heads])
        state, results = state.flatten(0, 1), torch.empty_like(tile.v)
        for i in range(len(results)):
            chunk = _Chunk(tile, i)
            found = chunk.read_state(state)
            z = chunk.solve((tile.v[i] - found[:, :, 1]).mul_(chunk.beta))
            torch.baddbmm(found[:, :, 0], chunk.p, z, out=results[i])
            state = torch.baddbmm(state * chunk.through, chunk.written.mT, z)
            place = states[i + 1] if i + 1 < len(results) else final
            place[rows, heads].flatten(0, 1).copy_(state)
        _write(results, out[rows, :, heads])
    return out, final, kept


def _backward(
    grad: Tensor | None, grad_final: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor,
    beta: Tensor, initial: Tensor | None, kept: Tensor, l2norm: bool, segments: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    every = _fake_gradients(q, k, v, g, beta, initial)
    dq, dk, dv, dg, dbeta, dinitial = every
    states, wide, scale = _states(k, v, kept), _wide(q), q.shape[3] ** -0.5
    if native.takes(q, k, v, g):
        after = states.new_zeros(states.shape[1:])
        if grad_final is not None:
            after.copy_(grad_final)
        grad = None if grad is None else grad.to(q.dtype)
        sums = [torch.empty(t.shape, dtype=wide, device=t.device) for t in (g, beta)]
        given = q, k, v, g, beta, l2norm, segments
        native.backward(given, EPSILON, states, grad, after, (dq, dk, dv, *sums))
        for t, made in zip((dg, dbeta, dinitial), (*sums, after), strict=True):
            if t is not dinitial or initial is not None:
                t.copy_(made)
        return [t for t, needed in zip(every, needs, strict=True) if needed]
    for at in _spans(q, v):
        tile, (rows, keys, heads) = _tile(q, k, v, g, beta, l2norm, segments, at), at
        outer = torch.zeros_like(tile.v) if grad is None else _chunked(grad[rows, :, heads], wide)
        if grad_final is None:
            after = outer.new_zeros(outer.shape[1], k.shape[3], v.shape[3])
        else:
            after = grad_final[rows, heads].flatten(0, 1)
        gx, gv, gg, gbeta = map(torch.empty_like, (tile.x, tile.v, tile.g, tile.beta))
        for i in reversed(range(len(gx))):
            before = states[i, rows, heads].flatten(0, 1)
            gx[i], gv[i], gg[i], gbeta[i], after = _Chunk(tile, i).backward(before, outer[i], after)
        if initial is not None:
            dinitial[rows, heads].flatten(0, 1).copy_(after)
        if needs[0] or needs[1]:
            gq, gk = _inputs_gradient(tile, gx, scale).unbind(3)
            _write(gq, dq[rows, :, keys])
            _write(gk, dk[rows, :, keys])
        _write(gv, dv[rows, :, heads])
        _write(gg, (dg if dg.ndim == 4 else dg.unsqueeze(-1))[rows, :, heads])
        _write(gbeta, dbeta.unsqueeze(-1)[rows, :, heads])
    return [t for t, needed in zip(every, needs, strict=True) if needed]


def _inputs_gradient(tile: _Tile, gx: Tensor, scale: float) -> Tensor:
    """The gradient of query and key as they came, (N, lanes / each, C, 2, K), from that of x."""
    if tile.each > 1:
        gx = gx.unflatten(1, (-1, tile.each)).sum(2)  # type: ignore[no-untyped-call]
    if tile.norms is not None:
        x = tile.x[:, :: tile.each]
        along = (x * gx).sum(-1, keepdim=True)
        along[:, :, :, 0] /= scale * scale
        gx = (gx - x * along) * tile.norms
    gx[:, :, :, 0] *= scale
    return gx


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (B, L, H, V), the state after all, and those before chunks."""
    (batch, length, heads, values), wide = v.shape, _wide(q)
    chunks, features = cdiv(length, CHUNK), k.shape[3]
    return (
        q.new_empty(v.shape),
        q.new_empty((batch, heads, features, values), dtype=wide),
        # one dimension for all: of a single chunk, or head, there would be another graph
        q.new_empty((chunks * batch * heads * features, values), dtype=wide),
    )


def _fake_gradients(*inputs: Tensor | None) -> list[Tensor]:
    like = next(t for t in inputs if t is not None)
    return [like.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs]


def _fake_backward(grad: Tensor | None, grad_final: Tensor | None, *rest: Any) -> list[Tensor]:
    pairs = zip(_fake_gradients(*rest[:6]), rest[-1], strict=True)
    return [g for g, needed in pairs if needed]


# The loops over chunks would fix the length in a traced graph, so the two directions are opaque.
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, "


def _flops(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *_: Any) -> int:
    """Per step and head: scores, what is written, the values, and the state read and written."""
    features, values = k.shape[3], v.shape[3]
    steps = v.shape[0] * v.shape[1] * v.shape[2]
    return steps * (CHUNK * (4 * features + 3 * values) + 6 * features * values)


def _backward_flops(grad: Tensor | None, grad_final: Tensor | None, *rest: Any) -> int:
    return 3 * _flops(*rest)  # most of forward again, and two products for each of its


_forward_op = library_op(
    f"delta_rule_forward({_INPUTS}bool l2norm, Tensor? segments) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _flops,
)
_backward_op = library_op(
    f"delta_rule_backward(Tensor? grad, Tensor? grad_final, {_INPUTS}Tensor kept, bool l2norm, "
    "Tensor? segments, bool[6] needs) -> Tensor[]",
    _backward,
    _fake_backward,
    _backward_flops,
)


# -- autograd --------------------------------------------------------------------------------------
@capturable
class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor,
        initial: Tensor | None, l2norm: bool, segments: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.options = l2norm, segments
        with torch.autocast(q.device.type, enabled=False):  # which would make 16-bit products
            out, final, kept = _forward_op(q, k, v, g, beta, initial, *ctx.options)
        ctx.save_for_backward(q, k, v, g, beta, initial, kept)
        return out, final

    @staticmethod
    @differentiable(double_backward(delta_rule_reference, 6))
    def backward(
        ctx: Any, grad: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:6])
        needs[0] &= grad is not None  # the state knows nothing of queries
        remaining = iter(_backward_op(grad, grad_final, *ctx.saved_tensors, *ctx.options, needs))
        return *(next(remaining) if needed else None for needed in needs), None, None


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, l2norm: bool = False, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The outputs of the delta rule with one decay per head, and the state after the last step.

    Keeps its inputs and one state in ``CHUNK`` steps for backward.

    Args:
        query: (B, L, G, K), any strides; multiplied by ``K ** -0.5``.
        key: (B, L, G, K).
        value: (B, L, H, V) with H a multiple of G: head h reads group ``h // (H / G)``.
        g: (B, L, H): the logarithms of the decays, at most 0.
        beta: (B, L, H).
        initial_state: (B, H, K, V), or None for zero.
        l2norm: whether queries and keys are divided by their norms.
        segments: (B, L), int32: where the segment of each position begins, each from a zero state;
            None: each row is one.

    Returns:
        (B, L, H, V) in the dtype of query; (B, H, K, V) in fp32, or fp64 for fp64.

    Raises:
        ValueError: for what ``OP.unsupported`` lists.
    """
    if reasons := delta_unsupported(query, key, value, g, beta, initial_state, l2norm, segments):
        raise ValueError("; ".join(reasons))
    return _DeltaRule.apply(query, key, value, g, beta, initial_state, l2norm, segments)  # type: ignore[no-any-return, no-untyped-call]


def kda(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, l2norm: bool = False, segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with a decay for each feature of the key: g is (B, L, H, K)."""
    if reasons := kda_unsupported(query, key, value, g, beta, initial_state, l2norm, segments):
        raise ValueError("; ".join(reasons))
    return _DeltaRule.apply(query, key, value, g, beta, initial_state, l2norm, segments)  # type: ignore[no-any-return, no-untyped-call]


# -- OP --------------------------------------------------------------------------------------------
def delta_unsupported(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor,
    initial_state: Tensor | None = None, l2norm: bool = False, segments: Tensor | None = None,
    per_feature: bool = False,
) -> list[str]:  # fmt: skip
    """Why the op cannot take these inputs; empty when it can."""
    tensors = [t for t in (query, key, value, g, beta, initial_state) if t is not None]
    if reasons := [r for t in tensors for r in not_floating("an input", t)]:
        return reasons
    if away := on_several_devices(*tensors, segments):
        return away
    if kept := kept_on_gpu(query):
        return kept
    if query.ndim != 4 or value.ndim != 4 or value.shape[2] % max(1, query.shape[2]):
        return ["query and value have not 4 dimensions, or heads are not a multiple of groups"]
    if segments is not None and initial_state is not None:
        return ["segments start from zero, not from a given state"]
    (batch, length, heads, values), features = value.shape, query.shape[3]
    expected = (
        (query, (batch, length, query.shape[2], features)), (key, tuple(query.shape)),
        (g, (batch, length, heads, features)[: 4 if per_feature else 3]),
        (beta, (batch, length, heads)), (initial_state, (batch, heads, features, values)),
        (segments, (batch, length)),
    )  # fmt: skip
    return misshapen("value", value, expected)


kda_unsupported = functools.partial(delta_unsupported, per_feature=True)


def _example(m: Maker, per_feature: bool, kind: str = "") -> tuple[Any, ...]:
    groups, heads, features = m.sizes.kv_heads, m.sizes.heads, m.sizes.head_dim
    q, k = m.x(groups, features), m.x(groups, features)
    v = m.x(heads, m.sizes.rank)
    g = m.x(heads, features) if per_feature else m.x(heads)
    g, beta = -g.detach().abs(), m.x(heads).detach().sigmoid()
    inputs = q, k, v, g.requires_grad_(), beta.requires_grad_()
    if kind != "state":
        return *inputs, None, True, *([m.segments()] if kind else [])
    # keys whose norm is below 1: else a step may more than undo what the state has
    k = (k.detach() / features).requires_grad_()
    state = m.normal(m.sizes.batch, heads, features, m.sizes.rank, dtype=m.wide)
    return q, k, *inputs[2:], state.requires_grad_(), False


def _op(call: Any, unsupported: Any, per_feature: bool) -> Op:
    make = functools.partial(_example, per_feature=per_feature)
    kinds = {kind: functools.partial(make, kind=kind) for kind in ("state", "segments")}
    return Op(
        call.__name__,
        delta_rule_reference,
        call,
        unsupported,
        dominates=True,
        example=make,
        variants=kinds,
    )


OP = _op(gated_delta_rule, delta_unsupported, per_feature=False)
KDA = _op(kda, kda_unsupported, per_feature=True)
