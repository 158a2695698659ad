from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fusewright.kernels.loss.linear_cross_entropy import OP, linear_cross_entropy, reference

from .util import assert_parity

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
pytestmark = pytest.mark.usefixtures("seeded")


def operands(
    shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, all of which require a gradient."""
    x = torch.randn(*shape, dtype=F64)
    w = torch.randn(vocabulary, shape[-1], dtype=F64) * spread * shape[-1] ** -0.5
    b = torch.randn(vocabulary, dtype=F64) * 0.5
    return tuple(t.to(dtype).requires_grad_() for t in (x, w, b))


def targets(n: int, vocabulary: int, ignored: float = 0.0, sets: int = 1) -> Tensor:
    """Labels (sets, n); in every set at least one row counts."""
    labels = torch.randint(0, vocabulary, (sets, n))
    labels[torch.rand(sets, n) < ignored] = -100
    labels[:, n // 2] = 0
    return labels


def parity(inputs: tuple[Tensor, ...], labels: Tensor, **options: Any) -> None:
    """Hold several losses at once to the budget: the error of one number is a matter of luck."""

    def over(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b=None: torch.stack([fn(x, w, b, y, **options) for y in labels])

    assert_parity(over(linear_cross_entropy), over(reference), *inputs)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.3, "reduction": "sum"},
)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("trained", ["x", "x w", "x w b"])
@pytest.mark.usefixtures("small_tiles")
def test_parity_over_many_tiles(dtype, options, trained):
    x, w, b = operands((101, 40), 300, dtype, spread=2.0)
    w.requires_grad_("w" in trained)
    inputs = (x, w, b) if "b" in trained else (x, w)
    parity(inputs, targets(101, 300, ignored=0.3, sets=6), **options)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(9, 70),
    hidden=st.sampled_from([16, 33, 64]),
    vocabulary=st.sampled_from([61, 256, 507]),
    dtype=st.sampled_from([F32, BF16]),
    options=st.sampled_from(OPTIONS),
    ignored=st.sampled_from([0.0, 0.2, 0.8]),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_parity(n, hidden, vocabulary, dtype, options, ignored, trained, seed):
    torch.manual_seed(seed)
    inputs = operands((n, hidden), vocabulary, dtype)
    for t, wanted in zip(inputs, trained, strict=True):
        t.requires_grad_(wanted)
    parity(inputs, targets(n, vocabulary, ignored, sets=8), **options)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(1,), (1, 1), (0, 3), (2, 3, 5), (4, 1), (7, 2)]),
    vocabulary=st.sampled_from([1, 2, 5]),
    options=st.sampled_from(OPTIONS),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_degenerate_sizes_are_exact_in_fp64(shape, vocabulary, options, ignored):
    """Sizes too small for the error budget's statistics; nan where the reference is nan."""
    inputs = operands(shape, vocabulary, F64)
    labels = torch.randint(0, vocabulary, shape[:-1])
    labels = labels.where(torch.rand(labels.shape) >= ignored, -100)
    mine, theirs = (
        [y := fn(*inputs, labels, **options), *torch.autograd.grad(y * 0.7, inputs)]
        for fn in (linear_cross_entropy, reference)
    )
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck(options):
    inputs = operands((7, 5), 90, F64)
    labels = torch.tensor([3, -100, 89, 0, -100, 7, 7])
    assert torch.autograd.gradcheck(
        lambda *t: 1.7 * linear_cross_entropy(*t, labels, **options), inputs
    )


@pytest.mark.parametrize("dtype", [F32, BF16])  # in fp16 so small gradients leave its range
def test_parity_where_all_logits_are_near_their_bound(dtype):
    """There the derivative of the cap is a difference of nearly equal numbers."""
    x, w, _ = operands((33, 40), 300, dtype, spread=0.2)
    signs = torch.randint(0, 2, (300,)) * 2 - 1
    b = (signs * (6 + torch.rand(300))).to(dtype).requires_grad_()
    parity((x, w, b), targets(33, 300, sets=6), softcap=3.0)


def test_all_labels_ignored():
    inputs = operands((6, 8), 20, F32)
    labels = torch.full((6,), -100)
    mean = linear_cross_entropy(*inputs, labels)
    assert mean.isnan()
    assert reference(*inputs, labels).isnan()
    assert all(not g.any() for g in torch.autograd.grad(mean, inputs))
    assert linear_cross_entropy(*inputs, labels, reduction="sum") == 0


def test_another_ignore_index_and_more_dimensions():
    x, w, b = operands((3, 11, 24), 50, F32)
    labels = torch.randint(0, 50, (4, 3, 11))
    labels[labels % 3 == 0] = 7
    parity((x, w, b), labels, ignore_index=7)


def test_non_contiguous_operands():
    x = torch.randn(24, 3, 11).permute(1, 2, 0).requires_grad_()
    w = torch.randn(24, 50).t().requires_grad_()
    b = torch.randn(100)[::2].requires_grad_()
    labels = torch.randint(0, 50, (4, 11, 3)).transpose(1, 2)
    parity((x, w, b), labels)


def test_confident_rows_keep_relative_precision():
    """Where p(label) is almost 1, its gradient p - 1 must not drown in p's rounding."""
    x, w, _ = operands((64, 32), 200, BF16)
    with torch.no_grad():
        x.mul_(0.1)
        labels = torch.randint(0, 200, (64,))
        x += 4 * w[labels] / w[labels].float().square().sum(1, keepdim=True).to(BF16)
    assert reference(x, w, None, labels, logit_scale=4.0) < 0.01
    parity((x, w), labels[None], logit_scale=4.0, reduction="sum")


def test_labels_whose_probability_underflows():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    w = torch.tensor([[400.0, 1.0], [-400.0, 2.0]], requires_grad=True)
    labels = torch.tensor([1, 1, 0])
    parity((x, w), labels[None])
    assert linear_cross_entropy(x, w, None, labels[:1].repeat(3)) > 200


def test_a_label_that_is_no_class_is_refused():
    x, w, _ = operands((2, 4), 5, F32)
    for bad in (5, -1):
        with pytest.raises(IndexError, match=f"^Target {bad} is out of bounds"):
            linear_cross_entropy(x, w, None, torch.tensor([0, bad]))


def test_tied_head_adds_to_the_embedding_gradient():
    tokens, labels = torch.randint(0, 60, (2, 40)), torch.randint(0, 60, (2, 40))

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(60, 24, dtype=F64)

        def forward(self, loss: Callable[..., Tensor]) -> Tensor:
            return loss(self.embed(tokens).tanh(), self.embed.weight, None, labels)

    model = Tied()
    grads = []
    for loss in (linear_cross_entropy, reference):
        grads += torch.autograd.grad(model(loss) / 3, model.embed.weight)
    torch.testing.assert_close(*grads)


def test_sum_over_the_number_of_items():
    """The Trainer's loss under gradient accumulation."""
    x, w, _ = operands((40, 24), 60, F64)
    labels = targets(40, 60, 0.3)[0]
    items = torch.tensor(77.0, dtype=F64)
    mine = torch.autograd.grad(linear_cross_entropy(x, w, None, labels, -100, "sum") / items, x)
    theirs = torch.autograd.grad(cross_entropy(linear(x, w), labels, reduction="sum") / items, x)
    torch.testing.assert_close(mine, theirs)


def test_upstream_gradient_keeps_its_precision_over_a_bf16_gradient():
    """A factor rounded to bf16 would bias the whole gradient."""
    x, w, _ = operands((64, 32), 100, BF16)
    labels = targets(64, 100)[0]
    factor = 1.0 + 2**-9  # halfway between two numbers of bf16
    (unit,) = torch.autograd.grad(linear_cross_entropy(x, w, None, labels, -100, "sum"), x)
    loss = linear_cross_entropy(x, w, None, labels, -100, "sum")
    (scaled,) = torch.autograd.grad(loss * factor, x)
    assert torch.equal(scaled, (unit.float() * factor).to(BF16))


def test_autocast_is_that_of_the_reference():
    inputs = operands((64, 32), 100, F32)
    labels = targets(64, 100)[0]
    with torch.autocast("cpu", BF16):
        mine, theirs = (fn(*inputs, labels) for fn in (linear_cross_entropy, reference))
    assert mine.dtype is theirs.dtype is F32
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y, inputs) for y in (mine, theirs)), strict=True):
        assert a.dtype is b.dtype is F32
        assert (a - b).norm() / b.norm() < 2**-7


