"""Gradients of gradients: every op's backward pass can be differentiated, or says that it cannot.

Eager PyTorch differentiates every backward pass, whether or not the gradient that comes into it
has a history: a gradient penalty's has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fusewright.kernels.attention import attention, rope
from fusewright.kernels.linear import quant_linear
from fusewright.kernels.linear.quantized import Quantized
from fusewright.kernels.loss import linear_cross_entropy, linear_divergence, linear_logprob
from fusewright.kernels.mlp import glu
from fusewright.kernels.moe import moe_experts
from fusewright.kernels.norms import add_rms_norm, layer_norm, rms_norm, rms_norm_linear
from fusewright.kernels.scan import selective_scan, ssd

from .by_parts import LORA, MLP, QKV, QUANT_LORA
from .util import Stop

Fn = Callable[..., Any]
WIDE = torch.float64


def _t(*shape: int, grad: bool = True, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 7 + seed)
    return torch.randn(shape, generator=generator, dtype=WIDE).mul_(0.5).requires_grad_(grad)


def _int8(out: int, into: int) -> Quantized:
    codes = torch.arange(out * into).remainder(200).sub(100).to(torch.int8).view(out, into)
    return Quantized(codes, torch.linspace(0.5, 2, out), (out, into), 0, "int8")


def _linears(count: int, sizes: Sequence[tuple[int, int]], **frozen: bool) -> list[Tensor]:
    """Weight, bias, A and B of each linear, one after the other."""
    return [
        t
        for i in range(count)
        for out, into in (sizes[i],)
        for t in (
            _t(out, into, seed=i, grad=frozen.get("w", True)),
            _t(out, seed=i),
            _t(2, into, seed=i, grad=frozen.get("a", True)),
            _t(out, 2, seed=i, grad=frozen.get("b", True)),
        )
    ]


def _with(op: Fn, count: int, *rest: Any) -> Fn:
    """``op`` of x and of ``_linears``."""

    def call(x: Tensor, *tensors: Tensor) -> Any:
        parts = [list(tensors[i::4]) for i in range(4)]
        return op(x, *parts, [0.7, 1.0, 2.0][:count], [None] * count, *rest)

    return call


_LABELS = torch.tensor([[1, -100, 3], [0, 2, 2]])
_LOGPROB = (
    ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "topk_values"), 2, -100, 0.7, 5.0,
)  # fmt: skip
_TEACHER = _t(2, 3, 6, grad=False), _t(5, 6, grad=False), None
_DISTILLED = *_TEACHER, _LABELS, "jsd", 0.3
_INDEX = torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0]])
_THREE = ((3, 4), (5, 4), (3, 4))
_MLP = ((6, 4), (6, 4), (4, 6))
_COS, _SIN = torch.rand(1, 1, 3, 4, dtype=WIDE), torch.rand(1, 1, 3, 4, dtype=WIDE)


def _sdpa(*args: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's others have no second derivative
        return attention.attention_reference(*args)


def _moe(run: Fn) -> Fn:
    return lambda x, w, up, down, ub, db: run(x, _INDEX, w, up, down, torch.tanh, ub, db)


def _quantized(run: Fn, *kind: Any) -> Fn:
    return lambda x, *rest: run(x, _int8(3, 4), *rest, *kind)


def _quantized_lora(run: Fn) -> Fn:
    def call(x: Tensor, bias: Tensor, a: Tensor, b: Tensor, z: Tensor, lora_bias: Tensor) -> Any:
        return run(x, _int8(3, 4), bias, a, b, 0.7, z, lora_bias)

    return call


def _lora(run: Fn) -> Fn:
    return lambda x, w, bias, a, b, z, lb: run(x, w, bias, a, b, 0.7, z, lb)


def _norm_linear(run: Fn) -> Fn:
    return lambda x, g, v, w, b: run(x, g, 1e-5, 1.0, "inner", [v, w], [b, None])


def _scan(run: Fn) -> Fn:
    return lambda u, delta, *rest: run(u, delta, *rest, True)


def _ssd(run: Fn) -> Fn:
    return lambda *tensors: run(*tensors, True)


CASES: dict[str, tuple[Fn, Fn, Sequence[Tensor]]] = {
    "rms_norm": (
        lambda x, w: rms_norm.rms_norm(x, w, 1e-5, 1.0, "outer"),
        lambda x, w: rms_norm.reference(x, w, 1e-5, 1.0, "outer"),
        (_t(2, 3, 4), _t(4)),
    ),
    "add_rms_norm": (
        lambda x, r, w: add_rms_norm.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: add_rms_norm.reference(x, r, w, 1e-5),
        (_t(2, 3, 4), _t(2, 3, 4, seed=1), _t(4)),
    ),
    "layer_norm": (
        lambda x, w, b: layer_norm.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: layer_norm.reference(x, w, b, 1e-5),
        (_t(2, 3, 4), _t(3, 4), _t(3, 4, seed=1)),
    ),
    "rms_norm_linear": (
        _norm_linear(rms_norm_linear.rms_norm_linear),
        _norm_linear(rms_norm_linear.reference),
        (_t(2, 3, 4), _t(4), _t(5, 4), _t(3, 4), _t(5)),
    ),
    "glu": (
        lambda g, u: glu.glu(g, u, "silu"),
        lambda g, u: glu.glu_reference(g, u, "silu"),
        (_t(2, 3), _t(2, 3, seed=1)),
    ),
    "glu_packed": (
        lambda t: glu.glu_packed(t, "gelu_tanh", False),
        lambda t: glu.glu_packed_reference(t, "gelu_tanh", False),
        (_t(2, 6),),
    ),
    "rope": (
        lambda q, k: rope.rope([q, k], _COS, _SIN, 4),
        lambda q, k: rope.rope_reference([q, k], _COS, _SIN, 4),
        (_t(2, 2, 3, 6), _t(2, 1, 3, 6)),
    ),
    "attention": (
        lambda q, k, v: attention.attention(q, k, v, None, True),
        lambda q, k, v: _sdpa(q, k, v, None, True),
        (_t(1, 2, 3, 4), _t(1, 1, 3, 4), _t(1, 1, 3, 4, seed=1)),
    ),
    "attention in a window": (
        lambda q, k, v: attention.attention(q, k, v, None, True, None, 2),
        lambda q, k, v: _sdpa(q, k, v, None, True, None, 2),
        (_t(1, 2, 3, 4), _t(1, 1, 3, 4), _t(1, 1, 3, 4, seed=1)),
    ),
    "lora_linear": (
        lambda x, w, b, a, c: LORA.call(x, w, b, a, c, 0.7),
        lambda x, w, b, a, c: LORA.reference(x, w, b, a, c, 0.7),
        (_t(2, 3, 4), _t(5, 4), _t(5), _t(2, 4), _t(5, 2)),
    ),
    "lora_linear over a frozen base": (
        lambda x, w, a, c: LORA.call(x, w, None, a, c, 0.7),
        lambda x, w, a, c: LORA.reference(x, w, None, a, c, 0.7),
        (_t(2, 3, 4), _t(5, 4, grad=False), _t(2, 4), _t(5, 2)),
    ),
    "lora_linear, frozen": (
        lambda x, w, a, c: LORA.call(x, w, None, a, c, 0.7),
        lambda x, w, a, c: LORA.reference(x, w, None, a, c, 0.7),
        (_t(2, 3, 4), _t(5, 4, grad=False), _t(2, 4, grad=False), _t(5, 2, grad=False)),
    ),
    "lora_linear with dropout": (
        _lora(LORA.call),
        _lora(LORA.reference),
        (_t(3, 4), _t(5, 4), _t(5), _t(2, 4), _t(5, 2), _t(3, 4, seed=1), _t(5, seed=1)),
    ),
    "quant_linear": (
        _quantized(quant_linear.quant_linear),
        _quantized(quant_linear.reference),
        (_t(2, 3, 4), _t(3)),
    ),
    "quant_lora_linear": (
        _quantized_lora(QUANT_LORA.call),
        _quantized_lora(QUANT_LORA.reference),
        (_t(2, 4), _t(3), _t(2, 4, seed=1), _t(3, 2), _t(2, 4, seed=2), _t(3, seed=1)),
    ),
    "qkv_block": (
        _with(QKV.call, 3),
        _with(QKV.reference, 3),
        (_t(2, 3, 4), *_linears(3, _THREE)),
    ),
    "qkv_block over frozen bases": (
        _with(QKV.call, 3, "input"),
        _with(QKV.reference, 3),
        (_t(2, 3, 4), *_linears(3, _THREE, w=False)),
    ),
    "qkv_block, frozen": (
        _with(QKV.call, 3),
        _with(QKV.reference, 3),
        (_t(2, 3, 4), *_linears(3, _THREE, w=False, a=False, b=False)),
    ),
    "mlp_block": (
        _with(MLP.call, 3, "silu"),
        _with(MLP.reference, 3, "silu"),
        (_t(2, 2, 4), *_linears(3, _MLP)),
    ),
    "mlp_block in tiles": (
        _with(MLP.call, 3, "silu", "two", "input"),
        _with(MLP.reference, 3, "silu"),
        (_t(2, 2, 4), *_linears(3, _MLP, w=False)),
    ),
    "moe_experts": (
        _moe(moe_experts.moe_experts),
        _moe(moe_experts.reference),
        (_t(4, 3), _t(4, 2), _t(3, 3, 5), _t(3, 5, 3), _t(3, 5), _t(3, 3, seed=1)),
    ),
    "linear_cross_entropy": (
        lambda x, w, b: linear_cross_entropy.linear_cross_entropy(
            x, w, b, _LABELS, -100, "mean", 0.1, 5.0, 0.5
        ),
        lambda x, w, b: linear_cross_entropy.reference(
            x, w, b, _LABELS, -100, "mean", 0.1, 5.0, 0.5
        ),
        (_t(2, 3, 4), _t(5, 4), _t(5)),
    ),
    "linear_logprob": (
        lambda x, w, b, s: linear_logprob.linear_logprob(x, w, b, _LABELS, *_LOGPROB, s),
        lambda x, w, b, s: linear_logprob.reference(x, w, b, _LABELS, *_LOGPROB, s),
        (_t(2, 3, 4), _t(5, 4), _t(5), _t()),
    ),
    "linear_logprob over a frozen head": (
        lambda x, w: linear_logprob.linear_logprob(x, w, None, _LABELS),
        lambda x, w: linear_logprob.reference(x, w, None, _LABELS),
        (_t(2, 3, 4), _t(5, 4, grad=False)),
    ),
    "linear_divergence": (
        lambda x, w, b: linear_divergence.linear_divergence(x, w, b, *_DISTILLED),
        lambda x, w, b: linear_divergence.reference(x, w, b, *_DISTILLED),
        (_t(2, 3, 4), _t(5, 4), _t(5)),
    ),
    "linear_divergence over a frozen head": (
        lambda x, w: linear_divergence.linear_divergence(x, w, None, *_TEACHER),
        lambda x, w: linear_divergence.reference(x, w, None, *_TEACHER),
        (_t(2, 3, 4), _t(5, 4, grad=False)),
    ),
    "selective_scan": (
        _scan(selective_scan.selective_scan),
        _scan(selective_scan.scan_reference),
        (
            _t(1, 2, 3), _t(1, 2, 3, seed=1), _t(2, 2), _t(1, 2, 3, seed=2), _t(1, 2, 3, seed=3),
            _t(2), _t(1, 2, 3, seed=4), _t(2, seed=1),
        ),
    ),
    "ssd": (
        _ssd(ssd.ssd),
        _ssd(ssd.ssd_reference),
        (
            _t(1, 3, 2, 2), _t(1, 3, 2), _t(2), _t(1, 3, 1, 2), _t(1, 3, 1, 2, seed=1),
            _t(2, seed=1), _t(2, seed=2),
        ),
    ),
}  # fmt: skip


def _fresh(inputs: Sequence[Tensor], dtype: torch.dtype = WIDE) -> list[Tensor]:
    return [t.detach().to(dtype).clone().requires_grad_(t.requires_grad) for t in inputs]


def _total(out: Any) -> Tensor:
    outs = out if isinstance(out, tuple) else (out,)
    return sum(o.double().square().sum() if o.ndim else o.double() for o in outs)  # type: ignore[return-value]


def _penalty(fn: Fn, inputs: Sequence[Tensor], square: bool = False) -> list[Tensor | None]:
    """The gradients of a gradient penalty; the upstream gradient of ``fn`` has no history."""
    wanted = [t for t in inputs if t.requires_grad]
    out = fn(*inputs)
    outs = out if isinstance(out, tuple) else (out,)
    total = _total(out) if square else sum(o.sum() for o in outs)
    grads = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
    penalty = sum(g.square().sum() for g in grads if g is not None)
    if not penalty.requires_grad:  # type: ignore[union-attr]
        return [None for _ in wanted]
    found = torch.autograd.grad(penalty, wanted, allow_unused=True)  # type: ignore[arg-type]
    return list(found)


def _same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        zero = torch.zeros((), dtype=WIDE)
        a, b = zero if a is None else a, zero if b is None else b
        assert torch.allclose(a, b.expand_as(a), rtol=1e-7, atol=1e-9), float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("square", [False, True])
def test_a_gradient_penalty(name: str, square: bool) -> None:
    ours, reference, inputs = CASES[name]
    theirs = _penalty(reference, _fresh(inputs), square)
    assert any(g is not None and bool(g.any()) for g in theirs) or not square
    _same(_penalty(ours, _fresh(inputs), square), theirs)


@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_no_gradient_is_none_and_not_zeros(name: str, differentiable: bool) -> None:
    """Optimizers skip what has none, and let momentum and decay move what has zeros."""
    for run in CASES[name][:2]:
        inputs = _fresh(CASES[name][2])
        out = run(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        sum(Stop.apply(o).sum() for o in outs).backward(create_graph=differentiable)
        assert all(t.grad is None for t in inputs)


@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name: str) -> None:
    ours, _, inputs = CASES[name]
    assert torch.autograd.gradgradcheck(ours, _fresh(inputs), fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_within_a_checkpoint(name: str) -> None:
    ours, reference, inputs = CASES[name]

    def checkpointed(*tensors: Tensor) -> Any:
        return checkpoint(ours, *tensors, use_reentrant=False)

    _same(_penalty(checkpointed, _fresh(inputs), True), _penalty(reference, _fresh(inputs), True))


@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_gradients(name: str) -> None:
    """``is_grads_batched`` runs backward under vmap."""
    ours, reference, inputs = CASES[name]
    found = []
    for fn in (ours, reference):
        leaves = _fresh(inputs)
        wanted = [t for t in leaves if t.requires_grad]
        out = fn(*leaves)
        out = out[0] if isinstance(out, tuple) else out
        generator = torch.Generator().manual_seed(0)
        ups = torch.randn((3, *out.shape), generator=generator, dtype=WIDE)
        found.append(
            torch.autograd.grad(out, wanted, ups, is_grads_batched=True, allow_unused=True)
        )
    _same(*found)


def test_a_weight_that_the_input_is_made_of_counts_once() -> None:
    w, x = _t(4, 4), _t(3, 4)
    norm = torch.ones(4, dtype=WIDE)

    def call(fn: Fn) -> Fn:
        return lambda w: fn(F.linear(x, w).tanh(), norm, 1e-5, 0.0, "inner", [w], [None])[0]

    _same(
        _penalty(call(rms_norm_linear.rms_norm_linear), _fresh([w]), True),
        _penalty(call(rms_norm_linear.reference), _fresh([w]), True),
    )


FROZEN = {
    "mlp_block": (
        _with(MLP.call, 3, "silu"),
        (_t(2, 2, 4), *_linears(3, _MLP, w=False, a=False)),
        "gate and up are frozen",
    ),
    "qkv_block": (
        _with(QKV.call, 3),
        (_t(2, 3, 4), *_linears(3, _THREE, w=False, a=False)),
        "B is trained and A is not",
    ),
    "lora_linear": (
        lambda x, w, a, c: LORA.call(x, w, None, a, c, 0.7),
        (_t(2, 3, 4), _t(5, 4, grad=False), _t(2, 4, grad=False), _t(5, 2)),
        "B is trained and A is not",
    ),
    "quant_lora_linear": (
        _quantized_lora(QUANT_LORA.call),
        (_t(2, 4), _t(3), _t(2, 4, grad=False), _t(3, 2), _t(2, 4, seed=2), _t(3, seed=1)),
        "B is trained and A is not",
    ),
    "moe_experts": (
        _moe(moe_experts.moe_experts),
        (_t(4, 3), _t(4, 2), _t(3, 3, 5, grad=False), _t(3, 5, 3, grad=False), _t(3, 5),
         _t(3, 3, seed=1)),
        "the experts are frozen",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FROZEN)
def test_what_was_not_kept_is_an_error_that_says_what_to_do(name: str) -> None:
    """Also where the upstream gradient has no history: never a value without one."""
    ours, inputs, why = FROZEN[name]
    with pytest.raises(NotImplementedError, match=rf"(?s){why}.*restore\(model\)"):
        _penalty(ours, _fresh(inputs))
    out = ours(*_fresh(inputs))  # once is as ever
    _total(out).backward()


@pytest.mark.parametrize("name", CASES)
def test_another_threads_compilation_changes_no_derivative(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, reference, inputs = CASES[name]
    wanted = _penalty(reference, _fresh(inputs), True)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # all threads see it
    _same(_penalty(ours, _fresh(inputs), True), wanted)
    leaves = _fresh(inputs)
    out = ours(*leaves)
    sum(Stop.apply(o).sum() for o in (out if isinstance(out, tuple) else (out,))).backward()
    assert all(t.grad is None for t in leaves)
