"""Programs over distributions: recorded class by class, and run in tiles of rows when summed.

A student's log-probabilities are compared with a teacher's class by class; only the sum over the
classes is small. Each operation is recorded as a step of a program, whose inputs are lazy rows,
real tensors and numbers, taken as they are. When a sum over all classes is read, the program runs
tile by tile: a row's result depends on that row of each input and on nothing else. A program that
is a sum of KL divergences has its gradient by hand, any other by autograd.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

from ....kernels.loss.head_tiles import accumulate, project, project_back, row_strips, row_tiles
from ....kernels.loss.linear_cross_entropy_parts import misfits, operands
from ..changes import Fingerprint, fingerprint, is_unchanged
from ..deferred import Change
from ..head_call import Operands
from ..lazy_gradient import apply_change
from ..lazy_logits import LazyLogits
from .choices import CHOICES
from .in_tiles import Tiled, compute, wide
from .rows import (
    Handlers,
    HeadRows,
    WrongArguments,
    binding,
    handler,
    is_last,
    result_dtype,
    rows_of,
)
from .scalings import SCALINGS

# ---------------------------------------------------------------------------------------- records


@dataclass(frozen=True, eq=False)
class _Real:
    """A real tensor without a gradient: (..., vocabulary) or (..., 1)."""

    tensor: Tensor
    before: Fingerprint

    @staticmethod
    def of(tensor: Tensor) -> _Real:
        """``tensor``, as it is now; as it was, if it was recorded before in this version."""
        version, before = _fingerprints.get(tensor, (None, None))
        if before is None or version != tensor._version:
            before = fingerprint([tensor])
            _fingerprints[tensor] = tensor._version, before
        return _Real(tensor, before)

    def values(self) -> Tensor:
        """The tensor, unless it was written to since."""
        if not is_unchanged([self.tensor], self.before):
            raise RuntimeError(
                "what is made of these logits cannot be computed: a tensor that they are compared "
                "with, such as a teacher's log-probabilities, was written to since. Write to a "
                "clone() of it, or use fusewright.optimize(model, logits='always')."
            )
        return self.tensor


_fingerprints: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Real tensors -> their version and fingerprint, as several steps record the same."""