def test_opaque_op_is_well_formed_and_compiles():
    inputs = operands((10, 16), 50, BF16)
    labels = targets(10, 50, 0.3)[0]
    op = torch.ops.fusewright.linear_cross_entropy_forward.default
    for wanted in ([True, False, False], [True, True, True]):
        args = (*(t.detach() for t in inputs), labels, -100, 0.1, 0.0, 1.0, wanted)
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    results = [
        (loss := fn(*inputs, labels), *torch.autograd.grad(loss, inputs))
        for fn in (compiled, linear_cross_entropy)
    ]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_reasons():
    x, w, b = operands((10, 16), 50, BF16)
    labels = targets(10, 50)[0]
    assert OP.unsupported(x, w, b, labels) == []
    assert "torch.int32" in OP.unsupported(x, w, b, labels.int())[0]
    assert "the head" in OP.unsupported(x, w.float(), None, labels)[0]
    assert "do not fit" in OP.unsupported(x, w, b, labels[1:])[0]
    assert "one loss per row" in OP.unsupported(x, w, b, labels, reduction="none")[0]
    w.requires_grad_(False)
    for bad in ({"reduction": "none"}, {"label_smoothing": 2.0}, {"softcap": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            linear_cross_entropy(x, w, b, labels, **bad)


@pytest.mark.parametrize("counted", [1, 3, 10, 11])
def test_few_counted_rows_of_a_large_vocabulary_keep_the_budget(counted):
    # the CPU library sums a matmul of few rows in one chain over all 50,000 classes
    torch.manual_seed(counted)
    inputs = operands((40, 32), 50_000, F32)[:2]
    labels = targets(40, 50_000)
    labels[:, counted:] = -100
    labels[:, :counted] = torch.arange(counted)
    parity(inputs, labels)
