"""One call of each op that has Triton kernels, in their variants: for tests on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from fusewright.kernels.attention import attention, rope
from fusewright.kernels.linear import lora_linear, qkv_block, quant_linear, quant_lora_linear
from fusewright.kernels.linear.linears import Linear
from fusewright.kernels.linear.quantized import Quantized
from fusewright.kernels.loss import linear_cross_entropy, linear_divergence, linear_logprob
from fusewright.kernels.mlp import glu, mlp_block
from fusewright.kernels.moe import moe_experts
from fusewright.kernels.norms import add_rms_norm, layer_norm, rms_norm, rms_norm_linear
from fusewright.kernels.op import Op
from fusewright.kernels.scan import selective_scan, ssd

from .attention_masks import MASKS
from .quantized_weights import random_weight


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

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, train: bool, device: str = "cuda",
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.batch, self.seq, self.hidden = shape
        self.dtype, self.train, self.device = dtype, train, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(sizes, generator=self.generator)
        return drawn.to(self.device, dtype or self.dtype)

    def rows(self, width: int) -> Tensor:
        return self.normal(self.batch, self.seq, width).requires_grad_()

    def weight(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = self.normal(*sizes, dtype=torch.float32)
        scaled = drawn / sizes[-1] ** 0.5 if len(sizes) > 1 else 1 + drawn / 10
        return scaled.to(dtype or self.dtype).requires_grad_(self.train)

    def quantized(self, *sizes: int, kind: str = "nf4", nested: bool = True) -> Quantized:
        """A frozen weight (out, in) of 4 bits."""
        torch.manual_seed(0)
        w = random_weight((sizes[0], sizes[1]), kind, 64, nested)
        return Quantized(*(t.to(self.device) if isinstance(t, Tensor) else t for t in w))

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


def _quant(d: Draw, kind: str, nested: bool) -> Call:
    w = d.quantized(129, d.hidden, kind=kind, nested=nested)
    inputs = (d.rows(d.hidden), d.weight(129))
    return Call(quant_linear.OP, lambda x, bias: (x, w, bias), inputs)


def _quant_lora(d: Draw, adapter: torch.dtype | None) -> Call:
    w = d.quantized(129, d.hidden)
    a, b = d.weight(16, d.hidden, dtype=adapter), d.weight(129, 16, dtype=adapter)
    inputs = (d.rows(d.hidden), d.weight(129), a.requires_grad_(), b.requires_grad_())
    return Call(quant_lora_linear.OP, lambda x, *parts: (x, Linear(w, *parts, 0.5)), inputs)


def _quant_records(
    d: Draw, sizes: Sequence[tuple[int, int]]
) -> tuple[Callable[..., list[Linear]], list[Tensor]]:
    """What makes linears over quantized weights of their A's and B's, and these."""
    weights = [d.quantized(*s) for s in sizes]
    pairs = [t for out, into in sizes for t in (d.weight(16, into), d.weight(out, 16))]

    def bind(*t: Tensor) -> list[Linear]:
        parts = zip(weights, t[::2], t[1::2], strict=True)
        return [Linear(w, None, a, b, 0.5) for w, a, b in parts]

    return bind, [t.requires_grad_() for t in pairs]


def _quant_linears(d: Draw) -> Call:
    bind, pairs = _quant_records(d, [(n, d.hidden) for n in (129, 64)])
    return Call(qkv_block.OP, lambda x, *t: (x, bind(*t)), (d.rows(d.hidden), *pairs))


def _quant_block(d: Draw, keep: str) -> Call:
    bind, pairs = _quant_records(d, [(129, d.hidden), (129, d.hidden), (d.hidden, 129)])
    return Call(
        mlp_block.OP, lambda x, *t: (x, bind(*t), "silu", "two", keep), (d.rows(d.hidden), *pairs)
    )


def _experts(d: Draw, bias: bool) -> Call:
    """Eight experts, two of which have no tokens; the routing weights want gradients, too."""
    experts, active, inner, tokens = 8, 2, 96, d.batch * d.seq
    index = torch.rand(tokens, experts - 2, generator=d.generator).topk(active).indices
    index = (index + 1).to(d.device)
    inputs = [
        d.normal(tokens, d.hidden).requires_grad_(),
        d.normal(tokens, active).requires_grad_(),
    ]
    inputs += [d.weight(experts, inner, d.hidden), d.weight(experts, d.hidden, inner)]
    inputs += [d.weight(experts, inner), d.weight(experts, d.hidden)] if bias else []

    def bind(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor) -> Any:
        return (x, index, weights, up.mT, down.mT, silu, *biases)

    return Call(moe_experts.OP, bind, tuple(inputs))


def _loss(d: Draw, smoothing: float, softcap: float | None) -> Call:
    vocabulary = 1231
    labels = torch.randint(vocabulary, (d.batch, d.seq), generator=d.generator)
    labels[torch.rand(labels.shape, generator=d.generator) < 0.3] = -100
    labels[0, 0] = vocabulary - 1
    inputs = (d.rows(d.hidden), d.weight(vocabulary, d.hidden), labels.to(d.device))
    return Call(
        linear_cross_entropy.OP,
        lambda x, w, y: (x, w, None, y, -100, "mean", smoothing, softcap),
        inputs,
    )


def _logprob(d: Draw, names: tuple[str, ...], softcap: float | None) -> Call:
    x, w, labels = _loss(d, 0.0, None).inputs
    scale = torch.tensor(0.8, device=d.device, requires_grad=d.train)
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
    mask = MASKS[form](d.batch, 6, d.seq).to(d.device)
    mask = mask if mask.dtype is torch.bool else mask.to(d.dtype)
    inputs = (d.heads(6, 48), d.heads(2, 48), d.heads(2, 32), mask)
    return Call(attention.OP, lambda q, k, v, mask: (q, k, v, None, False, mask), inputs)


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
    "quant_linear-nf4": lambda d: _quant(d, "nf4", True),
    "quant_linear-fp4": lambda d: _quant(d, "fp4", False),
    "quant_lora_linear": lambda d: _quant_lora(d, None),
    "quant_lora_linear-fp32-adapter": lambda d: _quant_lora(d, torch.float32),
    "quant_mlp_block": lambda d: _quant_block(d, "gate_up"),
    "quant_mlp_block-input": lambda d: _quant_block(d, "input"),
    "quant_qkv_block": _quant_linears,
    "moe_experts": lambda d: _experts(d, False),
    "moe_experts-bias": lambda d: _experts(d, True),
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
