"""What every op promises, tried on the calls that its record gives: an op is tested by being there.

The checks are functions of a ``Case``; the tests call them for every case of every op, and at the
end show with ops that break their promises that the checks find it.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fusewright.kernels.op import ExampleSizes, Maker, Op
from fusewright.kernels.processor import KINDS, assume
from fusewright.kernels.second_order import differentiable, double_backward
from fusewright.rewrite.op_table import OPS

from .calls import CASES, ODD, Call, Case, library_calls
from .util import Stop, assert_parity, assert_parity_of_draws, saved_tensors

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TINY = ExampleSizes(2, 3, 4, 6, 2, 1, 4, 7, 2, 2, 3)
"""For derivatives by differences."""


each_case = pytest.mark.parametrize("name", CASES)
each_op = pytest.mark.parametrize("name", [op.name for op in OPS])


def _outs(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _fresh(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As they are laid out."""
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


# ----------------------------------------------------------------------------- values and gradients


def check_parity(case: Case) -> None:
    """Within the error budget, forward and backward; inputs and what is saved are not written."""
    call, seeds = case.call(), itertools.count()
    if case.dtype is F64:
        _check_exact(call)
        return
    assert_parity_of_draws(call.ours, call.reference, lambda: case.call(next(seeds)).tensors)


def _check_exact(call: Call) -> None:
    made, before = [], _fresh(call.tensors)
    for run in (call.ours, call.reference):
        outs = _outs(run(*call.tensors))
        live = [o for o in outs if o.requires_grad]
        ups = [torch.linspace(-1, 2, o.numel(), dtype=F64).view(o.shape) for o in live]
        grads = _gradients(call.tensors, live, ups)
        alone = [_gradients(call.tensors, [o], [u]) for o, u in zip(live, ups, strict=True)]
        made.append([*outs, *grads, *itertools.chain(*(alone if len(live) > 1 else ()))])
    assert len(made[0]) == len(made[1]), "an output has no gradient"
    for ours, theirs in zip(*made, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert all(map(torch.equal, call.tensors, before)), "an input was written to"


def _gradients(
    tensors: Sequence[Tensor], outs: Sequence[Tensor], ups: Sequence[Tensor]
) -> list[Tensor]:
    """Of the tensors that want one; zeros where there is none. The graph is kept."""
    wanted = _wanted(tensors)
    if not (wanted and outs):
        return []
    grads = torch.autograd.grad(outs, wanted, ups, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]


def _wanted(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.requires_grad]


@each_case
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("train", "strided"),
    [(True, False), (True, True), (False, True)],
    ids=["trained", "trained, with gaps", "frozen, with gaps"],
)
def test_parity(name: str, dtype: torch.dtype, train: bool, strided: bool) -> None:
    check_parity(replace(CASES[name], dtype=dtype, train=train, strided=strided))


ADAPTED = [
    name for name, case in CASES.items()
    if case.op.name in ("lora_linear", "qkv_block", "mlp_block", "dora")
    or name.endswith(("-lora", "-adapted"))
    if name not in ("qkv_block-plain", "mlp_block-packed")  # which have no adapter
]  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(ADAPTED),
    kind=st.sampled_from(list(KINDS)),
    dtypes=st.sampled_from([(BF16, F32), (BF16, BF16), (F16, F32), (F16, F16)]),
    tokens=st.sampled_from([1, 2, 9, 26]),
    seed=st.integers(0, 99),
)
def test_adapters_on_every_processor(
    name: str, kind: str, dtypes: tuple[torch.dtype, torch.dtype], tokens: int, seed: int
) -> None:
    """With fp32 adapters and few rows, too: no inner result is rounded that eager mode keeps."""
    sizes = replace(ODD, batch=1, seq=tokens)
    case = replace(CASES[name], dtype=dtypes[0], adapters=dtypes[1], sizes=sizes)
    other = replace(case, adapters=F64).call().tensors
    adapters = [i for i, t in enumerate(other) if t.dtype is F64]
    assert adapters, f"{name} has no adapter"
    seeds = itertools.count(seed, 100)

    def drawn() -> list[Tensor]:
        tensors = case.call(next(seeds)).tensors
        with torch.no_grad():  # as large as training makes them: a small part of the layer
            for i in adapters:
                tensors[i].mul_(0.25)
        return tensors

    call = case.call()
    with assume(KINDS[kind]):
        assert_parity_of_draws(call.ours, call.reference, drawn)


def check_gradients(case: Case) -> None:
    call = case.call()
    if any(t.requires_grad for t in call.tensors):
        assert torch.autograd.gradcheck(call.ours, call.tensors, fast_mode=True)


