from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusewright.kernels.loss.linear_cross_entropy import linear_cross_entropy
from fusewright.kernels.loss.linear_logprob import OP, linear_logprob, reference

from .test_linear_cross_entropy import operands
from .util import assert_parity, assert_parity_of_draws

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FLOATS = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "topk_values")
EVERY = (*FLOATS, "argmax", "topk_indices")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"logit_scale": 0.25, "temperature": 2.0},
    {"softcap": 5.0, "logit_scale": 2.0, "temperature": 1.3},
)
pytestmark = pytest.mark.usefixtures("seeded")


def some_targets(shape: tuple[int, ...], vocabulary: int, ignored: float) -> Tensor:
    drawn = torch.randint(0, vocabulary, shape)
    return drawn.where(torch.rand(shape) >= ignored, -100)


def over(fn: Callable[..., Any], targets: Tensor | None, names: Any, **options: Any) -> Any:
    """``fn`` of x, weight and whatever else of bias and learnt scale there is, by their sizes."""

    def call(x: Tensor, w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        bias = next((t for t in rest if t.dim()), None)
        scale = next((t for t in rest if not t.dim()), None)
        more = options if scale is None else options | {"logit_scale": scale}
        return fn(x, w, bias, targets, names, 3, **more)

    return call


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(40, 90),
    hidden=st.sampled_from([16, 33, 64]),
    vocabulary=st.sampled_from([61, 256, 507]),
    dtype=st.sampled_from([F32, BF16]),
    options=st.sampled_from(OPTIONS),
    ignored=st.sampled_from([0.0, 0.2, 0.8]),
    trained=st.sampled_from(["x", "x", "w", "x w", "x w b", "x b", "x s", "x w b s"]),
    names=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=4, unique=True),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parity(n, hidden, vocabulary, dtype, options, ignored, trained, names, strided, seed):
    torch.manual_seed(seed)
    labels = some_targets((n,), vocabulary, ignored)
    labels[n // 2] = 0

    def draw() -> list[Tensor]:
        x, w, b = (t.detach() for t in operands((n, hidden), vocabulary, dtype))
        if strided:
            x = torch.stack((x, x), -1)[..., 0]
        made = {"x": x, "w": w, "b": b, "s": torch.tensor(0.8, dtype=dtype)}
        used = [name for name in "xwbs" if name in "xw" or name in trained]
        return [made[name].requires_grad_(name in trained) for name in used]

    ours, theirs = (over(fn, labels, names, **options) for fn in (linear_logprob, reference))
    assert_parity_of_draws(ours, theirs, draw)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_tiles")
def test_parity_over_many_tiles(name, dtype, trained):
    labels = some_targets((303,), 300, 0.3)
    options = OPTIONS[-1]
    ours, theirs = (over(fn, labels, (name,), **options) for fn in (linear_logprob, reference))

    def draw() -> list[Tensor]:
        x, w, b = operands((303, 40), 300, dtype, spread=2.0)
        return [x, w.requires_grad_(trained), b.requires_grad_(trained)]

    assert_parity_of_draws(ours, theirs, draw)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("dtype", [F32, BF16])  # in fp16 so small gradients leave its range
def test_parity_where_all_logits_are_near_their_bound(name, dtype):
    labels = some_targets((33,), 300, 0.3)
    ours, theirs = (over(fn, labels, (name,), softcap=3.0) for fn in (linear_logprob, reference))

    def draw() -> list[Tensor]:
        x, w, _ = operands((33, 40), 300, dtype, spread=0.2)
        b = (torch.randint(0, 2, (300,)) * 2 - 1) * (6 + torch.rand(300))
        return [x, w, b.to(dtype).requires_grad_()]

    assert_parity_of_draws(ours, theirs, draw)


@pytest.mark.parametrize("trained", ["x", "x w b", "x s"])
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("names", [*((name,) for name in FLOATS), FLOATS[:2], FLOATS])
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck(names, options, trained):
    x, w, b = operands((2, 3, 5), 90, F64)
    scale = torch.tensor(0.8, dtype=F64, requires_grad=True)
    given = {"x": x, "w": w, "b": b, "s": scale}
    inputs = tuple(t.requires_grad_(name in trained) for name, t in given.items())
    labels = torch.tensor([[3, -100, 89], [0, -100, 7]])
    inputs = inputs if "s" in trained else inputs[:3]
    assert torch.autograd.gradcheck(over(linear_logprob, labels, names, **options), inputs)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1,), (1, 1), (0, 3), (2, 3, 5), (4, 1), (7, 2)]),
    vocabulary=st.sampled_from([3, 5]),
    options=st.sampled_from(OPTIONS),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    frozen=st.booleans(),
)
def test_degenerate_sizes_are_exact_in_fp64(shape, vocabulary, options, ignored, frozen):
    inputs = operands(shape, vocabulary, F64)
    wanted = inputs[:1] if frozen else inputs
    for t in inputs[1:]:
        t.requires_grad_(not frozen)
    labels = some_targets(shape[:-1], vocabulary, ignored)
    results = []
    for fn in (linear_logprob, reference):
        outputs = over(fn, labels, EVERY, **options)(*inputs)
        total = sum((i + 0.7) * t.sum() for i, t in enumerate(outputs[: len(FLOATS)]))
        results.append([*outputs, *torch.autograd.grad(total, wanted)])
    for a, b in zip(*results, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_one_class():
    x, w, b = operands((4, 3), 1, F32)
    labels = torch.tensor([0, -100, 0, 0])
    for name, t in zip(EVERY, linear_logprob(x, w, b, labels, EVERY, 1), strict=True):
        expected = reference(x, w, b, labels, (name,), 1)[0]
        torch.testing.assert_close(t, expected)


def test_no_targets_count_every_row_and_are_not_needed():
    x, w, b = operands((2, 30, 16), 50, F32)
    names = [name for name in EVERY if name != "logprob"]
    found = linear_logprob(x, w, b, None, names, 4)
    for name, ours, theirs in zip(names, found, reference(x, w, b, None, names, 4), strict=True):
        assert ours.shape == theirs.shape == (2, 30, *([4] if "topk" in name else []))
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="'logprob' needs targets"):
        linear_logprob(x, w, b, None)


@pytest.mark.usefixtures("small_tiles")
def test_classes_are_those_of_the_highest_logits():
    x, w, b = (t.detach() for t in operands((200, 40), 300, BF16))
    labels = some_targets((200,), 300, 0.3)
    values, classes, top = linear_logprob(
        x, w, b, labels, ("topk_values", "topk_indices", "argmax"), 5
    )
    logits = torch.nn.functional.linear(x, w, b).float()
    counted = labels != -100
    assert not classes[~counted].any()
    assert not top[~counted].any()
    torch.testing.assert_close(logits.gather(1, classes)[counted], values[counted])
    assert torch.equal(logits.gather(1, top[:, None])[counted, 0], logits.amax(1)[counted])
    assert classes.dtype is top.dtype is torch.int64


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_outputs_that_nobody_differentiates_change_nothing(trained):
    x, w, _ = operands((40, 24), 60, F64)
    w.requires_grad_(trained)
    wanted = (x, w) if trained else (x,)
    labels = some_targets((40,), 60, 0.2)
    alone = linear_logprob(x, w, None, labels)[0].square().sum()
    expected = torch.autograd.grad(alone, wanted)
    for names in (("entropy", "logprob"), EVERY):
        found = dict(zip(names, linear_logprob(x, w, None, labels, names, 3), strict=True))
        grads = torch.autograd.grad(found["logprob"].square().sum(), wanted)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_deferred_gradient_is_right_where_it_is_wanted():
    x, w, _ = operands((40, 24), 60, F64)
    w.requires_grad_(False)
    labels = some_targets((40,), 60, 0.2)
    grads = []
    for options in ({}, {"deferred": ("entropy",)}):
        logprob, entropy = linear_logprob(x, w, None, labels, ("logprob", "entropy"), **options)
        grads.append(torch.autograd.grad((logprob * 3 - entropy * logprob).sum(), x)[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_it_agrees_with_the_cross_entropy():
    x, w, b = operands((64, 32), 100, F32)
    labels = some_targets((64,), 100, 0.3)
    logprob = linear_logprob(x, w, b, labels, softcap=4.0, logit_scale=0.5)[0]
    loss = linear_cross_entropy(x, w, b, labels, -100, "sum", 0.0, 4.0, 0.5)
    torch.testing.assert_close(-logprob.sum(), loss)
    for ours, theirs in zip(
        torch.autograd.grad(-logprob.sum(), (x, w, b)),
        torch.autograd.grad(loss, (x, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_confident_rows_keep_relative_precision():
    """Where p(target) is almost 1, 1 - p must not drown in p's rounding."""
    x, w, _ = operands((64, 32), 200, BF16)
    w.requires_grad_(False)
    with torch.no_grad():
        x.mul_(0.1)
        labels = torch.randint(0, 200, (64,))
        x += 4 * w[labels] / w[labels].float().square().sum(1, keepdim=True).to(BF16)
    options = {"logit_scale": 4.0}
    assert reference(x, w, None, labels, **options)[0].mean() > -0.01
    for names in (("logprob",), ("logprob", "entropy")):
        ours, theirs = (over(fn, labels, names, **options) for fn in (linear_logprob, reference))
        assert_parity(ours, theirs, x, w)


def test_targets_whose_probability_underflows():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    w = torch.tensor([[400.0, 1.0], [-400.0, 2.0]], requires_grad=True)
    labels = torch.tensor([1, 1, 0])
    names = ("logprob", "entropy", "sum_p2")
    ours, theirs = (over(fn, labels, names) for fn in (linear_logprob, reference))
    assert_parity(ours, theirs, x, w)
    assert linear_logprob(x, w, None, labels)[0].min() < -200


@pytest.mark.parametrize("factor", [False, True], ids=["constant", "learnt"])
def test_autocast_is_that_of_the_reference(factor):
    inputs = operands((64, 32), 100, F32)
    scale = torch.tensor(0.7, requires_grad=True)
    inputs = (*inputs, scale) if factor else inputs
    labels = some_targets((64,), 100, 0.2)
    with torch.autocast("cpu", BF16):
        mine, theirs = (
            over(fn, labels, ("logprob",))(*inputs)[0] for fn in (linear_logprob, reference)
        )
    assert mine.dtype is theirs.dtype is F32
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(64)
    for a, b in zip(
        *(torch.autograd.grad(y, inputs, upstream) for y in (mine, theirs)), strict=True
    ):
        assert a.dtype is b.dtype is F32
        assert (a - b).norm() / b.norm() < 2**-6


def test_a_target_that_is_no_class_is_refused():
    x, w, _ = operands((2, 4), 5, F32)
    for bad in (5, -1):
        with pytest.raises(IndexError, match=f"^Target {bad} is out of bounds"):
            linear_logprob(x, w, None, torch.tensor([0, bad]))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_opaque_ops_are_well_formed_and_compile(trained):
    x, w, b = operands((10, 16), 50, BF16)
    for t in (w, b):
        t.requires_grad_(trained)
    labels = some_targets((10,), 50, 0.3)
    plain = [t.detach() for t in (x, w, b)]
    scale = torch.tensor(0.5)
    forward = torch.ops.fusewright.linear_logprob_forward.default
    backward = torch.ops.fusewright.linear_logprob_backward.default
    tests = ("test_schema", "test_faketensor")
    names, made = list(EVERY), [] if trained else ["logprob", "entropy"]
    args = (*plain, labels, scale, names, made, 3, -100, 0.7, 2.0, 1.0)
    torch.library.opcheck(forward, args, test_utils=tests)
    classes = forward(*args)[names.index("topk_indices")]
    grads = [None if name in ("argmax", "topk_indices") else torch.randn(10) for name in names]
    grads[names.index("topk_values")] = torch.randn(10, 3)
    args = (grads, classes, *plain, labels, scale, names, -100, 0.7, 2.0, 1.0, [True] * 4)
    torch.library.opcheck(backward, args, test_utils=tests)
    wanted = (x, w, b) if trained else (x,)
    compiled = torch.compile(linear_logprob, fullgraph=True, backend="aot_eager")
    for names in (("logprob",), EVERY):
        results = []
        for fn in (compiled, linear_logprob):
            found = fn(x, w, b, labels, names, 3)
            total = found[0].square().sum()
            results.append([*(t.detach() for t in found), *torch.autograd.grad(total, wanted)])
        for a, c in zip(*results, strict=True):
            assert torch.equal(a, c)


def test_reasons():
    x, w, b = operands((10, 16), 50, BF16)
    labels = torch.zeros(10, dtype=torch.int64)
    assert OP.unsupported(x, w, b, labels) == []
    assert OP.unsupported(x, w, b, None, ("entropy",)) == []
    assert "torch.int32" in OP.unsupported(x, w, b, labels.int())[0]
    assert "the head" in OP.unsupported(x, w.float(), None, labels)[0]
    assert "do not fit" in OP.unsupported(x, w, b, labels[1:])[0]
    assert "quantized head" in OP.unsupported(x, w.to(torch.int8), b, labels)[0]
    assert "the shape (1,)" in OP.unsupported(x, w, b, labels, logit_scale=torch.ones(1))[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ("probability",)}, "must be some of logprob, entropy"),
        ({"outputs": ("logprob", "logprob")}, "once each"),
        ({"outputs": ()}, "must be some of"),
        ({"outputs": ("topk_values",)}, "top_k must be between 1 and 50, not 0"),
        ({"outputs": ("topk_indices",), "top_k": 51}, "between 1 and 50, not 51"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"softcap": math.nan}, "softcap must be above 0"),
        ({"softcap": math.inf}, "softcap must be above 0 and finite"),
        ({"outputs": ("entropy",), "temperature": math.nan}, "temperature must be above 0"),
    ],
)
def test_settings_without_meaning_are_refused(options, message):
    x, w, b = operands((10, 16), 50, F32)
    with pytest.raises(ValueError, match=message):
        linear_logprob(x, w, b, torch.zeros(10, dtype=torch.int64), **options)


@pytest.mark.parametrize("names", [("logprob",), ("entropy",)])
@pytest.mark.parametrize("shape", [(2, 3), (2, 6), (10,), (2, 5, 1), (5, 2)])
def test_targets_of_another_shape_are_refused(names, shape):
    x, w, b = operands((2, 5, 16), 50, F32)
    with pytest.raises(ValueError, match="do not fit x"):
        linear_logprob(x, w, b, torch.zeros(shape, dtype=torch.int64), names)
