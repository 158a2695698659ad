"""Losses and outputs of a head: values, gradients, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from fusewright.kernels.loss import linear_cross_entropy as loss
from fusewright.kernels.loss import linear_logprob as logprob
from fusewright.kernels.loss.linear_cross_entropy import linear_cross_entropy
from fusewright.kernels.loss.linear_logprob import linear_logprob

from .util import assert_parity, assert_parity_of_draws

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FLOATS = ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "picked", "topk_values")
EVERY = (*FLOATS, "argmax", "topk_indices")
LOSSES: tuple[dict[str, Any], ...] = (
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"softcap": 5.0, "logit_scale": 2.0, "label_smoothing": 0.3, "reduction": "sum"},
)
OUTPUTS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.7},
    {"softcap": 3.0},
    {"logit_scale": 0.25, "temperature": 2.0},
    {"softcap": 5.0, "logit_scale": 2.0, "temperature": 1.3},
)
pytestmark = pytest.mark.usefixtures("seeded")


def operands(
    shape: tuple[int, ...], vocabulary: int, dtype: torch.dtype, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, all of which require a gradient."""
    x = torch.randn(*shape, dtype=F64)
    w = torch.randn(vocabulary, shape[-1], dtype=F64) * spread * shape[-1] ** -0.5
    b = torch.randn(vocabulary, dtype=F64) * 0.5
    return tuple(t.to(dtype).requires_grad_() for t in (x, w, b))


def labels_of(shape: int | tuple[int, ...], vocabulary: int, ignored: float = 0.0) -> Tensor:
    """Labels, of which the middle one of each set counts."""
    labels = torch.randint(0, vocabulary, shape if isinstance(shape, tuple) else (shape,))
    labels = labels.where(torch.rand(labels.shape) >= ignored, -100)
    if labels.shape[-1]:
        labels[..., labels.shape[-1] // 2] = 0
    return labels


def over(fn: Callable[..., Any], labels: Tensor | None, names: Any = (), **options: Any) -> Any:
    """Outputs ``names``, or one loss for each set of labels, as a function of the operands.

    Further operands are known by their sizes: a bias, a learnt scale, an adapter.
    """

    def call(x: Tensor, w: Tensor, *rest: Tensor) -> Any:
        bias = next((t for t in rest if t.dim() == 1), None)
        adapter = [t for t in rest if t.dim() > 1]
        more = dict(zip(("narrow", "lora_b"), adapter, strict=False)) | options
        for scale in (t for t in rest if not t.dim()):
            more["logit_scale"] = scale
        if names:
            return fn(x, w, bias, labels, names, 3, **more)
        assert labels is not None
        sets = labels if labels.dim() == x.dim() else labels[None]
        return torch.stack([fn(x, w, bias, y, **more) for y in sets])

    return call


def pair(labels: Tensor | None, names: Any = (), **options: Any) -> tuple[Any, Any]:
    """Our function and the reference."""
    module = logprob if names else loss
    ours = linear_logprob if names else linear_cross_entropy
    return over(ours, labels, names, **options), over(module.reference, labels, names, **options)


def assert_same_gradients(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], **tolerances: float
) -> None:
    for a, b in zip(*(torch.autograd.grad(y, inputs) for y in outs), strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, equal_nan=True, **tolerances)


