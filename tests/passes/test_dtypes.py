"""Formulas whose parts are of several dtypes, by casts that are written out or by autocast's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.graph.canon import canonical
from fusewright.graph.cleanup import remove_noops

from ..capturing import capture, rewrite, rewritten

BF16, F32 = torch.bfloat16, torch.float32


def _draw(*size: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*size).to(dtype).requires_grad_()


def _norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize(("a", "b"), [(F32, BF16), (BF16, F32)])
def test_a_residual_of_more_bits_than_what_is_added(a: torch.dtype, b: torch.dtype) -> None:
    def fn(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return total, _norm(total, w)

    graph = capture(fn, _draw(2, 5, 16, dtype=a), _draw(2, 5, 16, dtype=b), _draw(16))
    assert rewritten(rewrite(graph)) == ["add_rms_norm", "rms_norm"]


def _wide_rms(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


def _narrow_rms(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (w.float() * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(BF16)


def _wide_layer_norm(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x.float(), (16,), w.float(), None, 1e-5)


def _narrow_layer_norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    n = (h - h.mean(-1, keepdim=True)) * torch.rsqrt(h.var(-1, keepdim=True, correction=0) + 1e-5)
    return (w.float() * n).to(BF16)


@pytest.mark.parametrize(
    ("fn", "given", "returned"),
    [
        (_wide_rms, BF16, F32), (_narrow_rms, F32, BF16),
        (_wide_layer_norm, BF16, F32), (_narrow_layer_norm, F32, BF16),
    ],
)  # fmt: skip
def test_a_norm_that_returns_another_dtype(
    fn: Callable[..., Tensor], given: torch.dtype, returned: torch.dtype
) -> None:
    x, w = _draw(2, 5, 16, dtype=given), _draw(16)
    assert fn(x, w).dtype is returned
    graph = capture(fn, x, w)
    assert rewritten(rewrite(graph)) == ["layer_norm" if "layer" in fn.__name__ else "rms_norm"]


@pytest.mark.parametrize(("gate", "up"), [(BF16, F32), (F32, BF16)])
def test_a_gate_and_its_other_side_in_two_dtypes(gate: torch.dtype, up: torch.dtype) -> None:
    graph = capture(
        lambda g, u: F.silu(g) * u, _draw(2, 5, 12, dtype=gate), _draw(2, 5, 12, dtype=up)
    )
    assert rewritten(rewrite(graph)) == ["glu"]


def test_attention_as_autocast_casts_it(choose_for: Callable[[str], None]) -> None:
    """Rotated queries and keys are in fp32, the values in bf16."""
    choose_for("avx512_bf16")
    q, k, v = _draw(2, 4, 6, 16), _draw(2, 2, 6, 16), _draw(2, 2, 6, 16, dtype=BF16)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    with torch.autocast("cpu", BF16):
        findings = rewrite(capture(fn, q, k, v))
    assert rewritten(findings) == ["attention"], findings


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A base in fewer bits than its input and its adapter, as fp32 norms leave it."""
    return F.linear(x.to(w.dtype), w).to(x.dtype) + F.linear(F.linear(x, a), b) * 2.0


def test_an_adapter_over_a_base_that_casts_there_and_back() -> None:
    shapes = ((2, 5, 32), (16, 32), (4, 32), (16, 4))
    x, w, a, b = (torch.randn(*s, requires_grad=i != 1) for i, s in enumerate(shapes))
    graph = capture(_lora, x, w.to(BF16), a, b)
    assert rewritten(rewrite(graph)) == ["lora_linear"]


def test_casts_to_fewer_bits_are_not_merged_where_their_gradients_are_added_up() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(BF16) * 2, x.to(BF16) * 3

    for grad, left in ((True, 2), (False, 1)):
        graph = capture(fn, torch.randn(4, 8, requires_grad=grad))
        remove_noops(graph)
        casts = [n for n in graph.graph.nodes if (c := canonical(n)) and c.name == "cast"]
        assert len(casts) == left
    graph = capture(lambda x: (x.float() * 2, x.float() * 3), _draw(4, 8, dtype=BF16))
    assert remove_noops(graph) == 1


def test_a_head_that_autocast_casts() -> None:
    """The head is in fp32, as PEFT trains a copy of it, and the rows are not."""
    h, w, target = _draw(10, 8, dtype=BF16), _draw(50, 8), torch.randint(0, 50, (10,))

    def fn(h: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).float(), target)

    with torch.autocast("cpu", BF16):
        findings = rewrite(capture(fn, h, w, target))
    assert rewritten(findings) == ["linear_cross_entropy"], findings
