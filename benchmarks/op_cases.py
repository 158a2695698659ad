"""One call of each op, at the sizes of one decoder layer: what ``ops.py`` measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from fusewright.kernels.linear.linears import Linear
from fusewright.kernels.moe.moe_experts import moe_route
from shapes import OpShape


@dataclass(frozen=True)
class Case:
    """The arguments of one call.

    Attributes:
        args: positional arguments, tensors possibly inside lists.
        parameters: those of the tensors in ``args`` that are weights; they are in memory anyway,
            so they don't count as saved for backward.
    """

    args: tuple[Any, ...]
    parameters: tuple[Tensor, ...] = ()

    def leaves(self) -> list[Tensor]:
        """The tensors that want a gradient."""
        flat = pytree.tree_leaves(self.args)
        return [t for t in flat if isinstance(t, Tensor) and t.requires_grad]


class Maker:
    """Makes the cases of one shape: activations want gradients, weights if ``train_weights``.

    What is always trained, such as adapters, has the dtype ``adapters``, or that of all else.
    """

    def __init__(
        self, shape: OpShape, dtype: torch.dtype, device: str, train_weights: bool,
        adapters: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.sizes = shape, shape.model
        self.dtype, self.device, self.train_weights = dtype, device, train_weights
        self.adapters = adapters or dtype

    def make(self, op: str) -> Case:
        """The case of the op of that name."""
        torch.manual_seed(0)
        return CASES[op](self)

    def activation(self, *sizes: int) -> Tensor:
        """A tensor that an earlier layer computed, of ``(batch, seq, *sizes)``."""
        full = (self.shape.batch, self.shape.seq, *sizes)
        return torch.randn(full, dtype=self.dtype, device=self.device).requires_grad_()

    def weight(self, *sizes: int, trained: bool = False) -> Tensor:
        """A weight, scaled so that a matmul keeps its input's size."""
        drawn = torch.randn(sizes, dtype=torch.float32, device=self.device)
        scaled = drawn / sizes[-1] ** 0.5 if len(sizes) > 1 else 1 + drawn / 10
        made = scaled.to(self.adapters if trained else self.dtype)
        return made.requires_grad_(trained or self.train_weights)

    def heads(self, count: int) -> Tensor:
        """Projected heads as models have them: a strided ``(batch, count, seq, head_dim)``."""
        flat = self.activation(count, self.sizes.head_dim).detach()
        return flat.transpose(1, 2).requires_grad_()


def _rms_norm(m: Maker) -> Case:
    weight = m.weight(m.sizes.hidden)
    return Case((m.activation(m.sizes.hidden), weight, 1e-6), (weight,))


def _layer_norm(m: Maker) -> Case:
    weight, bias = m.weight(m.sizes.hidden), m.weight(m.sizes.hidden)
    return Case((m.activation(m.sizes.hidden), weight, bias, 1e-5), (weight, bias))


def _add_rms_norm(m: Maker) -> Case:
    x, residual = m.activation(m.sizes.hidden), m.activation(m.sizes.hidden)
    weight = m.weight(m.sizes.hidden)
    return Case((x, residual, weight, 1e-6, 0.0, "inner"), (weight,))


def _rms_norm_linear(m: Maker) -> Case:
    x, norm_weight = m.activation(m.sizes.hidden), m.weight(m.sizes.hidden)
    rows = [count * m.sizes.head_dim for count in (m.sizes.heads, m.sizes.kv_heads)]
    weights = [m.weight(n, m.sizes.hidden) for n in (rows[0], rows[1], rows[1])]
    args = (x, norm_weight, 1e-6, 0.0, "inner", weights, [None, None, None])
    return Case(args, (norm_weight, *weights))


def _rope(m: Maker) -> Case:
    dim = m.sizes.head_dim
    frequency = 1e4 ** (-torch.arange(0, dim, 2, device=m.device) / dim)
    angles = torch.arange(m.shape.seq, device=m.device)[:, None] * frequency
    both = torch.cat((angles, angles), -1)[None]
    tables = (both.cos().to(m.dtype), both.sin().to(m.dtype))
    return Case(([m.heads(m.sizes.heads), m.heads(m.sizes.kv_heads)], *tables, dim), tables)