# -- parity ----------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(9, 70),
    hidden=st.sampled_from([16, 33, 64]),
    vocabulary=st.sampled_from([61, 256, 507]),
    dtype=st.sampled_from([F32, BF16]),
    options=st.sampled_from(LOSSES),
    ignored=st.sampled_from([0.0, 0.2, 0.8]),
    trained=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_parity_of_losses(n, hidden, vocabulary, dtype, options, ignored, trained, seed):
    torch.manual_seed(seed)
    inputs = operands((n, hidden), vocabulary, dtype)
    for t, wanted in zip(inputs, trained, strict=True):
        t.requires_grad_(wanted)
    # several at once: the error of one number is a matter of luck
    assert_parity(*pair(labels_of((8, n), vocabulary, ignored), **options), *inputs)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(40, 90),
    hidden=st.sampled_from([16, 33, 64]),
    vocabulary=st.sampled_from([61, 256, 507]),
    dtype=st.sampled_from([F32, BF16]),
    options=st.sampled_from(OUTPUTS),
    ignored=st.sampled_from([0.0, 0.2, 0.8]),
    trained=st.sampled_from(["x", "x", "w", "x w", "x w b", "x b", "x s", "x w b s", "x h l"]),
    names=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=4, unique=True),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_parity_of_outputs(
    n, hidden, vocabulary, dtype, options, ignored, trained, names, strided, seed
):
    torch.manual_seed(seed)
    labels = labels_of(n, vocabulary, ignored)

    def draw() -> list[Tensor]:
        x, w, b = (t.detach() for t in operands((n, hidden), vocabulary, dtype))
        h, lora_b, _ = (t.detach() for t in operands((n, 5), vocabulary, dtype))
        if strided:
            x = torch.stack((x, x), -1)[..., 0]
        made = {"x": x, "w": w, "b": b, "s": torch.tensor(0.8, dtype=dtype), "h": h, "l": lora_b}
        used = [name for name in made if name in "xw" or name in trained]
        return [made[name].requires_grad_(name in trained) for name in used]

    assert_parity_of_draws(*pair(labels, names, **options), draw)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("names", [(), *((name,) for name in FLOATS)])
@pytest.mark.parametrize("trained", ["x", "x w b"])
@pytest.mark.usefixtures("small_tiles")
def test_parity_over_many_tiles(names, dtype, trained):
    options = (OUTPUTS if names else LOSSES)[-1]
    labels = labels_of(303 if names else (6, 303), 300, 0.3)

    def draw() -> list[Tensor]:
        given = zip("xwb", operands((303, 40), 300, dtype, spread=2.0), strict=True)
        return [t.requires_grad_(name in trained) for name, t in given]

    assert_parity_of_draws(*pair(labels, names, **options), draw)


@pytest.mark.parametrize("names", [(), *((name,) for name in FLOATS)])
@pytest.mark.parametrize("dtype", [F32, BF16])  # in fp16 so small gradients leave its range
def test_parity_where_all_logits_are_near_their_bound(names, dtype):
    """There the derivative of the cap is a difference of nearly equal numbers."""
    labels = labels_of(33 if names else (6, 33), 300, 0.3)

    def draw() -> list[Tensor]:
        x, w, _ = operands((33, 40), 300, dtype, spread=0.2)
        b = (torch.randint(0, 2, (300,)) * 2 - 1) * (6 + torch.rand(300))
        return [x, w, b.to(dtype).requires_grad_()]

    assert_parity_of_draws(*pair(labels, names, softcap=3.0), draw)


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(1,), (1, 1), (0, 3), (2, 3, 5), (4, 1), (7, 2)]),
    vocabulary=st.sampled_from([3, 5]),
    options=st.sampled_from([*LOSSES, *OUTPUTS]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    frozen=st.booleans(),
)
def test_degenerate_sizes_are_exact_in_fp64(shape, vocabulary, options, ignored, frozen):
    """Sizes too small for the error budget's statistics; nan where the reference is nan."""
    inputs = operands(shape, vocabulary, F64)
    for t in inputs[1:]:
        t.requires_grad_(not frozen)
    labels = torch.randint(0, vocabulary, shape[:-1])
    labels = labels.where(torch.rand(labels.shape) >= ignored, -100)
    results = []
    for fn in pair(labels, EVERY if options in OUTPUTS else (), **options):
        outputs = fn(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        total = sum((i + 0.7) * t.sum() for i, t in enumerate(outputs[: len(FLOATS)]))
        results.append([*outputs, *torch.autograd.grad(total, inputs[: 1 if frozen else 3])])
    for a, b in zip(*results, strict=True):
        assert a.dtype is b.dtype
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


def test_one_class():
    x, w, b = operands((4, 3), 1, F32)
    labels = torch.tensor([0, -100, 0, 0])
    for name, t in zip(EVERY, linear_logprob(x, w, b, labels, EVERY, 1), strict=True):
        torch.testing.assert_close(t, logprob.reference(x, w, b, labels, (name,), 1)[0])
    torch.testing.assert_close(*(fn(x, w, b) for fn in pair(labels)))


def test_non_contiguous_operands_and_another_ignore_index():
    x = torch.randn(24, 3, 11).permute(1, 2, 0).requires_grad_()
    w = torch.randn(24, 50).t().requires_grad_()
    b = torch.randn(100)[::2].requires_grad_()
    labels = torch.randint(0, 50, (4, 11, 3)).transpose(1, 2)
    labels[labels % 3 == 0] = 7
    assert_parity(*pair(labels, ignore_index=7), x, w, b)


def test_confident_rows_keep_relative_precision():
    """Where p(label) is almost 1, its gradient p - 1 must not drown in p's rounding."""
    x, w, _ = operands((64, 32), 200, BF16)
    with torch.no_grad():
        x.mul_(0.1)
        labels = torch.randint(0, 200, (64,))
        x += 4 * w[labels] / w[labels].float().square().sum(1, keepdim=True).to(BF16)
    assert loss.reference(x, w, None, labels, logit_scale=4.0) < 0.01
    assert_parity(*pair(labels[None], logit_scale=4.0, reduction="sum"), x, w)
    w.requires_grad_(False)
    for names in (("logprob",), ("logprob", "entropy")):
        assert_parity(*pair(labels, names, logit_scale=4.0), x, w)


def test_labels_whose_probability_underflows():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], requires_grad=True)
    w = torch.tensor([[400.0, 1.0], [-400.0, 2.0]], requires_grad=True)
    labels = torch.tensor([1, 1, 0])
    assert_parity(*pair(labels[None]), x, w)
    assert_parity(*pair(labels, ("logprob", "entropy", "sum_p2")), x, w)
    assert linear_cross_entropy(x, w, None, labels[:1].repeat(3)) > 200
    assert linear_logprob(x, w, None, labels)[0].min() < -200


