"""Verification: a rewrite is run against the original before it is installed.

The matched subgraph and its replacement run on random inputs of the site's dtypes and layouts and a
small batch, with random upstream gradients: on unit normals, and in the regimes of
``sample_inputs.py``. Both are compared with the subgraph in fp64. The rewrite is installed only
when its error, in every output and every gradient, is within the budget (``tolerance.py``), and
when it has the original's other effects (``runs``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import first_line
from ..graph import facts
from ..graph.effects import modes, switches_mode
from ..graph.layouts import layout_is_read
from ..kernels.fallback import LaunchError, no_fallback
from ..kernels.saved_tensors import saved_by_hook
from ..kernels.tolerance import EXCEEDS, PEAK, errors, exceeded
from ..report import Figures
from .conditions import settings_around
from .engine import Candidate, Verdict
from .sample_inputs import (
    NORMAL,
    REGIMES,
    Draws,
    Regime,
    UnitNormals,
    draws,
    is_static,
    layout,
    regimes,
    tokens,
)
from .smaller_weights import enlargement, in_ratio, is_large, smaller
from .verify_exact import Exact, Plain, double, packed

_NOISE = 0.5
"""Relative error of the original above which its result is nothing but rounding."""


@dataclass
class Verifier:
    """Checks candidates, and remembers the verdicts of equal ones.

    ``shared`` is called with a candidate, with ``traced``, and with a function that verifies it
    here: it returns the verdict of another process, or that of the function. Not with ``always``.
    """

    always: bool = False  # check every candidate, not only the first of its kind
    # a compiler will trace the rewrites: check the form that ops have then, too
    traced: bool = False
    shared: Callable[[Candidate, bool, Callable[[], Verdict]], Verdict] | None = None
    verdicts: dict[Any, Verdict] = field(default_factory=dict)  # by rule, structure, dtypes, device

    def __call__(self, candidate: Candidate) -> Verdict:
        """Return the verdict on ``candidate``, from memory where that is allowed."""
        key = structure(candidate)
        if self.always or key not in self.verdicts:
            self.verdicts[key] = self._decided(candidate)
        return self.verdicts[key]

    def _decided(self, candidate: Candidate) -> Verdict:
        def verify() -> Verdict:
            with quiet_randomness(), no_fallback():
                return _judge(candidate, self.traced)

        if self.always or self.shared is None:
            return verify()
        return self.shared(candidate, self.traced, verify)


def _judge(candidate: Candidate, traced: bool) -> Verdict:
    # Check with small sizes; with the real ones where the formula does not fit small ones. A
    # refusal at smaller weights is judged once more at the real ones, unless these are so large
    # that several copies of them would set the peak of a run's memory.
    text, verdict = "", None
    for make, small in (smaller, True), (in_ratio, True), (_itself, True), (_itself, False):
        if verdict is not None and (make is in_ratio or is_large(candidate)):
            continue
        try:
            form = make(candidate)
            judged = None if form is None else _verdict(_Site(form, traced, candidate), small)
        except LaunchError as error:
            text = str(error)
            continue
        except Exception as error:  # what fails to run is refused, not fatal
            text = f"{type(error).__name__}: {first_line(error)}"
            continue
        verdict = judged or verdict
        if judged is not None and (judged.reason is None or make is _itself):
            return judged
    return verdict or Verdict(f"could not be run for verification: {text}")


def _itself(candidate: Candidate) -> Candidate:
    return candidate


def _verdict(site: _Site, small: bool) -> Verdict:
    """The verdict by unit normals, unless another regime finds a reason against it."""
    normals = UnitNormals()
    verdict = _tried(site, small, NORMAL, normals)
    for regime in regimes(site.candidate):
        if verdict.reason is not None:
            break
        with _one_thread(small):
            reason = _tried(site, small, regime, normals).reason
        if reason is not None:
            verdict = Verdict(f"with inputs that are {regime.name}: {reason}")
    return verdict


@contextmanager
def _one_thread(small: bool) -> Iterator[None]:
    # Waking the other threads would take most of the time where sizes are small. Unit normals are
    # run in as many threads as the model has. The number of threads is of the whole process; it is
    # set back at once.
    before = torch.get_num_threads()
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tried(site: _Site, small: bool, regime: Regime, normals: UnitNormals) -> Verdict:
    # The largest error of a small tensor is a matter of luck, for the original as for the rewrite:
    # a refusal by one draw of inputs is judged by several.
    inputs = Draws(site.candidate, small, regime, 1, normals)
    verdict = _check(site, inputs, regime)
    for count in draws(next(iter(inputs))):
        if verdict.reason is None or EXCEEDS not in verdict.reason:
            break
        if len(inputs) > 1 and PEAK not in verdict.reason:
            break  # the error of all elements of several draws is no luck
        inputs = Draws(site.candidate, small, regime, count, UnitNormals())
        verdict = _check(site, inputs, regime)
    return verdict


class _Site:
    """A candidate, ready to be run: the original, the rewrite, and the original in fp64."""

    def __init__(self, candidate: Candidate, traced: bool, real: Candidate | None = None) -> None:
        # ``candidate`` may be a smaller form of ``real``.
        c = self.candidate = candidate
        real = real or c
        bodies = {str(n.target): b for n in c.interior if (b := facts.body(n))}
        original = c.original()
        self.original, self.exact = (kind(original, bodies).outputs for kind in (Plain, Exact))
        self.replacement = Plain(c.replacement(), {}).outputs
        self.traced = traced
        self.packed = packed(c.interior)
        examples = [facts.tensor(n) for n in c.inputs]
        self.differentiable = [t is not None and t.requires_grad for t in examples]
        self.fixed = frozenset(tuple(t.shape) for t in examples if t is not None and is_static(t))
        self.laid_out = [layout_is_read(n) for n in real.outputs]
        self.grad, self.enlargement = _gradients_are_on(real), enlargement(c)

    def setting(self, thorough: bool, upstream: float) -> VerifySettings:
        about = self.differentiable, self.fixed, self.laid_out, self.grad
        return VerifySettings(*about, thorough, upstream, self.enlargement)


def _gradients_are_on(c: Candidate) -> bool:
    graph = c.interior[0].graph
    if not any(switches_mode(n) for n in graph.nodes):
        return torch.is_grad_enabled()
    return bool(modes(graph)[c.interior[-1]][0])


def _check(site: _Site, draws: Iterable[Sequence[Any]], regime: Regime) -> Verdict:
    normal = regime is NORMAL
    setting = site.setting(normal, regime.upstream)
    with ExitStack() as around:
        for settings in site.candidate.autocast:
            around.enter_context(torch.autocast(*settings))
        with _seen_as_traced(False):
            original = runs(site.original, draws, setting)
            ours = [runs(site.replacement, draws, setting)]
        if normal and site.traced:
            with _seen_as_traced(True):
                ours.append(_compiled(runs(site.replacement, draws, setting)))
    inputs = site.candidate.inputs
    wide = (
        [x if n in site.packed else double(x) for n, x in zip(inputs, draw, strict=True)]
        for draw in draws
    )
    with _seen_as_traced(False):
        exact = runs(site.exact, wide, site.setting(False, regime.upstream))
    for outcome in ours:
        reason = difference(outcome, original, exact, within_range=regime in REGIMES)
        if reason:
            return Verdict(reason)
    if not normal:
        return Verdict()
    rows = sum(tokens(draw, site.fixed) for draw in draws)
    return Verdict(None, _figures(ours[0], original, exact, rows))


def _compiled(outcome: Outcome) -> Outcome:
    # A compiler makes a tensor like others of a view that a function returned.
    traits = frozenset(t for t in outcome.traits if not t.endswith(UNWRITABLE))
    return replace(outcome, traits=traits)


@contextmanager
def _seen_as_traced(traced: bool) -> Iterator[None]:
    # Ops take the form that they have under a tracer, or in eager mode. Verification happens while
    # TorchDynamo compiles, and torch says so to all code.
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = traced
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _figures(ours: Outcome, original: Outcome, exact: Outcome, rows: int) -> Figures:
    worst: list[float | None] = [None, None]
    for kind in range(2):
        triples = zip(*(run.results[kind] for run in (ours, original, exact)), strict=True)
        for a, b, o in triples:
            if a is None or b is None or o is None:
                continue
            if errors(b, o).rms < _NOISE:  # a gradient that is zero but for rounding says nothing
                worst[kind] = max(worst[kind] or 0.0, errors(a, o).rms)
    return Figures(
        error=worst[KINDS.index("output")],
        grad_error=worst[KINDS.index("gradient of input")],
        saved_before=original.saved / rows,
        saved_after=ours.saved / rows,
    )


def structure(c: Candidate, named: Callable[[Any], str] = str) -> Any:
    """A key that is equal for candidates that need only one verification.

    ``named`` gives functions their names; by default they are those of this process.
    """
    index: dict[fx.Node, str] = {n: f"in{i}" for i, n in enumerate(c.inputs)}
    index.update({n: f"n{i}" for i, n in enumerate(c.interior)})
    symbols: dict[str, str] = {}

    def plain(value: Any) -> Any:
        return str(fx.node.map_arg(value, lambda n: index.get(n, "?")))

    def size(s: Any) -> Any:
        """A number, or the symbol by its first use: equal sizes stay equal."""
        return s if type(s) is int else symbols.setdefault(str(s), f"s{len(symbols)}")

    body = tuple(
        (getattr(facts.body(n), "code", None) or named(n.target), plain(n.args), plain(n.kwargs))
        for n in c.interior
    )
    signature = []
    for n in c.inputs:
        t = facts.tensor(n)
        if t is None:
            signature.append(str(type(facts.value(n))))
            continue
        shape = tuple(size(s) for s in t.shape)
        signature.append(str((shape, t.dtype, t.device, t.requires_grad, layout(t))))
    outputs = tuple((index[n], layout_is_read(n)) for n in c.outputs)
    around = str(c.autocast), str(settings_around()), _gradients_are_on(c)
    return c.rule.name, c.match.spelling, body, tuple(signature), outputs, *around


@contextmanager
def quiet_randomness() -> Iterator[None]:
    """Leave the global random state as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