@dataclass(frozen=True, eq=False)
class _Step:
    """An operation, class by class, of other steps, lazy rows, real tensors and numbers."""

    function: Callable[..., Tensor]
    inputs: tuple[Any, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Program(HeadRows):
    """What ``step`` computes, in the leading shape of its inputs; ``index`` chooses rows of that.

    Of all lazy rows among the inputs, those of ``leaf`` alone may have a gradient, and if
    ``is_trained`` they do.
    """

    step: Any
    leaf: HeadRows
    is_trained: bool


def _number(x: Any) -> float | None:
    """A number, also one in a tensor without dimensions; None for anything else."""
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return float(x)
    if type(x) is not Tensor or x.dim() or not x.is_floating_point() or _has_gradient(x):
        return None
    return x.item()


def _has_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _input(x: Any, like: LazyLogits) -> Any:
    """``x`` as an input of a step whose result has the shape of ``like``."""
    if not isinstance(x, LazyLogits):
        value = _number(x)
        if value is not None:
            return value
        if type(x) is not Tensor or x.device != like.device or x.is_complex():
            raise WrongArguments
        if x.shape[:-1] != like.shape[:-1] or x.shape[-1:] not in ((1,), like.shape[-1:]):
            raise WrongArguments
        if x.is_inference() or _has_gradient(x):
            raise WrongArguments
        return _Real.of(x.clone() if x.shape[-1] == 1 else x)  # who has a mask may write to it
    rows = x.recorded
    if x.shape != like.shape or x.device != like.device or not x.is_pending:
        raise WrongArguments
    if not isinstance(rows, HeadRows) or rows.kind not in ("log_probs", "probs", "program"):
        raise WrongArguments
    node, is_trained = (rows.step, rows.is_trained) if isinstance(rows, Program) else (rows, True)
    return _Step(torch.detach, (node,)) if is_trained and not _has_gradient(x) else node


def _leaf(lazy: Sequence[LazyLogits]) -> HeadRows:
    """The rows that have the gradient of what is made of ``lazy``; any, where there is none."""
    leaves = [r.leaf if isinstance(r := rows_of(z), Program) else r for z in lazy]
    trained = [leaf for z, leaf in zip(lazy, leaves, strict=True) if _has_gradient(z)]
    if any(not _is_same_projection(leaf, trained[0]) for leaf in trained):
        raise WrongArguments
    return (trained or leaves)[0]


def _is_same_projection(a: HeadRows, b: HeadRows) -> bool:
    return a.call is b.call and a.index is b.index


def _record(
    function: Callable[..., Tensor], args: Sequence[Any], is_linear: bool = False,
    step: Callable[..., Any] | None = None, kind: str = "program", waits: bool = False,
) -> Any:  # fmt: skip
    """What ``function`` makes of ``args``; ``step`` makes the program's step of their nodes.

    Without gradients, only what ``waits`` is recorded with a table: who writes to that meanwhile
    gets an error.
    """
    lazy = [x for x in args if isinstance(x, LazyLogits)]
    if len(lazy) == 1 and not waits and not _has_gradient(lazy[0]):
        others = [x for x in args if isinstance(x, Tensor) and x is not lazy[0]]
        if any(x.dim() and x.shape[-1] > 1 for x in others):
            return NotImplemented
    nodes: list[Any] = [None] * len(args)
    # the lazy ones first: a fingerprint of a real tensor is for nothing where these are others
    for i in sorted(range(len(args)), key=lambda i: not isinstance(args[i], LazyLogits)):
        nodes[i] = _input(args[i], lazy[0])
    indices = [r.index if isinstance(r := rows_of(z), Program) else None for z in lazy]
    # rows that were chosen of a program are other rows than those of its inputs
    if any(i is not indices[0] for i in indices):
        raise WrongArguments
    if indices[0] is not None and any(isinstance(n, _Real) for n in nodes):
        raise WrongArguments
    leaf = _leaf(lazy)
    # as it is now, whatever is written to a number that is a tensor
    args = [
        x.clone() if isinstance(x, Tensor) and isinstance(n, float) else x
        for x, n in zip(args, nodes, strict=True)
    ]
    recorded = Program(
        leaf.call, leaf.inputs, _STACK if kind == "stack" else _PROGRAM, indices[0], kind,
        step=_Step(function, tuple(nodes)) if step is None else step(*nodes), leaf=leaf,
        is_trained=any(map(_has_gradient, lazy)),
    )  # fmt: skip
    tiny = [
        x if isinstance(n, float) else torch.zeros((1, 1), dtype=x.dtype, device=x.device)
        for x, n in zip(args, nodes, strict=True)
    ]
    result = function(*tiny)  # under the autocast at hand

    def run(*values: Tensor) -> Tensor:
        rest = iter(values)
        operands = [
            n.values() if isinstance(n, _Real) else x if isinstance(n, float) else next(rest)
            for x, n in zip(args, nodes, strict=True)
        ]
        return function(*operands).to(result.dtype)

    shape = (*result.shape[:-2], *lazy[0].shape)
    return apply_change(Change(run, shape, result.dtype, recorded, is_linear=is_linear), *lazy)


# ------------------------------------------------------------------------------------- operations


def _unary(function: Callable[[Tensor], Tensor], is_linear: bool = False) -> Callable[..., Any]:
    @binding
    def record(input: Any) -> Any:
        return _record(function, [input], is_linear)

    return record


def _binary(function: Callable[..., Tensor], is_linear: bool = False) -> Callable[..., Any]:
    @binding
    def record(input: Any, other: Any) -> Any:
        waits = function is torch.logaddexp
        return _record(function, [input, other], is_linear, waits=waits)

    return record


@binding
def _lerp(input: Any, end: Any, weight: Any) -> Any:
    return _record(torch.lerp, [input, end, weight])


def _paired(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b])