@pytest.mark.parametrize("counted", [1, 3, 10, 11])
def test_few_counted_rows_of_a_large_vocabulary_keep_the_budget(counted):
    # the CPU library sums a matmul of few rows in one chain over all 50,000 classes
    inputs = operands((40, 32), 50_000, F32)[:2]
    labels = torch.full((1, 40), -100)
    labels[:, :counted] = torch.arange(counted)
    assert_parity(*pair(labels), *inputs)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_of_losses(options):
    inputs = operands((7, 5), 90, F64)
    labels = torch.tensor([3, -100, 89, 0, -100, 7, 7])
    ours = over(linear_cross_entropy, labels, **options)
    assert torch.autograd.gradcheck(lambda *t: 1.7 * ours(*t), inputs)


@pytest.mark.parametrize("trained", ["x", "x w b", "x s", "x h l"])
@pytest.mark.parametrize("options", [{}, OUTPUTS[-1]], ids=["plain", "all"])
@pytest.mark.parametrize("names", [*((name,) for name in FLOATS), FLOATS[:2], FLOATS])
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_of_outputs(names, options, trained):
    x, w, b = operands((2, 3, 5), 90, F64)
    h, lora_b, _ = operands((2, 3, 4), 90, F64)
    scale = torch.tensor(0.8, dtype=F64, requires_grad=True)
    given = {"x": x, "w": w, "b": b, "s": scale, "h": h, "l": lora_b}
    used = [name for name in given if name in "xwb" or name in trained]
    inputs = tuple(given[name].requires_grad_(name in trained) for name in used)
    labels = torch.tensor([[3, -100, 89], [0, -100, 7]])
    assert torch.autograd.gradcheck(over(linear_logprob, labels, names, **options), inputs)


def test_all_labels_ignored():
    inputs = operands((6, 8), 20, F32)
    labels = torch.full((6,), -100)
    mean = linear_cross_entropy(*inputs, labels)
    assert mean.isnan()
    assert loss.reference(*inputs, labels).isnan()
    assert all(not g.any() for g in torch.autograd.grad(mean, inputs))
    assert linear_cross_entropy(*inputs, labels, reduction="sum") == 0