@each_case
def test_gradcheck(name: str) -> None:
    check_gradients(replace(CASES[name], sizes=TINY))


def check_no_rows(case: Case) -> None:
    """Outputs without elements, or a loss; the gradients of weights are zero."""
    call = replace(case, sizes=replace(case.sizes, batch=0)).call()
    outs = _outs(call.ours(*call.tensors))
    assert all(o.numel() == 0 or o.ndim == 0 or not call.tensors[0].ndim for o in outs)
    live = [o.sum() for o in outs if o.requires_grad]
    grads = torch.autograd.grad(live, _wanted(call.tensors), allow_unused=True) if live else ()
    assert not any(g is not None and g.any() for g in grads)


@pytest.mark.parametrize(
    "name", [n for n in CASES if "attention" not in n and n != "dora_row_norms"]
)
def test_no_rows(name: str) -> None:
    """Attention refuses a batch of none, and norms of weights have no batch."""
    check_no_rows(replace(CASES[name], dtype=F32, sizes=TINY))


# ------------------------------------------------------------------------ which gradients there are


class _Node:
    """A node of the graph that is an op's own autograd function."""

    def __init__(self, node: Any) -> None:
        self.node, self.needs = node, node.needs_input_grad

    def raw(self, differentiable: bool) -> tuple[Any, ...]:
        """What its backward returns, before autograd drops what nobody wants."""
        metadata = self.node._input_metadata
        grads = [
            torch.ones(tuple(m.shape), dtype=m.dtype) if m.shape or len(metadata) == 1 else None
            for m in metadata  # without a shape: of an output that has no gradient
        ]
        try:
            with torch.set_grad_enabled(differentiable):
                return tuple(self.node.apply(*grads))
        except NotImplementedError:  # what that would need is not kept
            assert differentiable
            return ()


def _own_nodes(outs: Sequence[Tensor]) -> Iterator[_Node]:
    left, seen = [t.grad_fn for t in outs], set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [n for n, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            yield _Node(node)


def check_only_needed_gradients(case: Case) -> None:
    """With one input wanted at a time, its gradient is the same, and nothing else is computed."""
    call = case.call()
    trained = [i for i, t in enumerate(call.tensors) if t.requires_grad]
    upstream = [torch.randn_like(o) for o in _outs(call.reference(*call.tensors))]

    def gradients(chosen: Sequence[int]) -> list[Tensor | None]:
        tensors = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(call.tensors)]
        outs = _outs(call.ours(*tensors))
        live = [(o, u) for o, u in zip(outs, upstream, strict=True) if o.requires_grad]
        for own in _own_nodes(outs):
            for raw in (own.raw(False), own.raw(True)):
                for grad, need in zip(raw, own.needs, strict=bool(raw)):
                    assert need or grad is None, "a gradient that nobody wants was computed"
        grads = torch.autograd.grad(
            [o for o, _ in live], [tensors[i] for i in chosen], [u for _, u in live],
            allow_unused=True,
        )  # fmt: skip
        return list(grads)

    if trained:
        every = gradients(trained)
        for i, expected in zip(trained, every, strict=True):
            _same(gradients([i]), [expected])


@each_case
def test_only_needed_gradients_are_computed(name: str) -> None:
    check_only_needed_gradients(replace(CASES[name], sizes=TINY))


def check_no_gradient_is_none(case: Case, differentiable: bool) -> None:
    """Optimizers skip what has none, and let momentum and decay move what has zeros."""
    call = case.call()
    for run in (call.ours, call.reference):
        tensors = _fresh(call.tensors)
        live = [o for o in _outs(run(*tensors)) if o.requires_grad]
        if live:
            sum(Stop.apply(o).sum() for o in live).backward(create_graph=differentiable)
        assert all(t.grad is None for t in tensors)


@each_case
@pytest.mark.parametrize("differentiable", [False, True])
def test_no_gradient_is_none_and_not_zeros(name: str, differentiable: bool) -> None:
    check_no_gradient_is_none(replace(CASES[name], sizes=TINY), differentiable)


# ----------------------------------------------------------------------- gradients of gradients

NOT_KEPT = {"dora-update": "only the sum of two products is kept"}
NOT_KEPT_FROZEN = {
    **NOT_KEPT,
    **dict.fromkeys(
        (
            name
            for name in CASES  # what adapters that are trained need is kept
            if name.startswith(("moe_experts", "moe_down")) and not name.endswith("-lora")
        ),
        "the experts are frozen",
    ),
    "mlp_block-packed": "gate and up are frozen",
}
"""Case -> why it has no second derivative: forward does not keep what that needs."""

