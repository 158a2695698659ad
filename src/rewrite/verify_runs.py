"""One run of a graph under observation: its results, and all of its other effects.

Every run has separate copies of the inputs, in the layout that they were drawn in. What it writes
into them, which memory its outputs share, whether they can be written to, what it draws from the
random generator and which gradients it has is recorded with outputs and gradients, to be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.cost import saved_by_hook

KINDS = ("output", "gradient of input", "gradient by a second backward of input", "input")
"""What ``Outcome.results`` holds, in this order; the last is inputs that were written to."""


STRIDES = "has strides"
"""A trait that the rewrite need not share where it is contiguous; with others, it has its own."""

UNWRITABLE = "cannot be written in place"
"""A trait that the rewrite need not share."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run, or of several with their results stacked."""

    results: tuple[list[Tensor | None], ...]  # for each of ``KINDS``
    traits: frozenset[str]  # effects other than values, as sentences
    random: tuple[bytes, ...]  # the states of the random generators afterwards
    saved: int  # bytes kept for backward
    draws: int = 1  # how many runs these are


@dataclass(frozen=True)
class VerifySettings:
    """Settings that all runs of a site have in common.

    ``fixed`` are the shapes of weights. A tensor of such a shape does not grow with the tokens and
    is not counted as kept: the loss makes the gradient of a trained head in forward.
    """

    differentiable: Sequence[bool]  # for each input, whether it needs a gradient
    fixed: frozenset[tuple[int, ...]]
    laid_out: Sequence[str] = ()  # for each output, how its strides are read (graph/layouts.py)
    grad: bool = True  # whether gradients are enabled where the site runs
    thorough: bool = True  # look for traits; run backward twice, and for each output alone
    upstream: float = 1.0  # how large the upstream gradients are
    # small size -> real size over it: kept bytes are counted in real sizes
    enlargement: Mapping[int, float] = field(default_factory=dict)


def runs(
    fn: Callable[..., Any], draws: Iterable[Sequence[Any]], setting: VerifySettings
) -> Outcome:
    """The outcome of ``fn`` for all ``draws`` of inputs: their results stacked, as one tensor."""
    outcomes = [_run(fn, inputs, setting, i) for i, inputs in enumerate(draws)]
    if len(outcomes) == 1:
        return outcomes[0]
    results = tuple(
        [_stacked(tensors) for tensors in zip(*kind, strict=True)]
        for kind in zip(*(m.results for m in outcomes), strict=True)
    )
    traits = frozenset().union(*(m.traits for m in outcomes))
    random = tuple(s for m in outcomes for s in m.random)
    return Outcome(results, traits, random, sum(m.saved for m in outcomes), len(outcomes))


def _stacked(tensors: tuple[Tensor | None, ...]) -> Tensor | None:
    there = [t for t in tensors if t is not None]
    if there and len(there) < len(tensors):
        raise RuntimeError("a result is there in some of the draws only")
    return torch.stack(there) if there else None


def _run(
    fn: Callable[..., Any], inputs: Sequence[Any], setting: VerifySettings, seed: int
) -> Outcome:
    tokens = [
        _token(x) if d and isinstance(x, Tensor) else None
        for x, d in zip(inputs, setting.differentiable, strict=True)
    ]
    copies = [_handed(x, t, setting.grad) for x, t in zip(inputs, tokens, strict=True)]
    generators = _generators(copies)
    for g in generators:
        g.manual_seed(seed)
    saved: dict[int, int] = {}
    with torch.set_grad_enabled(setting.grad), _counted(saved, copies, setting):
        outputs = [o for o in fn(*copies) if isinstance(o, Tensor)]
    results: list[Tensor | None] = [o.detach().clone() for o in outputs]
    grads, second_grads, reached = _gradients(outputs, tokens, setting, seed)
    random = tuple(g.get_state().numpy().tobytes() for g in generators)
    written_inputs = [
        x.detach().clone() if isinstance(x, Tensor) and not _same(x, before) else None
        for x, before in zip(copies, inputs, strict=True)
    ]
    traits = reached
    if setting.thorough:
        traits |= _traits(outputs, copies, setting.laid_out) | _unwritable(outputs)
    return Outcome(
        (results, grads, second_grads, written_inputs), traits, random, sum(saved.values())
    )


# ------------------------------------------------------------------------------------ the inputs


class _Handed(torch.autograd.Function):
    # Gives a graph a tensor that is no leaf, as values inside a model are, without a copy of it.
    # The leaf is a ``token`` of the tensor's shape and of one element.
    @staticmethod
    def forward(ctx: Any, token: Tensor, value: list[Tensor]) -> Tensor:
        ctx.set_materialize_grads(False)
        return value.pop()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return grad, None


def _token(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape).requires_grad_()


def _handed(x: Any, token: Tensor | None, grad: bool) -> Any:
    # A copy of ``x`` that differentiates to ``token``. Where gradients are off, it is a leaf that
    # needs one: an op sees that it does.
    if not isinstance(x, Tensor):
        return x
    if token is None:
        return copied(x)
    if not grad:
        return copied(x).requires_grad_()
    handed: Tensor = _Handed.apply(token, [copied(x)])  # type: ignore[no-untyped-call]
    return handed


def copied(t: Tensor) -> Tensor:
    """A copy of ``t`` with its strides, gaps and broadcast dimensions included."""
    storage = t.detach().untyped_storage().clone()
    result = torch.empty(0, dtype=t.dtype, device=t.device)
    return result.set_(storage, t.storage_offset(), t.shape, t.stride())


