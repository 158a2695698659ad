"""On a real GPU: every op's Triton path against its reference, and its library ops' contracts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusewright.kernels.attention import attention, rope
from fusewright.kernels.linear import lora_linear, qkv_block
from fusewright.kernels.linear.linears import Linear
from fusewright.kernels.loss import linear_cross_entropy, linear_divergence, linear_logprob
from fusewright.kernels.mlp import glu, mlp_block
from fusewright.kernels.norms import add_rms_norm, layer_norm, rms_norm, rms_norm_linear
from fusewright.kernels.op import Op
from fusewright.kernels.scan import selective_scan, ssd

from .attention_masks import MASKS
from .util import assert_parity

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1, 64), (2, 123, 507), (2, 256, 2048))
"""(batch, seq, hidden): one token, odd sizes, and several blocks of everything."""


@dataclass(frozen=True)
class Call:
    """One call of an op: ``op.call(*bind(*inputs))``."""

    op: Op
    bind: Callable[..., tuple[Any, ...]]
    inputs: tuple[Tensor, ...]

    def ours(self, *inputs: Tensor) -> Any:
        return _as_tuple(self.op.call(*self.bind(*inputs)))

    def reference(self, *inputs: Tensor) -> Any:
        return _as_tuple(self.op.reference(*self.bind(*inputs)))


def _as_tuple(out: Any) -> Any:
    return tuple(out) if isinstance(out, list) else out


class Draw:
    """Random tensors of one shape and dtype; weights want gradients where ``train`` says so."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, train: bool) -> None:
        self.batch, self.seq, self.hidden = shape
        self.dtype, self.train = dtype, train
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(sizes, generator=self.generator)
        return drawn.to(DEVICE, dtype or self.dtype)

    def rows(self, width: int) -> Tensor:
        return self.normal(self.batch, self.seq, width).requires_grad_()

    def weight(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = self.normal(*sizes, dtype=torch.float32)
        scaled = drawn / sizes[-1] ** 0.5 if len(sizes) > 1 else 1 + drawn / 10
        return scaled.to(dtype or self.dtype).requires_grad_(self.train)

    def heads(self, count: int, width: int) -> Tensor:
        """(batch, count, seq, width), strided as a projection leaves it."""
        flat = self.normal(self.batch, self.seq, count, width)
        return flat.transpose(1, 2).requires_grad_()


def _norm(d: Draw, offset: float, rounding: str) -> Call:
    inputs = (d.rows(d.hidden), d.weight(d.hidden))
    return Call(rms_norm.OP, lambda x, w: (x, w, 1e-6, offset, rounding), inputs)


def _factor(d: Draw) -> Call:
    return Call(rms_norm.OP, lambda x: (x, None, 1e-6, 0.125, "outer"), (d.rows(d.hidden),))


def _layer_norm(d: Draw) -> Call:
    inputs = (d.rows(d.hidden), d.weight(d.hidden), d.weight(d.hidden))
    return Call(layer_norm.OP, lambda x, w, b: (x, w, b, 1e-5), inputs)


def _layer_norm_heads(d: Draw) -> Call:
    x = d.normal(d.batch, d.seq, 3, d.hidden).requires_grad_()
    inputs = (x, d.weight(3 * d.hidden).detach().view(3, -1).requires_grad_(d.train))
    return Call(layer_norm.OP, lambda x, w: (x, w, None, 1e-5), inputs)


def _add_norm(d: Draw) -> Call:
    inputs = (d.rows(d.hidden), d.rows(d.hidden), d.weight(d.hidden))
    return Call(add_rms_norm.OP, lambda x, r, w: (x, r, w, 1e-6, 0.0, "inner"), inputs)


def _norm_linear(d: Draw) -> Call:
    inputs = (d.rows(d.hidden), d.weight(d.hidden), d.weight(96, d.hidden), d.weight(33, d.hidden))
    return Call(
        rms_norm_linear.OP,
        lambda x, g, a, b: (x, g, 1e-6, 0.0, "inner", [a, b], [None, None]),
        inputs,
    )


def _rope(d: Draw, layout: str) -> Call:
    width, rotary = 48, 32
    angles = 3 * d.normal(d.batch, 1, d.seq, rotary // 2, dtype=torch.float32)
    both = angles.repeat_interleave(2, -1) if layout == "pairs" else torch.cat((angles, angles), -1)
    cos, sin = both.cos().to(d.dtype), both.sin().to(d.dtype)
    inputs = (d.heads(3, width), d.heads(1, width), cos, sin)
    return Call(rope.OP, lambda q, k, c, s: ([q, k], c, s, rotary, layout), inputs)


def _glu(d: Draw, activation: str) -> Call:
    inputs = (d.rows(d.hidden), d.rows(d.hidden))
    return Call(glu.OP, lambda gate, up: (gate, up, activation), inputs)


def _glu_packed(d: Draw) -> Call:
    return Call(glu.OP_PACKED, lambda packed: (packed, "silu"), (d.rows(2 * d.hidden),))


def _lora(d: Draw, adapter: torch.dtype | None) -> Call:
    a, b = d.weight(16, d.hidden, dtype=adapter), d.weight(129, 16, dtype=adapter)
    inputs = (
        d.rows(d.hidden),
        d.weight(129, d.hidden),
        d.weight(129),
        a.requires_grad_(),
        b.requires_grad_(),
    )
    return Call(lora_linear.OP, lambda x, *parts: (x, Linear(*parts, 0.5)), inputs)


def _records(t: tuple[Tensor, ...]) -> list[Linear]:
    """Linears from their weights, A's and B's."""
    return [Linear(w, None, a, b, 0.5) for w, a, b in zip(t[::3], t[1::3], t[2::3], strict=True)]


def _block(d: Draw, keep: str) -> Call:
    sizes = ((129, d.hidden), (129, d.hidden), (d.hidden, 129))
    linears = [(d.weight(*s), d.weight(16, s[1]), d.weight(s[0], 16)) for s in sizes]

    def bind(x: Tensor, *t: Tensor) -> tuple[Any, ...]:
        return (x, _records(t), "silu", "two", keep)

    return Call(mlp_block.OP, bind, (d.rows(d.hidden), *(t for each in linears for t in each)))


def _linears(d: Draw) -> Call:
    linears = [(d.weight(n, d.hidden), d.weight(16, d.hidden), d.weight(n, 16)) for n in (129, 64)]

    def bind(x: Tensor, *t: Tensor) -> tuple[Any, ...]:
        return (x, _records(t))

    return Call(qkv_block.OP, bind, (d.rows(d.hidden), *(t for each in linears for t in each)))


def _loss(d: Draw, smoothing: float, softcap: float | None) -> Call:
    vocabulary = 1231
    labels = torch.randint(vocabulary, (d.batch, d.seq), generator=d.generator)
    labels[torch.rand(labels.shape, generator=d.generator) < 0.3] = -100
    labels[0, 0] = vocabulary - 1
    inputs = (d.rows(d.hidden), d.weight(vocabulary, d.hidden), labels.to(DEVICE))
    return Call(
        linear_cross_entropy.OP,
        lambda x, w, y: (x, w, None, y, -100, "mean", smoothing, softcap),
        inputs,
    )


def _logprob(d: Draw, names: tuple[str, ...], softcap: float | None) -> Call:
    x, w, labels = _loss(d, 0.0, None).inputs
    scale = torch.tensor(0.8, device=DEVICE, requires_grad=d.train)
    return Call(
        linear_logprob.OP,
        lambda x, w, s, y: (x, w, None, y, names, 4, -100, 0.7, softcap, s),
        (x, w, scale, labels),
    )


def _divergence(d: Draw, kind: str) -> Call:
    x, w, labels = _loss(d, 0.0, None).inputs
    teacher = d.rows(96).detach(), d.weight(1231, 96).detach()
    return Call(
        linear_divergence.OP,
        lambda x, w, other_x, other_w, y: (x, w, None, other_x, other_w, None, y, kind, 0.3, 2.0),
        (x, w, *teacher, labels),
    )


def _attention(d: Draw) -> Call:
    inputs = (d.heads(6, 48), d.heads(2, 48), d.heads(2, 48))
    return Call(attention.OP, lambda q, k, v: (q, k, v, 48**-0.5, True), inputs)


def _masked_attention(d: Draw, form: str) -> Call:
    inputs = (d.heads(6, 48), d.heads(2, 48), d.heads(2, 32))
    mask = MASKS[form](d.batch, 6, d.seq).to(DEVICE)
    mask = mask if mask.dtype is torch.bool else mask.to(d.dtype)
    return Call(attention.OP, lambda q, k, v: (q, k, v, None, False, mask), inputs)


def _selective_scan(d: Draw) -> Call:
    states = 16
    both = d.rows(2 * states)
    decays = -0.5 - 4 * d.normal(d.hidden, states, dtype=torch.float32).abs()
    inputs = (
        d.rows(d.hidden), d.rows(d.hidden), decays.requires_grad_(d.train), both,
        d.weight(d.hidden, dtype=torch.float32), d.rows(d.hidden),
        d.weight(d.hidden, dtype=torch.float32),
    )  # fmt: skip

    def bind(u: Any, t: Any, a: Any, both: Any, skip: Any, z: Any, bias: Any) -> tuple[Any, ...]:
        b, c = both.transpose(1, 2).split(states, 1)
        return (u.transpose(1, 2), t.transpose(1, 2), a, b, c, skip, z.transpose(1, 2), bias, True)

    return Call(selective_scan.OP, bind, inputs)


def _ssd(d: Draw) -> Call:
    heads, features, states = 24, 16, 32
    packed = d.rows(heads * features + 2 * states)
    decays = (-0.5 - d.normal(heads, dtype=torch.float32).abs()).requires_grad_(d.train)
    inputs = (packed, d.rows(heads), decays, d.weight(heads), d.weight(heads))

    def bind(packed: Any, t: Any, a: Any, skip: Any, bias: Any) -> tuple[Any, ...]:
        x, b, c = packed.split([heads * features, states, states], -1)
        x = x.unflatten(-1, (heads, features))
        return (x, t, a, b.unsqueeze(2), c.unsqueeze(2), skip, bias, True)

    return Call(ssd.OP, bind, inputs)


def _ssd_groups(d: Draw) -> Call:
    """Sizes that fill no tile, heads in groups, no skip connection, steps between limits."""
    heads, groups, features, states = 6, 2, 67, 35
    packed = d.rows(heads * features + 2 * groups * states)
    decays = (-0.5 - d.normal(heads, dtype=torch.float32).abs()).requires_grad_(d.train)

    def bind(packed: Any, t: Any, a: Any) -> tuple[Any, ...]:
        x, b, c = packed.split([heads * features, groups * states, groups * states], -1)
        b, c = (s.unflatten(-1, (groups, states)) for s in (b, c))
        x = x.unflatten(-1, (heads, features))
        return (x, t, a, b, c, None, None, True, (0.01, 1.5))

    return Call(ssd.OP, bind, (packed, d.rows(heads), decays))


CALLS: dict[str, Callable[[Draw], Call]] = {
    "rms_norm-inner": lambda d: _norm(d, 0.0, "inner"),
    "rms_norm-outer-offset": lambda d: _norm(d, 1.0, "outer"),
    "rms_norm-factor": _factor,
    "layer_norm": _layer_norm,
    "layer_norm-heads": _layer_norm_heads,
    "add_rms_norm": _add_norm,
    "rms_norm_linear": _norm_linear,
    "rope": lambda d: _rope(d, "halves"),
    "rope-pairs": lambda d: _rope(d, "pairs"),
    "rope-pairs-to-halves": lambda d: _rope(d, "pairs_to_halves"),
    "glu-silu": lambda d: _glu(d, "silu"),
    "glu-gelu": lambda d: _glu(d, "gelu"),
    "glu-gelu-tanh": lambda d: _glu(d, "gelu_tanh"),
    "glu_packed": _glu_packed,
    "lora_linear": lambda d: _lora(d, None),
    "lora_linear-fp32-adapter": lambda d: _lora(d, torch.float32),
    "mlp_block": lambda d: _block(d, "gate_up"),
    "mlp_block-input": lambda d: _block(d, "input"),
    "qkv_block": _linears,
    "linear_cross_entropy": lambda d: _loss(d, 0.0, None),
    "linear_cross_entropy-smooth-softcap": lambda d: _loss(d, 0.1, 30.0),
    "linear_logprob": lambda d: _logprob(d, ("logprob",), None),
    "linear_logprob-two-softcap": lambda d: _logprob(d, ("entropy", "logprob"), 30.0),
    "linear_logprob-all": lambda d: _logprob(
        d, ("logprob", "entropy", "sum_p2", "mean_logit", "logsumexp", "topk_values"), 30.0
    ),
    "linear_divergence-forward": lambda d: _divergence(d, "forward_kl"),
    "linear_divergence-reverse": lambda d: _divergence(d, "reverse_kl"),
    "linear_divergence-jsd": lambda d: _divergence(d, "jsd"),
    "attention": _attention,
    **{f"attention-{form}": functools.partial(_masked_attention, form=form) for form in MASKS},
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "ssd-groups": _ssd_groups,
}


def make(name: str, draw: Draw) -> Call:
    """The call of that name; only attention without a mask has no Triton kernel."""
    call = CALLS[name](draw)
    reasons = call.op.unsupported(*call.bind(*call.inputs))
    if reasons and name == "attention":  # PyTorch's own is used there
        pytest.skip("; ".join(reasons))
    assert not reasons
    return call


each_call = pytest.mark.parametrize("name", CALLS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@each_call
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_parity(name: str, dtype: torch.dtype, shape: tuple[int, int, int], train: bool) -> None:
    call = make(name, Draw(shape, dtype, train))
    assert_parity(call.ours, call.reference, *call.inputs)


class Recorder(TorchDispatchMode):
    """Remembers the calls of fusewright's own library ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusewright":
            self.calls.setdefault(func, args)
        return func(*args, **(kwargs or {}))


def _library_calls(call: Call) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The library ops that forward and backward of ``call`` run, with detached arguments."""
    with Recorder() as recorder:
        outputs = call.ours(*call.inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
    for op, args in recorder.calls.items():
        plain = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args)
        yield op, tuple(plain)


@each_call
@pytest.mark.parametrize("train", [False, True], ids=["frozen", "trained"])
def test_library_ops_keep_their_contracts(name: str, train: bool) -> None:
    call = make(name, Draw((3, 41, 252), torch.bfloat16, train))
    calls = list(_library_calls(call))
    assert calls or name == "attention", "this op has Triton kernels, and none ran"
    for op, args in calls:
        torch.library.opcheck(op, args)
