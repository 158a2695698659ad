"""Verification: a rewrite is run against what it replaces before it is installed.

The matched subgraph and its replacement run on fresh random inputs of the site's dtypes and
layouts and a small batch, with random upstream gradients. Both are compared with the subgraph in
fp64; the rewrite is installed only when its error, in every output and every gradient, is within
the budget (``budget.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from .budget import EXCEEDS, errors, exceeded
from .graph import facts
from .graph.canon import canonical
from .graph.quantized import is_wrapped, product
from .graph.whole import is_leaf
from .kernels import quant_linear
from .kernels.quantized import Quantized
from .match.apply import Candidate, Verdict
from .report import Figures
from .sampling import Sizes, draws, hint, is_static, sample, tokens

_NOISE = 0.5
"""Relative error of the original above which its result is nothing but rounding."""


@dataclass
class Verifier:
    """Checks candidates, and remembers the verdicts of equal ones.

    Attributes:
        always: check every candidate, not only the first of its kind.
        verdicts: (rule, structure, dtypes, device) -> verdict.
    """

    always: bool = False
    verdicts: dict[Any, Verdict] = field(default_factory=dict)

    def __call__(self, candidate: Candidate) -> Verdict:
        """Return the verdict on ``candidate``, from memory where that is allowed."""
        key = _structure(candidate)
        if self.always or key not in self.verdicts:
            self.verdicts[key] = _judge(candidate)
        return self.verdicts[key]


def _judge(candidate: Candidate) -> Verdict:
    """Check with small sizes; with the real ones where the formula does not fit small ones.

    The largest error of a small tensor is a matter of luck, for the original as for the rewrite:
    what one draw of inputs finds too large is judged by several.
    """
    text = ""
    for small in (True, False):
        try:
            first = sample(candidate, Sizes(small))
            verdict = _check(candidate, [first])
            if verdict.reason is not None and EXCEEDS in verdict.reason:
                more = (sample(candidate, Sizes(small), d) for d in range(1, draws(first)))
                verdict = _check(candidate, [first, *more])
            return verdict
        except Exception as error:  # what fails to run is refused, not fatal
            text = f"{type(error).__name__}: {error}"
    return Verdict(f"could not be run for verification: {text}")


def _check(c: Candidate, given: list[list[Any]]) -> Verdict:
    bodies: dict[str, Any] = {str(n.target): found for n in c.interior if (found := facts.body(n))}
    original = fx.GraphModule(bodies, c.original())
    replacement = fx.GraphModule({}, c.replacement())
    differentiable = [
        bool((t := facts.tensor(n)) is not None and t.requires_grad) for n in c.inputs
    ]
    fixed = {
        tuple(t.shape) for n in c.inputs if (t := facts.tensor(n)) is not None and is_static(t)
    }
    with ExitStack() as around:
        for settings in c.autocast:
            around.enter_context(torch.autocast(*settings))
        theirs = _runs(original.forward, given, differentiable, fixed)
        ours = _runs(replacement.forward, given, differentiable, fixed)
    stored = _stored(c)
    wide = [
        [x if n in stored else _double(x) for n, x in zip(c.inputs, inputs, strict=True)]
        for inputs in given
    ]
    exact = _runs(_Exact(original, garbage_collect_values=False).run, wide, differentiable, fixed)
    worst: list[float | None] = [None, None]
    for kind, what in enumerate(("output", "gradient of input")):
        triples = zip(*(run.results[kind] for run in (ours, theirs, exact)), strict=True)
        for i, (a, b, o) in enumerate(triples):
            if b is None and a is None:
                continue
            place = f"{what} {i}"
            if a is None or b is None or o is None:
                return Verdict(f"{place}: only one of original and rewrite has it")
            problem = exceeded(a, b, o)
            if problem is not None:
                return Verdict(f"{place}: {problem}")
            if errors(b, o).rms < _NOISE:  # a gradient that is zero but for rounding says nothing
                worst[kind] = max(worst[kind] or 0.0, errors(a, o).rms)
    rows = sum(tokens(inputs) for inputs in given)
    before, after = theirs.kept / rows, ours.kept / rows
    return Verdict(
        None,
        Figures(error=worst[0], grad_error=worst[1], saved_before=before, saved_after=after),
    )


@dataclass(frozen=True)
class Outcome:
    """What one run gave: ``results`` are (outputs, gradients), ``kept`` is bytes for backward."""

    results: tuple[list[Tensor | None], list[Tensor | None]]
    kept: int


def _runs(
    fn: Callable[..., Any], draws: list[list[Any]], differentiable: list[bool],
    fixed: set[tuple[int, ...]],
) -> Outcome:  # fmt: skip
    """The outcome for all draws: their results stacked, as one tensor each."""
    made = [_run(fn, inputs, differentiable, fixed, i) for i, inputs in enumerate(draws)]
    if len(made) == 1:
        return made[0]
    outputs, grads = (
        [
            None if tensors[0] is None else torch.stack(tensors)
            for tensors in zip(*kind, strict=True)
        ]
        for kind in zip(*(m.results for m in made), strict=True)
    )
    return Outcome((outputs, grads), sum(m.kept for m in made))


def _run(
    fn: Callable[..., Any], inputs: list[Any], differentiable: list[bool],
    fixed: set[tuple[int, ...]], seed: int,
) -> Outcome:  # fmt: skip
    """Outputs, gradients and bytes kept for backward of ``fn`` on copies of ``inputs``.

    What has the shape of a weight (``fixed``) does not grow with the tokens and is not counted: the
    loss makes the gradient of a trained head in forward.
    """
    leaves = [
        x.detach().requires_grad_(d) if isinstance(x, Tensor) else x
        for x, d in zip(inputs, differentiable, strict=True)
    ]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    kept: dict[int, int] = {}
    own = {x.untyped_storage().data_ptr() for x in leaves if isinstance(x, Tensor)}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and tuple(t.shape) not in fixed:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = [o for o in fn(*leaves) if isinstance(o, Tensor)]
    live = [o for o in outputs if o.requires_grad]
    if not wanted or not live:
        return Outcome(([o.detach() for o in outputs], [None] * len(wanted)), 0)
    generator = torch.Generator().manual_seed(seed + 1)
    # drawn for every output: original and rewrite may differ in which of them have a gradient
    drawn = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    upstream = [
        u.to(o.device, o.dtype) for o, u in zip(outputs, drawn, strict=True) if o.requires_grad
    ]
    grads = torch.autograd.grad(live, wanted, upstream, allow_unused=True)
    return Outcome(([o.detach() for o in outputs], list(grads)), sum(kept.values()))


class _Wide(TorchFunctionMode):
    """Makes casts to a floating-point dtype casts to fp64, in code that is no graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        wide = {k: _widen(v) for k, v in (kwargs or {}).items()}
        return func(*(_widen(a) for a in args), **wide)