def _glu(m: Maker) -> Case:
    return Case((m.activation(m.sizes.ffn), m.activation(m.sizes.ffn), "silu"))


def _glu_packed(m: Maker) -> Case:
    return Case((m.activation(2 * m.sizes.ffn), "silu"))


def _lora_linear(m: Maker) -> Case:
    x, weight = m.activation(m.sizes.hidden), m.weight(m.sizes.ffn, m.sizes.hidden)
    lora_a = m.weight(m.shape.rank, m.sizes.hidden, trained=True)
    lora_b = m.weight(m.sizes.ffn, m.shape.rank, trained=True)
    return Case((x, Linear(weight, None, lora_a, lora_b, 2.0)), (weight, lora_a, lora_b))


def _dora_row_norms(m: Maker) -> Case:
    weight, _, a, b, scale, *_ = _lora_linear(m).args[1]
    held = tuple(t.detach() for t in (weight, a, b))  # the norms are constants for backward
    return Case((*held, scale, m.dtype), held)


def _dora(m: Maker) -> Case:
    base, factor = m.activation(m.sizes.ffn), m.weight(m.sizes.ffn, trained=True)
    return Case((base, factor), (factor,))


def _quantized(m: Maker) -> tuple[Any, ...]:
    """An NF4 weight (ffn, hidden) with quantized scales: the fields of ``Quantized``."""
    out, into, spread = m.sizes.ffn, m.sizes.hidden, m.sizes.hidden**-0.5
    blocks = -(-out * into // 64)
    codes, scales = (
        torch.randint(256, s, dtype=torch.uint8, device=m.device)
        for s in ((out * into // 2, 1), (blocks,))
    )
    outer = torch.full((-(-blocks // 256),), spread, device=m.device)
    code, offset = torch.linspace(-1, 1, 256, device=m.device), outer[0] * 2
    return (codes, outer, (out, into), 64, "nf4", scales, code, offset)


def _quant_linear(m: Maker) -> Case:
    weight = _quantized(m)
    held = tuple(t for t in weight if isinstance(t, Tensor))
    return Case((m.activation(m.sizes.hidden), weight), held)


def _quant_lora_linear(m: Maker) -> Case:
    case, adapter = _quant_linear(m), _lora_linear(m)
    x, weight = case.args
    linear = adapter.args[1]._replace(weight=weight)
    return Case((x, linear), (*case.parameters, linear.lora_a, linear.lora_b))


def _adapted(m: Maker, *sizes: tuple[int, int]) -> Case:
    """Linears of (out, in) with adapters, as the blocks take them."""
    weights = [m.weight(*s) for s in sizes]
    lora_as = [m.weight(m.shape.rank, inner, trained=True) for _, inner in sizes]
    lora_bs = [m.weight(out, m.shape.rank, trained=True) for out, _ in sizes]
    parts = zip(weights, lora_as, lora_bs, strict=True)
    given = [Linear(w, None, a, b, 2.0) for w, a, b in parts]
    return Case((m.activation(m.sizes.hidden), given), (*weights, *lora_as, *lora_bs))


def _mlp_block(m: Maker) -> Case:
    hidden, ffn = m.sizes.hidden, m.sizes.ffn
    case = _adapted(m, (ffn, hidden), (ffn, hidden), (hidden, ffn))
    return Case((*case.args, "silu"), case.parameters)


def _qkv_block(m: Maker) -> Case:
    heads, dim = (m.sizes.heads, m.sizes.kv_heads, m.sizes.kv_heads), m.sizes.head_dim
    return _adapted(m, *((n * dim, m.sizes.hidden) for n in heads))


def _linear_cross_entropy(m: Maker) -> Case:
    x = m.activation(m.sizes.hidden)
    weight = m.weight(m.sizes.vocab, m.sizes.hidden)
    labels = torch.randint(m.sizes.vocab, x.shape[:-1], device=m.device)
    labels[:, ::2] = -100  # half of the tokens are a prompt, as in a chat
    return Case((x, weight, None, labels), (weight,))


def _linear_logprob(m: Maker) -> Case:
    case = _linear_cross_entropy(m)
    return Case((*case.args, ("logprob", "entropy")), case.parameters)


def _linear_divergence(m: Maker) -> Case:
    x, weight, bias, labels = _linear_cross_entropy(m).args
    teacher = m.weight(m.sizes.vocab, m.sizes.hidden).detach()
    return Case((x, weight, bias, x.detach(), teacher, None, labels), (weight, teacher))


def _attention(m: Maker) -> Case:
    q, k, v = (m.heads(n) for n in (m.sizes.heads, m.sizes.kv_heads, m.sizes.kv_heads))
    return Case((q, k, v, m.sizes.head_dim**-0.5, True))


def _packed_attention(m: Maker) -> Case:
    """Of four samples in each row, as a mask says."""
    q, k, v, scale, _ = _attention(m).args
    order = torch.arange(m.shape.seq, device=m.device)
    sample = order * 4 // m.shape.seq
    mask = (sample[:, None] == sample[None]) & (order[:, None] >= order[None])
    return Case((q, k, v, scale, False, mask[None, None]))


def _decode_attention(m: Maker) -> Case:
    q, k, v = (t.detach() for t in _attention(m).args[:3])
    return Case((q[:, :, -1:], k, v, m.sizes.head_dim**-0.5))


def _selective_scan(m: Maker) -> Case:
    channels, states = m.sizes.hidden, 16
    wide = (m.activation(channels).detach().transpose(1, 2).requires_grad_() for _ in range(3))
    narrow = (m.activation(states).detach().transpose(1, 2).requires_grad_() for _ in range(2))
    u, delta, gate = wide
    decays = (-0.5 - m.weight(channels, states).detach().float().abs()).requires_grad_()
    skip, bias = m.weight(channels), m.weight(channels)
    return Case((u, delta, decays, *narrow, skip, gate, bias, True), (decays, skip, bias))


def _ssd(m: Maker) -> Case:
    heads, features, states = m.sizes.heads, m.sizes.head_dim, 64
    x, dt = m.activation(heads, features), m.activation(heads)
    b, c = m.activation(1, states), m.activation(1, states)
    decays = (-0.5 - m.weight(heads).detach().float().abs()).requires_grad_()
    skip, bias = m.weight(heads), m.weight(heads)
    return Case((x, dt, decays, b, c, skip, bias, True), (decays, skip, bias))


def _moe_experts(m: Maker) -> Case:
    experts, active, inner = 8, 2, m.sizes.ffn // 2
    x = m.activation(m.sizes.hidden).detach().flatten(0, 1).requires_grad_()
    score = torch.rand(len(x), experts, device=m.device)
    weights, index = score.topk(active)
    up, down = m.weight(experts, inner, m.sizes.hidden), m.weight(experts, m.sizes.hidden, inner)
    return Case((x, index, weights.requires_grad_(), up.mT, down.mT, F.silu), (up, down))


def _moe_up(m: Maker) -> Case:
    x, index, _, up, _, _ = _moe_experts(m).args
    return Case((x, up, None, *moe_route(index.reshape(-1), len(up)), index.shape[1]), (up,))


def _moe_down(m: Maker) -> Case:
    _, index, weights, up, down, _ = _moe_experts(m).args
    routing, wanted = moe_route(index.reshape(-1), len(up)), weights.detach().reshape(-1)
    h = torch.randn(index.numel(), down.shape[1], device=m.device, dtype=m.dtype)
    case = (h.requires_grad_(), wanted.requires_grad_(), down, None, *routing, index.shape[1])
    return Case(case, (down,))


CASES: dict[str, Callable[[Maker], Case]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_linear": _rms_norm_linear,
    "rope": _rope,
    "glu": _glu,
    "glu_packed": _glu_packed,
    "lora_linear": _lora_linear,
    "dora_row_norms": _dora_row_norms,
    "dora": _dora,
    "quant_linear": _quant_linear,
    "quant_lora_linear": _quant_lora_linear,
    "mlp_block": _mlp_block,
    "qkv_block": _qkv_block,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_logprob": _linear_logprob,
    "linear_divergence": _linear_divergence,
    "attention": _attention,
    "attention-packed": _packed_attention,
    "decode_attention": _decode_attention,
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "moe_experts": _moe_experts,
    "moe_up": _moe_up,
    "moe_down": _moe_down,
}
"""How to call each op, by the op's name; after a dash, what is special about the call."""


def op_of(case: str) -> str:
    """The name of the op that a case is of."""
    return case.partition("-")[0]