each_differentiable = pytest.mark.parametrize(
    ("name", "train"),
    [
        (name, train)
        for name, case in CASES.items()
        for train in (True, False)
        if any(t.requires_grad for t in replace(case, sizes=TINY).call().tensors)
        and name not in (NOT_KEPT if train else NOT_KEPT_FROZEN)
    ],
)


def _penalty(fn: Callable[..., Any], tensors: Sequence[Tensor], square: bool) -> list[Any]:
    """The gradients of a gradient penalty; unless ``square``, upstream ones have no history."""
    wanted = [t for t in tensors if t.requires_grad]
    outs = [o for o in _outs(fn(*tensors)) if o.requires_grad]
    total: Any = sum(o.square().sum() if square else o.sum() for o in outs)
    grads = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
    penalty: Any = sum(g.square().sum() for g in grads if g is not None)
    if not penalty.requires_grad:
        return [None for _ in wanted]
    return list(torch.autograd.grad(penalty, wanted, allow_unused=True))


def _same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        zero = torch.zeros((), dtype=F64)
        a, b = zero if a is None else a, zero if b is None else b
        assert torch.allclose(a, b.expand_as(a), rtol=1e-7, atol=1e-9), float((a - b).abs().max())


def _plain(call: Call) -> Callable[..., Any]:
    """The reference, of PyTorch's kernels those that have second derivatives."""

    def run(*tensors: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return call.reference(*tensors)

    return run


def check_double_backward(case: Case) -> None:
    call = case.call()
    for square in (False, True):
        theirs = _penalty(_plain(call), _fresh(call.tensors), square)
        _same(_penalty(call.ours, _fresh(call.tensors), square), theirs)


@each_differentiable
def test_a_gradient_penalty(name: str, train: bool) -> None:
    check_double_backward(replace(CASES[name], sizes=TINY, train=train))


@each_differentiable
def test_gradgradcheck(name: str, train: bool) -> None:
    call = replace(CASES[name], sizes=TINY, train=train).call()
    assert torch.autograd.gradgradcheck(call.ours, call.tensors, fast_mode=True)


@each_differentiable
def test_within_a_checkpoint(name: str, train: bool) -> None:
    call = replace(CASES[name], sizes=TINY, train=train).call()

    def checkpointed(*tensors: Tensor) -> Any:
        return checkpoint(call.ours, *tensors, use_reentrant=False)

    theirs = _penalty(_plain(call), _fresh(call.tensors), True)
    _same(_penalty(checkpointed, _fresh(call.tensors), True), theirs)


@each_differentiable
def test_a_batch_of_gradients(name: str, train: bool) -> None:
    """``is_grads_batched`` runs backward under vmap."""
    call = replace(CASES[name], sizes=TINY, train=train).call()
    found = []
    for fn in (call.ours, _plain(call)):
        tensors = _fresh(call.tensors)
        out = _outs(fn(*tensors))[0]
        ups = torch.randn((3, *out.shape), generator=torch.Generator().manual_seed(0), dtype=F64)
        wanted = [t for t in tensors if t.requires_grad]
        found.append(
            torch.autograd.grad(out, wanted, ups, is_grads_batched=True, allow_unused=True)
        )
    _same(*found)


@each_differentiable
def test_another_threads_compilation_changes_no_derivative(
    name: str, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = replace(CASES[name], sizes=TINY, train=train)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # all threads see it
    check_double_backward(case)
    call = case.call()
    tensors = _fresh(call.tensors)
    sum(Stop.apply(o).sum() for o in _outs(call.ours(*tensors)) if o.requires_grad).backward()
    assert all(t.grad is None for t in tensors)


@pytest.mark.parametrize(
    ("name", "train"), [(n, True) for n in NOT_KEPT] + [(n, False) for n in NOT_KEPT_FROZEN]
)
def test_what_was_not_kept_is_an_error_that_says_what_to_do(name: str, train: bool) -> None:
    """Also where the upstream gradient has no history: never a value without one."""
    call = replace(CASES[name], sizes=TINY, train=train).call()
    why = (NOT_KEPT if train else NOT_KEPT_FROZEN)[name]
    with pytest.raises(NotImplementedError, match=rf"(?s){why}.*restore\(model\)"):
        _penalty(call.ours, _fresh(call.tensors), False)
    sum(o.sum() for o in _outs(call.ours(*_fresh(call.tensors)))).backward()  # once is as ever


@pytest.mark.parametrize("name", ["lora_linear", "lora_linear-quantized", "qkv_block", "mlp_block"])
def test_an_adapter_of_which_only_b_is_trained(name: str) -> None:
    call = replace(CASES[name], sizes=TINY).call()
    for t in _wanted(call.tensors)[1:]:
        t.requires_grad_(t.shape[-1] == TINY.rank)
    why = "gate and up are frozen" if name == "mlp_block" else "B is trained and A is not"
    with pytest.raises(NotImplementedError, match=rf"(?s){why}.*restore\(model\)"):
        _penalty(call.ours, call.tensors, False)
    sum(o.sum() for o in _outs(call.ours(*call.tensors))).backward()


def test_a_weight_that_the_input_is_made_of_counts_once() -> None:
    w, x = (torch.randn(n, 4, dtype=F64).mul_(0.5).requires_grad_() for n in (4, 3))
    norm, op = torch.ones(4, dtype=F64), CASES["rms_norm_linear"].op

    def call(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda w: fn(F.linear(x, w).tanh(), norm, 1e-5, 0.0, "inner", [w], [None])[0]

    _same(_penalty(call(op.call), [w], True), _penalty(call(op.reference), [w], True))


# ------------------------------------------------------------------------ memory of the outputs


def check_outputs_may_be_written_to(case: Case) -> None:
    """But those that the record names, which the engine copies where something writes into them."""
    call = case.call()
    count = len(_outs(call.ours(*call.tensors)))
    for i in range(count):
        tensors = _fresh(call.tensors)
        outs = _outs(call.ours(*tensors))
        own = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
        assert outs[i].untyped_storage().data_ptr() not in own, "an output is an input's memory"
        if i not in call.op.saved_outputs:
            outs[i].mul_(2)
        live = [o.sum() for o in outs if o.requires_grad]
        if live:
            sum(live).backward()
    with torch.no_grad():
        outs = _outs(call.ours(*call.tensors))
        for i, written in enumerate(outs):
            others = [o.clone() for o in outs]
            written.add_(1)
            for j, (other, before) in enumerate(zip(outs, others, strict=True)):
                assert i == j or torch.equal(other, before), "two outputs share memory"


@each_case
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_outputs_may_be_written_to(name: str, train: bool) -> None:
    """Model code may add to an output in place, as it may to eager's (Falcon does)."""
    check_outputs_may_be_written_to(replace(CASES[name], dtype=F32, sizes=TINY, train=train))


def check_saved_outputs(case: Case) -> None:
    call = case.call()
    with saved_tensors() as saved:
        outs = _outs(call.ours(*call.tensors))
    kept = {t.untyped_storage().data_ptr() for t in saved}
    found = [i for i, o in enumerate(outs) if o.untyped_storage().data_ptr() in kept]
    assert set(found) <= set(call.op.saved_outputs)


@each_case
def test_outputs_that_are_kept_are_known(name: str) -> None:
    check_saved_outputs(replace(CASES[name], dtype=F32, sizes=TINY))


# ------------------------------------------------------------------------------------- tracing

READS = ("attention-packed", "moe_down", "moe_experts")
"""Ops that read numbers, such as how many rows count, where nobody traces them."""


def check_fake_is_real(case: Case) -> None:
    """Shapes, dtypes and strides of outputs and gradients are known without computing them."""
    call = case.call()

    def layouts(tensors: Sequence[Tensor]) -> list[Any]:
        outs = _outs(call.ours(*tensors))
        wanted = [t for t in tensors if t.requires_grad]
        live = [o for o in outs if o.requires_grad]
        ups = [torch.ones_like(o) for o in live]
        grads = torch.autograd.grad(live, wanted, ups, allow_unused=True) if live else ()
        return [None if t is None else (t.shape, t.dtype, t.stride()) for t in (*outs, *grads)]

    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in call.tensors]
        found = layouts(fake)
    assert found == layouts(_fresh(call.tensors))


def check_library_ops(case: Case) -> None:
    """Each that runs writes into no input, returns none, and is what its fake form declares."""
    for op, args in library_calls(case.call()):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@each_case
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_fake_is_real(name: str, train: bool) -> None:
    case = replace(CASES[name], dtype=BF16, train=train)
    try:
        check_fake_is_real(case)
    except (DataDependentOutputException, DynamicOutputShapeException):
        assert name.startswith(READS)


@each_case
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_library_ops_keep_their_contracts(name: str, train: bool) -> None:
    check_library_ops(replace(CASES[name], dtype=BF16, train=train))


def check_compiled(case: Case, backend: str) -> None:
    call = case.call()
    torch._dynamo.reset()
    compiled = torch.compile(call.ours, fullgraph=True, dynamic=True, backend=backend)
    with functorch_config.patch(donated_buffer=False):  # backward runs twice over one graph
        assert_parity(compiled, call.reference, *call.tensors)


@pytest.mark.long("rope")
@each_op
def test_aot_autograd_traces_it(name: str) -> None:
    check_compiled(replace(CASES[name], dtype=F32), "aot_eager")


INDUCTOR = (
    "rms_norm", "add_rms_norm", "layer_norm", "rms_norm_linear", "rope", "glu", "glu_packed",
    "lora_linear", "qkv_block", "mlp_block", "mlp_block-input", "moe_experts",
)  # fmt: skip
"""Those that Inductor fuses, and two that are opaque to it."""


@pytest.mark.parametrize(
    "name", [n if n == "rms_norm" else pytest.param(n, marks=pytest.mark.long) for n in INDUCTOR]
)
def test_inductor_traces_it(name: str) -> None:
    check_compiled(replace(CASES[name], dtype=BF16), "inductor")


# ---------------------------------------------------------------------------------- the record


@each_op
def test_the_record(name: str, choose_for: Callable[[str], None]) -> None:
    choose_for("avx512_bf16")  # which has a reason of its own against no example
    op = CASES[name].op
    names = [list(inspect.signature(f).parameters) for f in (op.call, op.reference)]
    assert names[0] == names[1]
    args = op.example(Maker(BF16, generator=torch.Generator().manual_seed(0)))
    reasons = op.unsupported(*args)
    assert reasons == [] or all("as fast in PyTorch" in r or "as fast" in r for r in reasons)


# ------------------------------------------------------------------ what the checks would find


def _toy(fault: str) -> Op:
    """``tanh(w * x)`` with that fault."""

    def reference(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(w * x)

    class Toy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.options = ()
            ctx.set_materialize_grads(fault == "zeros for no gradient")
            if fault == "writes an input":
                x.detach().mul_(1.5)
            y = torch.tanh(w * x)
            ctx.save_for_backward(*((x, w, y) if fault == "keeps an output" else (x, w)))
            if fault == "wrong dtype of fakes" and type(x) is not Tensor:
                return y.to(F16)
            return y.to(F16).to(x.dtype) if fault == "rounds once more" else y

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> Any:
            x, w, *_ = ctx.saved_tensors
            if grad is None:
                return None, None
            x, w = (x.detach(), w.detach()) if fault == "no second derivative" else (x, w)
            y = torch.tanh(w * x)
            slope = grad * (1 - (y if fault == "missing square" else y * y))
            dx, dw = slope * w, (slope * x).flatten(0, -2).sum(0)
            if fault == "wrong sign":
                dw = -dw
            if fault == "writes a saved tensor":
                x.detach().add_(0.5)
            if fault == "computes what nobody wants":
                return dx, dw
            need_x, need_w = ctx.needs_input_grad
            return dx if need_x else None, dw if need_w else None

    if fault != "no second derivative":
        Toy.backward = differentiable(double_backward(reference, 2))(Toy.backward)

    def call(x: Tensor, w: Tensor) -> Tensor:
        y = Toy.apply(x, w)
        return y.detach() if fault == "no gradient" else y

    def example(m: Maker) -> tuple[Any, ...]:
        return m.x(m.sizes.hidden), m.weight(m.sizes.hidden)

    return Op("toy", reference, call, lambda x, w: [], example=example)


def check_all(op: Op) -> None:
    """Every check but those that compile."""
    for case in [Case(op, example) for example in op.examples().values()]:
        tiny = replace(case, sizes=TINY)
        for dtype, strided in itertools.product((F64, F32, BF16), (False, True)):
            check_parity(replace(case, dtype=dtype, train=not strided, strided=strided))
        check_gradients(tiny)
        check_no_rows(tiny)
        check_only_needed_gradients(tiny)
        check_no_gradient_is_none(tiny, False)
        check_double_backward(tiny)
        check_outputs_may_be_written_to(tiny)
        check_saved_outputs(tiny)
        check_fake_is_real(case)
        check_library_ops(case)


def test_an_op_without_a_fault_passes() -> None:
    check_all(_toy("none"))


@pytest.mark.parametrize(
    "fault",
    ["wrong sign", "missing square", "rounds once more", "writes an input", "keeps an output",
     "writes a saved tensor", "computes what nobody wants", "zeros for no gradient",
     "no second derivative", "no gradient", "wrong dtype of fakes"],
)  # fmt: skip
def test_an_op_with_a_fault_does_not(fault: str) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_all(_toy(fault))