class _Exact(fx.Interpreter):
    """Runs a graph in fp64 whatever dtypes its nodes ask for."""

    def run_node(self, n: fx.Node) -> Any:
        if is_leaf(n.target):
            with _Wide():
                return super().run_node(n)
        if n.op == "call_method" and n.target in ("float", "half", "bfloat16"):
            return self.fetch_args_kwargs_from_env(n)[0][0].double()
        canon = canonical(n)
        if canon is not None and canon.name == "quantized_linear":
            x, bias, *weight = fx.node.map_arg(canon.args, lambda a: self.env[a])
            return quant_linear.reference(x, Quantized(*weight), bias)
        if is_wrapped(n) and any(product(u) for u in n.users):
            return None  # run at its user
        if canon is not None and canon.name == "grouped_mm":  # torch's takes no fp64
            return _grouped_mm(*fx.node.map_arg(canon.args[:3], lambda a: self.env[a]))
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_widen(a) for a in args), {k: _widen(v) for k, v in kwargs.items()}


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows of ``x`` (S, K) times its own matrix of ``weight`` (E, K, N)."""
    groups = torch.tensor_split(x, ends[:-1].long().cpu())
    return torch.cat([rows @ matrix for rows, matrix in zip(groups, weight, strict=True)])


def _stored(c: Candidate) -> set[Any]:
    """The inputs that hold packed weights: bytes, whatever dtype they are stored under."""
    fields = len(Quantized._fields)
    tuples = [a for n in c.interior for a in n.args if isinstance(a, tuple) and len(a) == fields]
    held = {a[0] for a in tuples if isinstance(a[0], fx.Node)}
    for n in c.interior:
        canon = canonical(n)
        if canon is not None and canon.name == "quantized_linear":
            held.add(canon.args[2])
    return held


def _widen(x: Any) -> Any:
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _structure(c: Candidate) -> Any:
    """What makes two candidates equal for verification."""
    index: dict[fx.Node, str] = {n: f"in{i}" for i, n in enumerate(c.inputs)}
    index.update({n: f"n{i}" for i, n in enumerate(c.interior)})

    def plain(value: Any) -> Any:
        return str(fx.node.map_arg(value, lambda n: index.get(n, "?")))

    body = tuple((str(n.target), plain(n.args), plain(n.kwargs)) for n in c.interior)
    signature = []
    for n in c.inputs:
        t = facts.tensor(n)
        if t is None:
            signature.append(str(type(facts.value(n))))
            continue
        static = tuple(s if type(s) is int else "s" for s in t.shape)
        order = tuple(sorted(range(t.dim()), key=lambda d: -hint(t.stride(d))))
        signature.append(str((static, t.dtype, t.device, t.requires_grad, order)))
    outputs = tuple(index[n] for n in c.outputs)
    return c.rule.name, c.match.spelling, body, tuple(signature), outputs, str(c.autocast)


@contextmanager
def quiet_randomness() -> Iterator[None]:
    """Leave the global random state as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield
