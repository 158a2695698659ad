from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fusewright.kernels.loss.linear_divergence import KINDS, OP, linear_divergence, reference
from fusewright.kernels.loss.linear_divergence_tiles import compute, differentiate

from .test_linear_cross_entropy import operands
from .test_linear_cross_entropy_tiles import Record, use_small_tiles
from .test_linear_logprob import some_targets
from .util import assert_parity_of_draws

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
pytestmark = pytest.mark.usefixtures("seeded")


def teacher_of(
    shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, weight and bias of another width, without gradients."""
    x, w, b = (t.detach() for t in operands((*shape[:-1], 24), vocabulary, dtype))
    return x, w, b if bias else None


def over(fn: Callable[..., Any], targets: Tensor | None, **options: Any) -> Any:
    """``fn`` of the student's three tensors and the teacher's three."""

    def call(*t: Tensor) -> Tensor:
        found: Tensor = fn(*t, targets, **options)
        return found

    return call


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(40, 90),
    hidden=st.sampled_from([16, 33, 64]),
    vocabulary=st.sampled_from([61, 256, 507]),
    dtype=st.sampled_from([F32, BF16]),
    kind=st.sampled_from(KINDS),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    ignored=st.sampled_from([0.0, 0.2, 0.8]),
    trained=st.sampled_from(["x", "w", "x w", "x w b", "x b"]),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parity(
    n, hidden, vocabulary, dtype, kind, beta, temperature, ignored, trained, strided, seed
):
    torch.manual_seed(seed)
    labels = some_targets((n,), vocabulary, ignored)
    labels[n // 2] = 0

    def draw() -> list[Tensor]:
        made = [t.detach() for t in operands((n, hidden), vocabulary, dtype)]
        if strided:
            made[0] = torch.stack((made[0], made[0]), -1)[..., 0]
        student = [t.requires_grad_(name in trained) for name, t in zip("xwb", made, strict=True)]
        return [*student, *teacher_of((n, hidden), vocabulary, dtype)]

    options = {"kind": kind, "beta": beta, "temperature": temperature}
    ours, theirs = (over(fn, labels, **options) for fn in (linear_divergence, reference))
    assert_parity_of_draws(ours, theirs, draw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_tiles")
def test_parity_over_many_tiles(kind, dtype, trained):
    labels = some_targets((203,), 300, 0.3)
    ours, theirs = (
        over(fn, labels, kind=kind, beta=0.3, temperature=1.4)
        for fn in (linear_divergence, reference)
    )

    def draw() -> list[Tensor]:
        x, w, b = operands((203, 40), 300, dtype, spread=2.0)
        student = [x, w.requires_grad_(trained), b.requires_grad_(trained)]
        return [*student, *teacher_of((203, 40), 300, dtype)]

    assert_parity_of_draws(ours, theirs, draw)


@pytest.mark.parametrize("trained", ["x", "x w b", "b"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck(kind, trained):
    student = operands((2, 3, 5), 90, F64)
    inputs = tuple(t.requires_grad_(n in trained) for n, t in zip("xwb", student, strict=True))
    teacher = teacher_of((2, 3, 5), 90, F64, bias=False)
    labels = torch.tensor([[3, -100, 89], [0, -100, 7]])
    assert torch.autograd.gradcheck(
        lambda *t: linear_divergence(*t, *teacher, labels, kind, 0.2, 0.7), inputs
    )


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(1,), (1, 1), (0, 3), (2, 3, 5), (4, 1)]),
    vocabulary=st.sampled_from([1, 2, 5]),
    kind=st.sampled_from(KINDS),
    ignored=st.sampled_from([None, 0.0, 0.5, 1.0]),
    frozen=st.booleans(),
)
def test_degenerate_sizes_are_exact_in_fp64(shape, vocabulary, kind, ignored, frozen):
    student, teacher = operands(shape, vocabulary, F64), teacher_of(shape, vocabulary, F64)
    for t in student[1:]:
        t.requires_grad_(not frozen)
    labels = None if ignored is None else some_targets(shape[:-1], vocabulary, ignored)
    results = []
    for fn in (linear_divergence, reference):
        out = fn(*student, *teacher, labels, kind)
        wanted = student[:1] if frozen else student
        results.append([out, *torch.autograd.grad(out.sum() * 0.7, wanted)])
    for a, b in zip(*results, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_has_no_divergence(kind):
    x, w, b = operands((20, 16), 50, F32)
    found = linear_divergence(x, w, b, x, w, b, None, kind)
    assert found.abs().max() < 1e-6
    grads = torch.autograd.grad(found.sum(), (x, w, b))
    assert all(g.abs().max() < 1e-5 for g in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("are_whole", [True, False])
@pytest.mark.usefixtures("small_tiles")
def test_log_probabilities_in_place_of_a_teacher(kind, dtype, trained, are_whole):
    labels = some_targets((90,), 507, 0.2)

    def draw() -> list[Tensor]:
        student = [t.detach() for t in operands((90, 33), 507, dtype)]
        for i, t in enumerate(student):
            t.requires_grad_(trained or i == 0)
        given = torch.randn(90, 507)
        return [*student, (given.log_softmax(-1) if are_whole else given - 7.0).to(dtype)]

    def over_given(fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *t: fn(*t, None, None, labels, kind=kind, beta=0.3, temperature=0.7)

    assert_parity_of_draws(over_given(linear_divergence), over_given(reference), draw)


def test_given_log_probabilities_are_not_written_to():
    x, w, b = operands((20, 16), 50, F32)
    given = torch.randn(20, 50).log_softmax(-1)
    before = given.clone()
    for kind in KINDS:
        linear_divergence(x, w, b, given, None, None, None, kind).sum().backward()
    assert torch.equal(given, before)


def test_the_kinds_are_what_they_are_called():
    x, w, b = (t.detach() for t in operands((20, 16), 50, F64))
    other_x, other_w, other_b = teacher_of((20, 16), 50, F64)
    s = torch.nn.functional.linear(x, w, b).softmax(-1)
    t = torch.nn.functional.linear(other_x, other_w, other_b).softmax(-1)
    m = 0.7 * s + 0.3 * t
    expected = {
        "forward_kl": (t * (t / s).log()).sum(-1),
        "reverse_kl": (s * (s / t).log()).sum(-1),
        "jsd": 0.3 * (t * (t / m).log()).sum(-1) + 0.7 * (s * (s / m).log()).sum(-1),
    }
    for kind, value in expected.items():
        found = linear_divergence(x, w, b, other_x, other_w, other_b, None, kind, 0.3)
        torch.testing.assert_close(found, value)


def test_the_teacher_gets_no_gradient_and_autocast_casts_both():
    student, teacher = operands((64, 32), 100, F32), operands((64, 24), 100, F32)
    with torch.autocast("cpu", BF16):
        mine, theirs = (fn(*student, *teacher) for fn in (linear_divergence, reference))
    assert mine.dtype is theirs.dtype is F32
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    mine.sum().backward()
    assert all(t.grad is not None for t in student)
    assert all(t.grad is None for t in teacher)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_exist_only_in_tiles(monkeypatch, dtype):
    use_small_tiles(monkeypatch)
    student = [t.detach() for t in operands((1000, 16), 2000, dtype)]
    rest = (*student, *teacher_of((1000, 16), 2000, dtype), None, "jsd", 0.5, 1.0, -100)
    with Record() as seen:
        compute(*rest, True)
        differentiate(torch.randn(1000), *rest, [True, True, True])
    assert len(seen.rows) > 100
    assert seen.largest <= 1 << 18


def test_only_rows_that_count_are_multiplied_and_only_needed_gradients():
    student, teacher = operands((100, 16), 50, F32), teacher_of((100, 16), 50, F32)
    labels = some_targets((100,), 50, 0.0)
    labels[20:] = -100
    rest = (*(t.detach() for t in student), *teacher, labels, "reverse_kl", 0.5, 1.0, -100)
    with Record() as seen:
        compute(*rest, True)
        differentiate(torch.randn(100), *rest, [False, True, False])
    assert seen.rows == [20, 20, 20, 20, 20, 50]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_teacher_is_projected_again_only_for_a_trained_head(trained):
    x, w, _ = operands((100, 16), 50, F32)
    w.requires_grad_(trained)
    with FlopCounterMode(display=False) as counter:
        linear_divergence(x, w, None, *teacher_of((100, 16), 50, F32)).sum().backward()
    student, teacher = 2 * 100 * 50 * 16, 2 * 100 * 50 * 24
    expected = 4 * student + 2 * teacher if trained else 2 * student + teacher
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_opaque_ops_are_well_formed_and_compile(trained):
    student, teacher = operands((10, 16), 50, BF16), teacher_of((10, 16), 50, BF16)
    labels = some_targets((10,), 50, 0.3)
    for t in student[1:]:
        t.requires_grad_(trained)
    rest = (*(t.detach() for t in student), *teacher, labels, "jsd", 0.5, 0.7, -100)
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.fusewright
    torch.library.opcheck(
        ops.linear_divergence_forward.default, (*rest, not trained), test_utils=tests
    )
    torch.library.opcheck(
        ops.linear_divergence_backward.default,
        (torch.randn(10), *rest, [True, trained, trained]),
        test_utils=tests,
    )
    compiled = torch.compile(linear_divergence, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (compiled, linear_divergence):
        out = fn(*student, *teacher, labels, "jsd")
        wanted = student if trained else student[:1]
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), wanted)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_reasons_and_settings_without_meaning():
    x, w, b = operands((10, 16), 50, BF16)
    teacher = teacher_of((10, 16), 50, BF16)
    assert OP.unsupported(x, w, b, *teacher) == []
    assert "the student's rows" in OP.unsupported(x, w.float(), b, *teacher)[0]
    assert (
        "floating-point" in OP.unsupported(x, w, b, teacher[0], teacher[1].to(torch.int8), None)[0]
    )
    assert "50 and 40 classes" in OP.unsupported(x, w, b, teacher[0], teacher[1][:40], None)[0]
    assert "rows of (10,) and (9,)" in OP.unsupported(x, w, b, teacher[0][1:], *teacher[1:])[0]
    assert "do not fit" in OP.unsupported(x, w, b, *teacher, torch.zeros(3, dtype=torch.int64))[0]
    given = torch.zeros(10, 50)
    assert OP.unsupported(x, w, b, given, None, None) == []
    assert "50 and 40 classes" in OP.unsupported(x, w, b, given[:, :40], None, None)[0]
    assert "have a bias" in OP.unsupported(x, w, b, given, None, b)[0]
    for bad in (
        {"kind": "kl"}, {"beta": 1.5}, {"beta": math.nan}, {"temperature": 0.0},
        {"temperature": math.nan},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            linear_divergence(x, w, b, *teacher, **bad)
    with pytest.raises(ValueError, match="do not fit x"):
        linear_divergence(x, w, b, *teacher, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows of"):
        linear_divergence(x, w, b, teacher[0][1:], *teacher[1:])