def test_tied_head_adds_to_the_embedding_gradient():
    tokens, labels = torch.randint(0, 60, (2, 40)), torch.randint(0, 60, (2, 40))
    embed = nn.Embedding(60, 24, dtype=F64)
    outs = [
        fn(embed(tokens).tanh(), embed.weight, None, labels) / 3
        for fn in (linear_cross_entropy, loss.reference)
    ]
    assert_same_gradients(outs, [embed.weight])


def test_sum_over_the_number_of_items():
    """The Trainer's loss under gradient accumulation."""
    x, w, _ = operands((40, 24), 60, F64)
    labels = labels_of(40, 60, 0.3)
    items = torch.tensor(77.0, dtype=F64)
    mine = linear_cross_entropy(x, w, None, labels, -100, "sum") / items
    assert_same_gradients([mine, cross_entropy(linear(x, w), labels, reduction="sum") / items], [x])


def test_upstream_gradient_keeps_its_precision_over_a_bf16_gradient():
    """A factor rounded to bf16 would bias the whole gradient."""
    x, w, _ = operands((64, 32), 100, BF16)
    labels = labels_of(64, 100)
    factor = 1.0 + 2**-9  # halfway between two numbers of bf16
    (unit,) = torch.autograd.grad(linear_cross_entropy(x, w, None, labels, -100, "sum"), x)
    total = linear_cross_entropy(x, w, None, labels, -100, "sum")
    (scaled,) = torch.autograd.grad(total * factor, x)
    assert torch.equal(scaled, (unit.float() * factor).to(BF16))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_outputs_without_an_upstream_gradient_change_nothing(trained):
    x, w, _ = operands((40, 24), 60, F64)
    w.requires_grad_(trained)
    wanted = (x, w) if trained else (x,)
    labels = labels_of(40, 60, 0.2)
    alone = linear_logprob(x, w, None, labels)[0].square().sum()
    for names in (("entropy", "logprob"), EVERY):
        found = dict(zip(names, linear_logprob(x, w, None, labels, names, 3), strict=True))
        outs = [found["logprob"].square().sum(), alone]
        for a, b in zip(
            *(torch.autograd.grad(y, wanted, retain_graph=True) for y in outs), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_deferred_gradient_is_right_where_it_is_wanted():
    x, w, _ = operands((40, 24), 60, F64)
    w.requires_grad_(False)
    labels = labels_of(40, 60, 0.2)
    outs = []
    for options in ({}, {"deferred": ("entropy",)}):
        found, entropy = linear_logprob(x, w, None, labels, ("logprob", "entropy"), **options)
        outs.append((found * 3 - entropy * found).sum())
    assert_same_gradients(outs, [x], rtol=1e-9, atol=1e-12)


def test_a_loss_is_the_sum_of_its_outputs():
    inputs = operands((64, 32), 100, F32)
    labels, smoothing = labels_of(64, 100, 0.3), 0.2
    names = ("logsumexp", "picked", "mean_logit")
    options = {"softcap": 4.0, "logit_scale": 0.5}
    lse, picked, mean = linear_logprob(*inputs, labels, names, **options)
    total = (lse - (1 - smoothing) * picked - smoothing * mean).sum()
    fused = linear_cross_entropy(*inputs, labels, -100, "sum", smoothing, 4.0, 0.5)
    torch.testing.assert_close(total, fused)
    assert_same_gradients([total, fused], inputs, rtol=1e-4, atol=1e-6)


def test_a_divergence_from_chosen_classes_is_a_formula_over_outputs():
    """KL(teacher, student) over the teacher's top classes, as distillation computes it."""
    x, w, _ = operands((40, 24), 60, F64)
    teacher = torch.randn(40, 60, dtype=F64).log_softmax(-1)
    top, classes = teacher.topk(3, -1)

    def divergence(student: Tensor) -> Tensor:
        return (top.exp() * (top - student)).sum()

    chosen = [linear_logprob(x, w, None, column)[0] for column in classes.unbind(-1)]
    outs = [
        divergence(torch.stack(chosen, -1)),
        divergence(linear(x, w).log_softmax(-1).gather(-1, classes)),
    ]
    torch.testing.assert_close(*outs)
    assert_same_gradients(outs, [x, w])


# -- values and forms ------------------------------------------------------------------------------


def test_no_targets_count_every_row_and_are_not_needed():
    x, w, b = operands((2, 30, 16), 50, F32)
    names = [name for name in EVERY if name not in ("logprob", "picked")]
    found = linear_logprob(x, w, b, None, names, 4)
    expected = logprob.reference(x, w, b, None, names, 4)
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.shape == theirs.shape == (2, 30, *([4] if "topk" in name else []))
        torch.testing.assert_close(ours, theirs)
    for name in ("logprob", "picked"):
        with pytest.raises(ValueError, match=f"'{name}' needs targets"):
            linear_logprob(x, w, b, None, (name,))


@pytest.mark.usefixtures("small_tiles")
def test_classes_are_those_of_the_highest_logits():
    x, w, b = (t.detach() for t in operands((200, 40), 300, BF16))
    labels = labels_of(200, 300, 0.3)
    values, classes, top = linear_logprob(
        x, w, b, labels, ("topk_values", "topk_indices", "argmax"), 5
    )
    logits = linear(x, w, b).float()
    counted = labels != -100
    assert not classes[~counted].any()
    assert not top[~counted].any()
    torch.testing.assert_close(logits.gather(1, classes)[counted], values[counted])
    assert torch.equal(logits.gather(1, top[:, None])[counted, 0], logits.amax(1)[counted])
    assert classes.dtype is top.dtype is torch.int64


@pytest.mark.parametrize("names", [(), ("logprob",)], ids=["loss", "logprob"])
@pytest.mark.parametrize("learnt", [False, True], ids=["constant", "learnt"])
def test_autocast_is_that_of_the_reference(names, learnt):
    inputs = operands((64, 32), 100, F32)
    if learnt and names:
        inputs = (*inputs, torch.tensor(0.7, requires_grad=True))
    with torch.autocast("cpu", BF16):
        outs = [fn(*inputs) for fn in pair(labels_of(64, 100, 0.2), names)]
    mine, theirs = (t[0] if names else t for t in outs)
    assert mine.dtype is theirs.dtype is F32
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(mine.shape)
    grads = (torch.autograd.grad(y, inputs, upstream) for y in (mine, theirs))
    for a, b in zip(*grads, strict=True):
        assert a.dtype is b.dtype is F32
        assert (a - b).norm() / b.norm() < 2**-6


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_opaque_ops_are_well_formed_and_compile(trained):
    x, w, b = operands((10, 16), 50, BF16)
    h, lora_b, _ = (t.detach() for t in operands((10, 4), 50, F32))
    for t in (w, b):
        t.requires_grad_(trained)
    labels, scale = labels_of(10, 50, 0.3), torch.tensor(0.5)
    plain = [t.detach() for t in (x, w, b)]
    op = torch.ops.fusewright.head.default
    tests = ("test_schema", "test_faketensor")
    flags = [True, *[trained] * 4, False]
    one = (["logprob"], ["logprob"], [-1.0], [])
    args = (*plain, h, lora_b, labels, None, *one, 0, -100, 1.0, 0.0, 1.0, flags)
    torch.library.opcheck(op, args, test_utils=tests)
    names, made = list(EVERY), [] if trained else ["logprob", "entropy"]
    terms = [float(n == m) for m in made for n in made]
    more = (3, -100, 0.7, 2.0, 1.0)
    args = (*plain, None, None, labels, scale, names, made, terms, [], *more)
    flags = [not trained, *[False] * 5]
    torch.library.opcheck(op, (*args, flags), test_utils=tests)
    classes = op(*args, flags)[names.index("topk_indices")]
    grads = [classes if n == "topk_indices" else torch.randn(10) for n in names if n != "argmax"]
    names.remove("argmax")
    grads[names.index("topk_values")] = torch.randn(10, 3)
    for adapter in ((None, None), (h, lora_b)):
        args = (*plain, *adapter, labels, scale, [], names, [], grads, *more)
        torch.library.opcheck(op, (*args, [True] * 6), test_utils=tests)
    wanted = (x, w, b) if trained else (x,)
    for names in ((), ("logprob",), EVERY):
        ours = over(linear_logprob if names else linear_cross_entropy, labels, names)
        results = []
        for fn in (torch.compile(ours, fullgraph=True, backend="aot_eager"), ours):
            found = fn(x, w, b)
            found = found if names else (found,)
            total = found[0].square().sum()
            results.append([*(t.detach() for t in found), *torch.autograd.grad(total, wanted)])
        for a, c in zip(*results, strict=True):
            assert torch.equal(a, c)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("logprob",), ("picked",)])
@pytest.mark.parametrize("bad", [5, -1])
def test_a_label_that_is_no_class_is_refused(names, bad):
    x, w, _ = operands((2, 4), 5, F32)
    ours, _ = pair(torch.tensor([0, bad]), names)
    with pytest.raises(IndexError, match=f"^Target {bad} is out of bounds"):
        ours(x, w)


@pytest.mark.parametrize("op", [loss.OP, logprob.OP], ids=lambda op: op.name)
def test_reasons(op):
    x, w, b = operands((10, 16), 50, BF16)
    h, lora_b, _ = operands((10, 4), 50, F32)
    labels = labels_of(10, 50)
    assert op.unsupported(x, w, b, labels) == []
    assert op.unsupported(x, w, b, labels, narrow=h, lora_b=lora_b) == []
    assert "torch.int32" in op.unsupported(x, w, b, labels.int())[0]
    assert "the head" in op.unsupported(x, w.float(), None, labels)[0]
    assert "do not fit" in op.unsupported(x, w, b, labels[1:])[0]
    assert "quantized head" in op.unsupported(x, w.to(torch.int8), b, labels)[0]
    assert "is missing" in op.unsupported(x, w, b, labels, narrow=h)[0]
    assert "B is (49, 4)" in op.unsupported(x, w, b, labels, narrow=h, lora_b=lora_b[1:])[0]
    assert "B is torch" in op.unsupported(x, w, b, labels, narrow=h, lora_b=lora_b.to(BF16))[0]