# --------------------------------------------------------------------- the differences of two runs


def difference(
    ours: Outcome, original: Outcome, exact: Outcome, within_range: bool = False
) -> str | None:
    """Say in what the rewrite's run differs from the original's; None where it does not.

    ``exact`` is the original's in fp64. With ``within_range``, only values that are finite in the
    original and not below the smallest normal number of its dtype are compared.
    """
    return (
        _effects(ours, original)
        or _differing_trait(ours, original)
        or _values(ours, original, exact, within_range)
    )


def _effects(ours: Outcome, original: Outcome) -> str | None:
    if len(ours.results[0]) != len(original.results[0]):
        return f"{len(ours.results[0])} outputs instead of {len(original.results[0])}"
    for kind, what in enumerate(KINDS):
        pairs = zip(ours.results[kind], original.results[kind], strict=True)
        for i, (a, b) in enumerate(pairs):
            if (a is None) == (b is None):
                continue
            which = "original" if a is None else "rewrite"
            if what == "input":
                return f"only the {which} writes to input {i}"
            return f"{what} {i}: only the {which} has it"
    if ours.random != original.random:
        return "the rewrite draws other random numbers than the original"
    return None


def _differing_trait(ours: Outcome, original: Outcome) -> str | None:
    for a, b in zip(ours.results[0], original.results[0], strict=True):
        if a is not None and b is not None and (a.shape, a.dtype) != (b.shape, b.dtype):
            return None  # said with the values
    new = ours.traits - original.traits
    missing = {
        t for t in original.traits - ours.traits if not (t.endswith(UNWRITABLE) or STRIDES in t)
    }
    for which, traits in (("rewrite", new), ("original", missing)):
        if traits:
            return f"of the {which} only: {min(traits)}"
    return None