@binding
def _stack(tensors: Any, dim: Any = 0) -> Any:
    if dim != 0 or len(tensors) != 2 or not all(isinstance(t, Tensor) for t in tensors):
        return NotImplemented
    if tensors[0].dtype != tensors[1].dtype or tensors[0].shape != tensors[1].shape:
        return NotImplemented
    step = functools.partial(_Step, torch.logaddexp)  # as its log-sum-exp
    return _record(_paired, tensors, True, lambda *nodes: step(nodes), "stack")


@handler
def _logsumexp_of_stack(z: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    if dim not in (0, (0,), [0]) or keepdim:
        return NotImplemented

    def formula(t: Tensor) -> Tensor:
        return t.logsumexp(0)

    recorded = replace(rows_of(z), handlers=_PROGRAM, kind="program")
    dtype = result_dtype(formula, z)
    return apply_change(Change(formula, tuple(z.shape[1:]), dtype, recorded, is_linear=False), z)


def _kl_of_log_probs(input: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(input, target, reduction="none", log_target=True)


def _kl_of_probs(input: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(input, target, reduction="none")


@binding
def _kl_div(
    input: Any, target: Any, size_average: Any = None, reduce: Any = None,
    reduction: str = "mean", log_target: bool = False,
) -> Any:  # fmt: skip
    if size_average is not None or reduce is not None:
        return NotImplemented
    if reduction not in ("none", "sum", "mean", "batchmean"):
        return NotImplemented
    function = _kl_of_log_probs if log_target else _kl_of_probs

    def step(input: Any, target: Any) -> _Step:
        rows, is_constant = _without_detach(target)
        if (
            log_target
            or not isinstance(rows, HeadRows)
            or (rows.kind, rows.weight) != ("probs", 1.0)
        ):
            return _Step(function, (input, target))
        log_probs: Any = replace(rows, kind="log_probs")  # no logarithm of an exponential
        log_probs = _Step(torch.detach, (log_probs,)) if is_constant else log_probs
        return _Step(_kl_of_log_probs, (input, log_probs))

    elements = _record(function, [input, target], step=step, waits=True)
    if reduction == "none":
        return elements
    if reduction == "mean":
        return _mean(elements)
    total = _sum(elements)
    if reduction == "sum" or total is NotImplemented:
        return total
    return total / input.shape[0] if input.shape[0] else NotImplemented


# -------------------------------------------------------------------------------------------- sums


@handler
def _sum(z: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    rows = rows_of(z)
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if not isinstance(rows, Program) or (dim is None and keepdim):
        return NotImplemented
    if dim is not None and not is_last(z, dim):
        return NotImplemented
    cast = result_dtype(lambda t: t.sum(dtype=dtype), z)
    each = _each_row(z, rows)
    if dim is None:
        return each.sum().to(cast)
    each = each.view(z.shape[:-1]).to(cast)
    return each.unsqueeze(-1) if keepdim else each


@handler
def _mean(z: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not z.numel():
        return NotImplemented
    cast = result_dtype(lambda t: t.mean(dtype=dtype), z)
    count = z.numel() if dim is None else z.shape[-1]
    total = _sum(z, dim, keepdim, dtype=torch.float64 if cast is torch.float64 else torch.float32)
    return NotImplemented if total is NotImplemented else (total / count).to(cast)


def _each_row(z: LazyLogits, rows: Program) -> Tensor:
    """The sum of each row over all classes, flat, in fp32 (fp64 for fp64)."""
    index = None if rows.index is None else rows.index.reshape(-1)
    order = _ordered(rows.step)
    projected = [rows.leaf]
    for node in order:
        if isinstance(node, HeadRows) and not any(_is_same_projection(node, p) for p in projected):
            projected.append(node)
    heads = [_require_head(_selected(p, index)) for p in projected]
    places = {
        id(n): next(i for i, p in enumerate(projected) if _is_same_projection(n, p))
        for n in order
        if isinstance(n, HeadRows)
    }
    tables = [n.values().reshape(-1, n.tensor.shape[-1]) for n in order if isinstance(n, _Real)]
    program = _Replay(order, places, [(h.scale, h.softcap) for h in heads], index)

    def tiled(o: Operands) -> Tensor:
        first = operands(o.x, o.weight, o.bias)
        tensors = [t for h in heads[1:] for t in h[:3]]
        with torch.autocast(z.device.type, enabled=False):
            result: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
                *first, program, torch.is_grad_enabled(), *tensors, *tables
            )
        return result

    def formula(values: Tensor) -> Tensor:
        return wide(values).reshape(-1, values.shape[-1]).sum(-1)

    leaf = replace(_selected(rows.leaf, index), factor=1.0, weight=1.0)
    return compute(z, Tiled("divergence", tiled, formula), leaf)


def _ordered(root: Any) -> list[Any]:
    """The nodes of a program, each after its inputs."""
    order: dict[int, Any] = {}
    stack = [(root, False)]
    while stack:
        node, is_ready = stack.pop()
        if id(node) in order or isinstance(node, float):
            continue
        if is_ready or not isinstance(node, _Step):
            order[id(node)] = node
            continue
        stack += [(node, True), *((n, False) for n in node.inputs)]
    return list(order.values())


def _selected(rows: HeadRows, index: Tensor | None) -> HeadRows:
    """``rows``, or those of them that an ``index`` chooses."""
    if index is None:
        return rows
    return replace(rows, index=index if rows.index is None else rows.index.reshape(-1)[index])


def _require_head(rows: HeadRows) -> Operands:
    """The operands of a head, as autocast casts them, without a history."""
    head = rows.call.plan.head
    if head is None or head.factor is not None or not rows.call.can_end_in_tiles(rows.inputs):
        raise WrongArguments
    if any(isinstance(t, Tensor) and t.is_inference() for t in rows.inputs):
        raise WrongArguments
    with torch.no_grad(), rows.call.mode(False):
        of = head.of(rows.inputs, rows.index, 1.0)
        if misfits(of.x, of.weight, of.bias, None, ""):
            raise WrongArguments
        x, weight, bias = operands(of.x, of.weight, of.bias)
        return of._replace(x=x, weight=weight, bias=bias)


# --------------------------------------------------------------------------------------- in tiles


@dataclass(frozen=True, eq=False)
class _Replay:
    """A program, ready to run on rows of projections and of real tensors.

    ``order`` are its nodes, ``places`` says which projection each of its lazy rows is of. Of each
    projection ``scales`` has scale and soft cap. ``index`` chooses rows of the real tensors.
    """

    order: list[Any]
    places: dict[int, int]
    scales: list[tuple[float, float | None]]
    index: Tensor | None

    @functools.cached_property
    def terms(self) -> list[_Term] | None:
        """The divergences that it is the sum of; None where it is something else."""
        return _terms(self)

    def run(
        self, projections: Sequence[Tensor], tables: Sequence[Tensor], dtype: torch.dtype
    ) -> Tensor:
        """The result of each row (R,), from projections (R, V) and tables (R, V or 1)."""
        if self.terms is not None:
            return _Strip(projections, tables).run(self.terms, False)[0]
        values: dict[int, Any] = {}
        log_probs: dict[tuple[int, float], Tensor] = {}
        rest = iter(tables)
        for node in self.order:
            if isinstance(node, _Step):
                value = node.function(*(values.get(id(n), n) for n in node.inputs))
            elif isinstance(node, _Real):
                value = next(rest).to(dtype)
            else:
                place = self.places[id(node)]
                key = place, node.factor
                if key not in log_probs:
                    log_probs[key] = self._log_softmax(projections[place], place, node.factor)
                value = log_probs[key] if node.kind == "log_probs" else log_probs[key].exp()
                value = value if node.weight == 1.0 else value * node.weight
            values[id(node)] = value
        total: Tensor = values[id(self.order[-1])].sum(-1)
        return total

    def _log_softmax(self, logits: Tensor, place: int, factor: float) -> Tensor:
        scale, softcap = self.scales[place]
        if softcap is not None:
            logits = torch.tanh(logits * (scale / softcap)) * softcap
            scale = 1.0
        factor = factor * scale
        return (logits if factor == 1.0 else logits * factor).log_softmax(-1)

    def slope(
        self, projections: Sequence[Tensor], tables: Sequence[Tensor], grad: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The results (R,), and from their gradients (R,) those of the first projection (R, V)."""
        if self.terms is not None:
            result, slope = _Strip(projections, tables).run(self.terms, True)
            assert slope is not None
            return result, slope if grad is None else slope.mul_(grad.unsqueeze(-1))
        with torch.enable_grad():
            first = projections[0].detach().requires_grad_()
            result = self.run([first, *projections[1:]], tables, first.dtype)
        grad = torch.ones_like(result) if grad is None else grad
        return result.detach(), torch.autograd.grad(result, first, grad)[0]

    def strips(
        self, head: Sequence[Any], tensors: Sequence[Any], dtype: torch.dtype, part: int
    ) -> Iterator[tuple[slice, Tensor, Iterator[tuple[slice, list[Tensor], list[Tensor]]]]]:
        """Each tile: its rows, the first projection, and its strips with all inputs of ``run``."""
        heads = [head, *(tensors[i : i + 3] for i in range(0, 3 * len(self.scales) - 3, 3))]
        tables = tensors[3 * len(self.scales) - 3 :]
        count, vocabulary = head[0].shape[0], head[1].shape[0]
        row_bytes = sum(t.element_size() for t in (*(h[0] for h in heads), *tables))
        tiles = row_tiles(count, vocabulary * row_bytes, part)
        height = max((stop - start for start, stop in tiles), default=0)
        # one buffer for all: fresh memory of this size would be faulted in page by page, by tile
        buffers = [x.new_empty(height, vocabulary) for x, *_ in heads]
        for rows in itertools.starmap(slice, tiles):
            projections = [
                project(x[rows], weight, bias, buffer[: rows.stop - rows.start])
                for (x, weight, bias), buffer in zip(heads, buffers, strict=True)
            ]
            chosen = rows if self.index is None else self.index[rows]
            parts = [t[chosen] for t in tables]
            strips = (
                (
                    strip,
                    [t[strip].to(dtype) for t in projections],
                    [t[strip].to(dtype) for t in parts],
                )
                for strip in row_strips(*projections[0].shape)
            )
            yield rows, projections[0], strips


# --------------------------------------------------------------------------- sums of divergences
#
# What distillation computes is a sum of ``w * KL(target || input)``. Its gradient by hand takes
# half the passes over a strip that autograd's takes: the part of it that is a multiple of the
# softmax vanishes, and no constant multiplies more than it must.


class _Side(NamedTuple):
    """Log-probabilities: of a projection times a factor, or of a table."""

    place: int
    factor: float | None  # None for a table
    is_trained: bool

    @property
    def scale(self) -> float:
        """What its gradient is multiplied with on the way to the projection."""
        return 1.0 if self.factor is None else self.factor


class _Mixture(NamedTuple):
    """The log of a mixture: both log-probabilities, and what was added to each."""

    parts: tuple[tuple[_Side, float], tuple[_Side, float]]


_Term = tuple[float, _Side | _Mixture, _Side]
"""A weight, and input and target of a KL divergence."""
_LARGEST_SHIFT = 80.0
"""Of logarithms: the exponential of a larger one is no number of fp32."""


def _without_detach(node: Any) -> tuple[Any, bool]:
    """A node, or what it cuts off from its gradient, and whether it does."""
    if isinstance(node, _Step) and node.function is torch.detach:
        return node.inputs[0], True
    return node, False


def _terms(program: _Replay) -> list[_Term] | None:
    """The divergences that a program is the sum of; None where it is something else."""
    terms: list[_Term] = []
    queue: list[tuple[Any, float]] = [(program.order[-1], 1.0)]
    while queue:
        node, weight = queue.pop()
        if not isinstance(node, _Step):
            return None
        function, (a, b, c) = node.function, (*node.inputs, None, None)[:3]
        is_scaled = isinstance(a, float) or isinstance(b, float)
        if function is _kl_of_log_probs:
            source, target = _mixture(program, a) or _side(program, a), _side(program, b)
            if source is None or target is None:
                return None
            terms.append((weight, source, target))
        elif function in (torch.add, torch.sub) and not is_scaled:
            queue += [(b, weight if function is torch.add else -weight), (a, weight)]
        elif function is torch.mul and is_scaled:
            queue.append((b, weight * a) if isinstance(a, float) else (a, weight * b))
        elif function is torch.div and isinstance(b, float) and b:
            queue.append((a, weight / b))
        elif function is torch.neg:
            queue.append((a, -weight))
        elif function is torch.lerp and isinstance(c, float):
            queue += [(b, weight * c), (a, weight * (1.0 - c))]
        else:
            return None
    return terms


def _side(program: _Replay, node: Any) -> _Side | None:
    node, is_constant = _without_detach(node)
    if isinstance(node, _Real) and node.tensor.shape[-1] > 1:
        return _Side([n for n in program.order if isinstance(n, _Real)].index(node), None, False)
    if not isinstance(node, HeadRows) or (node.kind, node.weight) != ("log_probs", 1.0):
        return None
    place = program.places[id(node)]
    scale, softcap = program.scales[place]
    return _Side(place, node.factor * scale, not is_constant) if softcap is None else None


def _mixture(program: _Replay, node: Any) -> _Mixture | None:
    node, is_constant = _without_detach(node)
    if not isinstance(node, _Step) or node.function is not torch.logaddexp:
        return None
    parts = []
    for part in node.inputs:
        shift = 0.0
        if isinstance(part, _Step) and part.function is torch.add:
            part, shift = part.inputs if isinstance(part.inputs[1], float) else part.inputs[::-1]
        side = _side(program, part)
        if side is None or not isinstance(shift, float) or not abs(shift) < _LARGEST_SHIFT:
            return None
        parts.append((side._replace(is_trained=side.is_trained and not is_constant), shift))
    return _Mixture((parts[0], parts[1]))


class _Strip:
    """A strip of a sum of divergences: its results, and the gradient of the first projection."""

    def __init__(self, projections: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
        self._projections, self._tables = projections, tables
        self._log_probs: dict[tuple[int, float | None], Tensor] = {}
        self._probs: dict[tuple[int, float | None], Tensor] = {}
        self._mixtures: dict[_Mixture, tuple[Tensor, Tensor]] = {}

    def _log_probs_of(self, side: _Side) -> Tensor:
        place, factor = key = side[:2]
        if factor is None:
            return self._tables[place]
        if key not in self._log_probs:
            logits = self._projections[place]
            self._log_probs[key] = (logits if factor == 1.0 else logits * factor).log_softmax(-1)
        return self._log_probs[key]

    def _probs_of(self, side: _Side) -> Tensor:
        key = side[:2]
        if key not in self._probs:
            self._probs[key] = self._log_probs_of(side).exp()
        return self._probs[key]

    def _mix(self, mixture: _Mixture) -> tuple[Tensor, Tensor]:
        """The mixture's logarithm and itself, (R, V)."""
        if mixture not in self._mixtures:
            self._mixtures[mixture] = self._mixed(mixture)
        return self._mixtures[mixture]

    def _mixed(self, mixture: _Mixture) -> tuple[Tensor, Tensor]:
        # at least this much: its logarithm times a probability that underflows is 0, too
        total = torch.full_like(self._projections[0][:1, :1], torch.finfo(torch.float32).tiny)
        tables = [self._log_probs_of(side) for side, _ in mixture.parts if side.factor is None]
        if not tables:
            (a, a_shift), (b, b_shift) = mixture.parts
            total = torch.add(total, self._probs_of(a), alpha=math.exp(a_shift))
            total.add_(self._probs_of(b), alpha=math.exp(b_shift))
            return total.log(), total
        # a table may be of any numbers: without the largest one, they have an exponential
        largest = functools.reduce(torch.maximum, [t.amax(-1, keepdim=True) for t in tables])
        largest.clamp_min_(0.0)
        for side, shift in mixture.parts:
            part = (self._log_probs_of(side) - largest).exp_()
            total = torch.add(total, part, alpha=math.exp(shift))
        return total.log().add_(largest), total.mul_(largest.exp())

    def run(self, terms: Sequence[_Term], gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The results (R,), and if wanted the gradient (R, V)."""
        results: Tensor | None = None
        slopes: dict[_Side, Tensor] = {}
        of_mixtures: dict[_Mixture, Tensor] = {}
        constants: dict[_Side, float] = {}
        for weight, source, target in terms:
            is_mixed, probs = isinstance(source, _Mixture), self._probs_of(target)
            log_source = (
                self._mix(source)[0] if isinstance(source, _Mixture) else self._log_probs_of(source)
            )
            elements = (self._log_probs_of(target) - log_source).mul_(probs)
            each = elements.sum(-1)
            results = each.mul_(weight) if results is None else results.add_(each, alpha=weight)
            if not gradient:
                continue
            if target.is_trained:
                _add(slopes, target, elements, weight * target.scale, elements)
                # the derivative of the target's own logarithm is a multiple of the softmax, and
                # vanishes; but a mixture's has nearly the same part, which is to cancel with it
                constants[target] = constants.get(target, 0.0) + weight * is_mixed
            if isinstance(source, _Mixture):
                _add(of_mixtures, source, probs, weight, None if target.is_trained else elements)
            elif source.is_trained:
                _add(slopes, source, probs, -weight * source.scale)
        for mixture, ratio in of_mixtures.items():
            ratio.div_(self._mix(mixture)[1])
            for side, shift in mixture.parts:
                if not side.is_trained:
                    continue
                constant = torch.full_like(ratio[:1, :1], constants.pop(side, 0.0))
                part = torch.add(constant, ratio, alpha=-math.exp(shift))
                if side in slopes:
                    slopes[side].addcmul_(part, self._probs_of(side), value=side.scale)
                else:
                    slopes[side] = part.mul_(self._probs_of(side)).mul_(side.scale)
        slope: Tensor | None = None
        for side, part in slopes.items():
            part.addcmul_(self._probs_of(side), part.sum(-1, keepdim=True), value=-1.0)
            slope = part if slope is None else slope.add_(part)
        assert results is not None
        return results, slope


def _add(
    totals: dict[Any, Tensor], key: Any, values: Tensor, weight: float, free: Tensor | None = None
) -> None:
    """Add ``values`` to a total, which is made in the memory of ``free`` if there is none yet."""
    if key in totals:
        totals[key].add_(values, alpha=weight)
    else:
        totals[key] = torch.mul(values, weight, out=free)


class _Summed(torch.autograd.Function):
    """A program's result for each row; with a frozen head its gradient is made in forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, program: _Replay,
        recording: bool, *tensors: Any,
    ) -> Tensor:  # fmt: skip
        needs = [recording and needed for needed in ctx.needs_input_grad[:3]]
        is_early = needs[0] and not any(needs[1:])
        dtype = _wide_dtype(x, *tensors)
        result = torch.empty(x.shape[0], dtype=dtype, device=x.device)
        term = torch.empty_like(x) if is_early else None
        for rows, tile, strips in program.strips((x, weight, bias), tensors, dtype, 4):
            values = result[rows]
            for part, projections, tables in strips:
                if term is None:
                    values[part] = program.run(projections, tables, dtype)
                else:
                    values[part], tile[part] = program.slope(projections, tables, None)
            if term is not None:
                term[rows] = project_back(tile, weight)
        ctx.program, ctx.is_early = program, is_early
        ctx.save_for_backward(*((term,) if is_early else (x, weight, bias, *tensors)))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        needs, rest = ctx.needs_input_grad[:3], (None,) * (len(ctx.needs_input_grad) - 3)
        if ctx.is_early:
            (term,) = ctx.saved_tensors
            return (term * grad.unsqueeze(1)).to(term.dtype), None, None, *rest
        x, weight, bias, *tensors = ctx.saved_tensors
        program, dtype = ctx.program, grad.dtype
        dx = torch.empty_like(x) if needs[0] else None
        dbias = grad.new_zeros(len(weight)) if needs[2] else None
        dweight: Tensor | None = None
        # a head's gradient is added up over the tiles: few are faster
        few = 1 if needs[1] else 4
        for rows, tile, strips in program.strips((x, weight, bias), tensors, dtype, few):
            for part, projections, tables in strips:
                _, slope = program.slope(projections, tables, grad[rows][part])
                tile[part] = slope
                if dbias is not None:
                    dbias += slope.sum(0)
            if dx is not None:
                dx[rows] = project_back(tile, weight)
            if needs[1]:
                dweight = accumulate(dweight, tile, x[rows], dtype)
        if needs[1]:
            dweight = torch.zeros_like(weight) if dweight is None else dweight.to(weight.dtype)
        return dx, dweight, None if dbias is None else dbias.to(bias.dtype), *rest


def _wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    is_double = any(t is not None and t.dtype is torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


# ---------------------------------------------------------------------------------------- tables


def _with(scaling: str, record: Callable[..., Any]) -> Callable[..., Any]:
    """What is noted of a scale or a softmax if it can be; else a step."""

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = SCALINGS[scaling](*args, **kwargs)
        except WrongArguments:
            answer = NotImplemented
        return record(*args, **kwargs) if answer is NotImplemented else answer

    return run


_sum_of, _mul, _div = _binary(torch.add, True), _binary(torch.mul), _binary(torch.div)
_STEPS: Handlers = {
    **dict.fromkeys(("add", "__add__", "__radd__"), _sum_of),
    **dict.fromkeys(("sub", "subtract", "__sub__"), _binary(torch.sub, True)),
    **dict.fromkeys(("__rsub__", "rsub"), _binary(torch.rsub, True)),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), _mul),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__"), _div),
    **dict.fromkeys(("neg", "negative", "__neg__"), _unary(torch.neg, True)),
    "exp": _unary(torch.exp), "square": _unary(torch.square), "lerp": _lerp,
    "logaddexp": _binary(torch.logaddexp), "stack": _stack, "kl_div": _kl_div,
}  # fmt: skip

COMPARISONS: Handlers = {
    name: _with(name, step) if name in SCALINGS else step for name, step in _STEPS.items()
}
"""What is recorded of distributions as steps of a program, by the name of the function."""

_CASTS = ("to", "type_as", "float", "double", "half", "bfloat16", "detach")
_PROGRAM: Handlers = {
    **CHOICES, **_STEPS, **{name: SCALINGS[name] for name in _CASTS}, "sum": _sum, "mean": _mean,
}  # fmt: skip
_STACK: Handlers = {"logsumexp": _logsumexp_of_stack}