def test_reasons_of_one_formula():
    x, w, b = operands((10, 16), 50, BF16)
    labels = labels_of(10, 50)
    assert logprob.OP.unsupported(x, w, b, None, ("entropy",)) == []
    reasons = logprob.OP.unsupported(x, w, b, labels, logit_scale=torch.ones(1))
    assert "the shape (1,)" in reasons[0]
    assert "one loss per row" in loss.OP.unsupported(x, w, b, labels, reduction="none")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "none"}, "reduction must be"),
        ({"label_smoothing": 2.0}, "label_smoothing must be between"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"outputs": ("probability",)}, "must be some of logprob, entropy"),
        ({"outputs": ("logprob", "logprob")}, "once each"),
        ({"outputs": ()}, "must be some of"),
        ({"outputs": ("topk_values",)}, "top_k must be between 1 and 50, not 0"),
        ({"outputs": ("topk_indices",), "top_k": 51}, "between 1 and 50, not 51"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"outputs": ("entropy",), "softcap": 0.0}, "softcap must be above 0"),
        ({"outputs": ("entropy",), "softcap": math.nan}, "softcap must be above 0"),
        ({"outputs": ("entropy",), "softcap": math.inf}, "softcap must be above 0 and finite"),
    ],
)
def test_settings_without_meaning_are_refused(options, message):
    x, w, b = operands((10, 16), 50, F32)
    is_loss = "outputs" not in options and "temperature" not in options
    fn = linear_cross_entropy if is_loss else linear_logprob
    with pytest.raises(ValueError, match=message):
        fn(x, w, b, torch.zeros(10, dtype=torch.int64), **options)


@pytest.mark.parametrize("names", [("logprob",), ("entropy",)])
@pytest.mark.parametrize("shape", [(2, 3), (2, 6), (10,), (2, 5, 1), (5, 2)])
def test_targets_of_another_shape_are_refused(names, shape):
    x, w, b = operands((2, 5, 16), 50, F32)
    with pytest.raises(ValueError, match="do not fit x"):
        linear_logprob(x, w, b, torch.zeros(shape, dtype=torch.int64), names)