def _values(ours: Outcome, original: Outcome, exact: Outcome, within_range: bool) -> str | None:
    for kind, what in enumerate(KINDS):
        # in fp64 one backward is enough: a second one has the same truth
        truth = exact.results[1 if "second" in what else kind]
        triples = zip(ours.results[kind], original.results[kind], truth, strict=True)
        for i, (a, b, o) in enumerate(triples):
            if a is None or b is None:
                continue
            if o is None:
                return f"{what} {i}: there is none in fp64"
            problem = _exceeded(a, b, o, within_range, ours.draws)
            if problem is not None:
                return f"{what} {i}: {problem}"
    return None


def _exceeded(
    ours: Tensor, eager: Tensor, exact: Tensor, within_range: bool, draws: int
) -> str | None:
    if within_range and ours.shape == eager.shape and eager.is_floating_point():
        there = torch.isfinite(eager) & torch.isfinite(exact)
        if not bool(torch.isfinite(ours[there]).all()):
            return "it is not finite where the original is"
        ours, eager, exact = (_within(t, there, eager.dtype) for t in (ours, eager, exact))
        if draws > 1:
            ours, eager, exact = (_levelled(t, exact) for t in (ours, eager, exact))
    return exceeded(ours, eager, exact, draws)


def _within(t: Tensor, there: Tensor, dtype: torch.dtype) -> Tensor:
    """``t`` with 0 where it is not to be compared, or has no relative precision in ``dtype``."""
    return torch.where(there & (t.abs() >= torch.finfo(dtype).smallest_normal), t, 0)


def _levelled(t: Tensor, exact: Tensor) -> Tensor:
    # ``t`` (draws, ...) with each draw scaled to about one, by a power of two: that is exact. Else
    # the draw with the largest number would be the only one that counts.
    largest = exact.reshape(exact.shape[0], -1).abs().amax(1)
    exponent = torch.where(largest > 0, largest.log2().floor(), 0)
    scale = torch.exp2(-exponent).to(t.dtype)
    return t * scale.view(-1, *[1] * (t.dim() - 1))


# One run of a graph under observation: its results, and all of its other effects.
#
# Every run has separate copies of the inputs, in the layout that they were drawn in. What it writes
# into them, which memory its outputs share, whether they can be written to, what it draws from the
# random generator and which gradients it has is recorded with outputs and gradients, to be
# compared.


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