def _generators(inputs: Sequence[Any]) -> list[torch.Generator]:
    devices = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type == "cuda"}
    cuda = [torch.cuda.default_generators[d.index] for d in sorted(devices, key=str)]
    return [torch.default_generator, *cuda]


# ---------------------------------------------------------------------------------- the gradients


@contextmanager
def _counted(sizes: dict[int, int], inputs_of_run: Sequence[Any], setting: VerifySettings) -> Any:
    """Collect, while a graph runs, the storages that are saved for backward, with their bytes."""
    inputs = {x.untyped_storage().data_ptr() for x in inputs_of_run if isinstance(x, Tensor)}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in inputs and tuple(t.shape) not in setting.fixed:
            times = math.prod(setting.enlargement.get(n, 1.0) for n in t.shape)
            sizes[storage.data_ptr()] = round(storage.nbytes() * times)
        return saved_by_hook(t)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        yield


def _gradients(
    outputs: list[Tensor], tokens: Sequence[Tensor | None], setting: VerifySettings, seed: int
) -> tuple[list[Tensor | None], list[Tensor | None], frozenset[str]]:
    # Gradients by a random upstream, the same by a second backward, and which output has which. The
    # second backward has the opposite upstream in another layout: one that wrote over what was
    # saved, or that takes its upstream for contiguous, gives another result.
    places = [j for j, t in enumerate(tokens) if t is not None]
    sources = [t for t in tokens if t is not None]
    live = [i for i, o in enumerate(outputs) if o.requires_grad]
    if not sources or not live:
        return [None] * len(sources), [None] * len(sources), frozenset()
    generator = torch.Generator().manual_seed(seed + 1)
    # drawn for every output: original and rewrite may differ in which of them have a gradient
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    sized = [drawn[i] * setting.upstream for i in live]
    upstream = [u.to(outputs[i].device, outputs[i].dtype) for i, u in zip(live, sized, strict=True)]
    roots = [outputs[i] for i in live]

    def grad(roots: list[Tensor], upstream: list[Tensor], more: bool) -> list[Tensor | None]:
        return list(
            torch.autograd.grad(roots, sources, upstream, allow_unused=True, retain_graph=more)
        )

    first = grad(roots, upstream, setting.thorough)
    if not setting.thorough:
        return first, [None] * len(sources), frozenset()
    first = [None if g is None else g.clone() for g in first]  # a later backward may write to it
    reached = {
        f"output {i} alone gives a gradient of input {places[j]}"
        for i, root, u in zip(live, roots, upstream, strict=True)
        for j, g in enumerate(first if len(live) == 1 else grad([root], [u], True))
        if g is not None
    }
    second = grad(roots, [_odd(-u) for u in upstream], False)
    return first, [None if g is None else -g for g in second], frozenset(reached)


def _odd(t: Tensor) -> Tensor:
    if t.dim() == 0:
        return t
    if t.dim() == 1:
        return torch.stack([t, t], 1)[:, 0]
    return t.transpose(0, -1).contiguous().transpose(0, -1)


# ----------------------------------------------------------------------------------- other effects


def _traits(
    outputs: list[Tensor], inputs: Sequence[Any], laid_out: Sequence[str]
) -> frozenset[str]:
    traits = set()
    for i, o in enumerate(outputs):
        # the stride of a dimension of one element says nothing
        strides = tuple(s for s, n in zip(o.stride(), o.shape, strict=True) if n > 1)
        strides_read = laid_out[i] if i < len(laid_out) else ""
        if strides_read == "exactly" or (strides_read and not o.is_contiguous()):
            traits.add(f"output {i} {STRIDES} {strides}")
        traits.add(f"output {i} is a {type(o).__name__} on {o.device}")
        if o.requires_grad:
            traits.add(f"output {i} requires a gradient")
        tensors = [(f"input {j}", x) for j, x in enumerate(inputs) if isinstance(x, Tensor)]
        tensors += [(f"output {j}", x) for j, x in enumerate(outputs[:i])]
        traits |= {f"output {i} shares memory with {name}" for name, x in tensors if _overlap(o, x)}
    return frozenset(traits)


def _overlap(a: Tensor, b: Tensor) -> bool:
    storage = a.untyped_storage()
    if storage.data_ptr() != b.untyped_storage().data_ptr() or not a.numel() or not b.numel():
        return False
    if a.itemsize != b.itemsize:
        return True
    marks = torch.zeros(storage.nbytes() // a.itemsize, dtype=torch.bool)
    _placed(marks, a).fill_(True)
    return bool(_placed(marks, b).any())


def _placed(marks: Tensor, t: Tensor) -> Tensor:
    """The elements of ``marks`` where those of ``t`` lie, each once."""
    dims = [(n, s) for n, s in zip(t.shape, t.stride(), strict=True) if s]
    return marks.as_strided([n for n, _ in dims], [s for _, s in dims], t.storage_offset())


def _unwritable(outputs: list[Tensor]) -> frozenset[str]:
    # Outputs that raise when they are written to, as one of several views of a function does.
    traits = set()
    for i, o in enumerate(outputs):
        if not o.is_floating_point():
            continue
        try:
            with torch.enable_grad():  # the writer's mode, which need not be the site's
                o.mul_(1)
        except RuntimeError:
            traits.add(f"output {i} {UNWRITABLE}")
    return frozenset(traits)


def _same(a: Tensor, b: Tensor) -> bool:
    if torch.equal(a, b):
        return True
    if a.itemsize == 1:  # comparison is not there for the narrowest dtypes
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return bool(((a == b) | ((a != a) & (b != b))).all())
