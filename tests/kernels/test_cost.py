"""What a call costs: counted without running it, equal to what happens when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from fusewright.kernels.attention import attention, rope
from fusewright.kernels.cost import cost
from fusewright.kernels.launch import library_op
from fusewright.kernels.linear import dora, quant_linear
from fusewright.kernels.loss import linear_cross_entropy, linear_divergence, linear_logprob
from fusewright.kernels.mlp import glu, mlp_block
from fusewright.kernels.moe import moe_experts
from fusewright.kernels.norms import add_rms_norm, layer_norm, rms_norm, rms_norm_linear
from fusewright.kernels.op import Op
from fusewright.kernels.scan import selective_scan, ssd

from .by_parts import LORA, MLP, QKV, QUANT_LORA
from .quantized_weights import random_weight

BF16 = torch.bfloat16
ROWS, WIDE, OUT, RANK = 35, 64, 48, 4


def _x(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _w(*shape: int, dtype: torch.dtype = BF16) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape).to(dtype))


def _lora(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return _w(RANK, WIDE, dtype=dtype), _w(OUT, RANK, dtype=dtype), 2.0


def _linears(*outs: int, into: int = WIDE) -> tuple[list[Any], ...]:
    """Weights, biases, A's, B's, scales and biases of B."""
    weights, each = [_w(out, into) for out in outs], len(outs)
    lora_as = [_w(RANK, into, dtype=torch.float32) for _ in outs]
    lora_bs = [_w(out, RANK, dtype=torch.float32) for out in outs]
    return weights, [None] * each, lora_as, lora_bs, [2.0] * each, [None] * each


def _mlp() -> tuple[list[Any], ...]:
    ins, down = _linears(OUT, OUT), _linears(WIDE, into=OUT)
    return tuple(a + b for a, b in zip(ins, down, strict=True))


def _silu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return nn.functional.silu(gate) * up


def _experts() -> tuple[Any, ...]:
    index = torch.randint(0, 3, (ROWS, 2))
    weights = torch.rand(ROWS, 2, dtype=torch.float32)
    return _x(ROWS, 8), index, weights, _w(3, 8, 12), _w(3, 6, 8), _silu


def _scan() -> tuple[Any, ...]:
    u, delta = _x(2, 6, 40), _x(2, 6, 40)
    return u, delta, _w(6, 4, dtype=torch.float32), _x(2, 4, 40), _x(2, 4, 40)


def _ssd() -> tuple[Any, ...]:
    a = nn.Parameter(-torch.rand(4))
    return _x(2, 70, 4, 8), _x(2, 70, 4), a, _x(2, 70, 2, 16), _x(2, 70, 2, 16)


CASES: dict[str, tuple[Op, Callable[[], tuple[Any, ...]]]] = {
    "rms_norm": (rms_norm.OP, lambda: (_x(5, 7, WIDE), _w(WIDE), 1e-6)),
    "add_rms_norm": (add_rms_norm.OP, lambda: (_x(ROWS, 8), _x(ROWS, 8), _w(8), 1e-6)),
    "layer_norm": (layer_norm.OP, lambda: (_x(ROWS, 8), _w(8), _w(8), 1e-6)),
    "rms_norm_linear": (
        rms_norm_linear.OP,
        lambda: (_x(5, 7, 8), _w(8), 1e-6, 0.0, "inner", [_w(9, 8), _w(4, 8)], [None, _w(4)]),
    ),
    "rope": (
        rope.OP,
        lambda: ((_x(2, 4, 5, 16), _x(2, 2, 5, 16)), *torch.randn(2, 1, 1, 5, 16).unbind(), 16),
    ),
    "attention": (
        attention.OP,
        lambda: (_x(1, 2, 4, 8), _x(1, 1, 4, 8), _x(1, 1, 4, 8), None, False),
    ),
    "glu": (glu.OP, lambda: (_x(ROWS, 8), _x(ROWS, 8), "silu")),
    "glu_packed": (glu.OP_PACKED, lambda: (_x(ROWS, 16), "gelu", False)),
    "lora_linear": (LORA, lambda: (_x(ROWS, WIDE), _w(OUT, WIDE), _w(OUT), *_lora(BF16))),
    "lora_linear, fp32": (LORA, lambda: (_x(ROWS, WIDE), _w(OUT, WIDE), None, *_lora())),
    "quant_linear": (quant_linear.OP, lambda: (_x(ROWS, WIDE), random_weight((OUT, WIDE)), None)),
    "quant_lora_linear": (
        QUANT_LORA,
        lambda: (_x(ROWS, WIDE), random_weight((OUT, WIDE), nested=True), None, *_lora()),
    ),
    "qkv_block": (QKV, lambda: (_x(ROWS, WIDE), *_linears(OUT, 8), "all")),
    "qkv_block, x alone": (QKV, lambda: (_x(ROWS, WIDE), *_linears(OUT, 8), "input")),
    "mlp_block": (MLP, lambda: (_x(ROWS, WIDE), *_mlp(), "silu", "two", "gate_up")),
    "mlp_block, x alone": (MLP, lambda: (_x(ROWS, WIDE), *_mlp(), "silu", "two", "input")),
    "dora": (dora.OP, lambda: (_x(4, 6), _w(6))),
    "moe_experts": (moe_experts.OP, _experts),
    "linear_cross_entropy": (
        linear_cross_entropy.OP,
        lambda: (_x(ROWS, 16), _w(50, 16), None, torch.randint(0, 50, (ROWS,))),
    ),
    "linear_logprob": (
        linear_logprob.OP,
        lambda: (
            _x(ROWS, 16),
            _w(50, 16),
            None,
            torch.randint(0, 50, (ROWS,)),
            ("logprob", "argmax"),
        ),
    ),
    "linear_divergence": (
        linear_divergence.OP,
        lambda: (
            _x(ROWS, 16),
            _w(50, 16),
            None,
            _x(ROWS, 8).detach(),
            _w(50, 8).requires_grad_(False),
            None,
        ),
    ),
    "selective_scan": (selective_scan.OP, _scan),
    "ssd": (ssd.OP, _ssd),
}


def _saved(call: Callable[[], Any], parameters: list[Tensor]) -> int:
    """Bytes of the memories that a real call keeps for backward, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive = call()
    del alive
    return sum(kept.values())


@pytest.mark.parametrize("name", CASES)
def test_the_cost_is_what_happens(name: str) -> None:
    op, make = CASES[name]
    args = make()
    given = [t for t in tree_iter(args) if isinstance(t, Tensor)]
    found = op.cost(*args)
    parameters = [t for t in given if isinstance(t, nn.Parameter)]
    assert found.bytes_saved == _saved(lambda: op.call(*args), parameters) > 0
    assert found.bytes_read == sum(t.nbytes for t in given)
    with FlopCounterMode(display=False) as counter:
        out = op.call(*args)
    assert found.bytes_written == sum(t.nbytes for t in tree_iter(out))
    assert found.flops == counter.get_total_flops()


@pytest.mark.parametrize("name", CASES)
def test_the_flops_are_those_of_the_formula(name: str) -> None:
    """Forward's products are those of the reference, but for the ops named here."""
    op, make = CASES[name]
    args = make()
    with FlopCounterMode(display=False) as counter:
        op.reference(*args)
    expected = counter.get_total_flops()
    if name == "linear_cross_entropy":  # and the gradients of x and of the head
        expected *= 3
    elif name == "attention":  # PyTorch's counter does not know its kernel for the CPU
        expected = 2 * 2 * 16 * (8 + 8)
    elif name == "selective_scan":  # no products: 15 for each state of each step
        expected = 15 * args[0].numel() * 4
    elif name == "ssd":  # other chunks than the reference's
        expected = 2 * 70 * 4 * (2 * ssd.CHUNK * (16 + 8) + 4 * 16 * 8)
    assert op.cost(*args).flops == expected


def test_attention_counts_the_scores_that_are_seen() -> None:
    q, k, v = _x(1, 2, 4, 8), _x(1, 1, 4, 8), _x(1, 1, 4, 8)
    seen = {
        "all": (16, attention.OP.cost(q, k, v, None, False)),
        "causal": (10, attention.OP.cost(q, k, v, None, True)),
        "window": (4, attention.OP.cost(q, k, v, None, True, None, 1)),
    }
    for pairs, found in seen.values():
        assert found.flops == 2 * 2 * pairs * 16


@pytest.mark.parametrize("name", ["lora_linear", "quant_linear", "moe_experts", "attention"])
def test_backward_counts_as_much_as_pytorch_does(name: str) -> None:
    op, make = CASES[name]
    args = make()
    if name == "attention":  # as many heads: the reference repeats none
        args = _x(1, 2, 4, 8), _x(1, 2, 4, 8), _x(1, 2, 4, 8), None, False
    totals = []
    for run in (op.call, op.reference):
        with FlopCounterMode(display=False) as counter:
            run(*args).sum().backward()
        totals.append(counter.get_total_flops())
    ours, reference = totals
    if name == "attention":  # the scores again: five products for forward's two
        forward = op.cost(*args).flops
        assert ours == forward + 2.5 * forward
    else:
        assert ours == reference


def test_parameters_are_not_kept_and_one_tensor_counts_once() -> None:
    x, w = _x(ROWS, WIDE), _w(OUT, WIDE)
    found = cost(nn.functional.linear, x, w)
    assert (found.bytes_saved, found.bytes_read) == (x.nbytes, x.nbytes + w.nbytes)
    assert cost(torch.mul, x, x).bytes_read == x.nbytes
    frozen = w.detach()
    assert cost(nn.functional.linear, x, frozen).bytes_saved == frozen.nbytes


def test_tensors_on_the_meta_device_will_do() -> None:
    x, w = (t.detach().to("meta") for t in (_x(ROWS, WIDE), _w(OUT, WIDE)))
    assert cost(nn.functional.linear, x, w).flops == 2 * ROWS * WIDE * OUT


def test_an_opaque_op_may_take_arguments_by_name() -> None:
    op = library_op(
        "tests_scaled(Tensor x, *, float scale) -> Tensor",
        lambda x, scale: x * scale,
        lambda x, scale: torch.empty_like(x),
        flops=lambda x, scale: x.numel(),
    )
    assert cost(op, _x(5, 7), scale=2.0).flops == 35


WEIGHT, ADAPTER, FROZEN = (True, False, False, False), (False, False, True, True), (False,) * 4


@pytest.mark.parametrize("from_above", [True, False], ids=["gradient of x", "no gradient of x"])
@pytest.mark.parametrize(
    ("adapted", "ins", "down"),
    [
        (False, WEIGHT, WEIGHT),
        (False, FROZEN, WEIGHT),
        (False, WEIGHT, FROZEN),
        (True, ADAPTER, ADAPTER),
        (True, FROZEN, ADAPTER),
        (True, ADAPTER, FROZEN),
        (True, (True, False, True, True), WEIGHT),
    ],
)
def test_operations_of_tiles(
    adapted: bool, ins: tuple[bool, ...], down: tuple[bool, ...], from_above: bool
) -> None:
    """Counted by a formula as many as their products make."""
    tensors: list[Tensor | None] = []
    for out, into in ((OUT, WIDE), (OUT, WIDE), (WIDE, OUT)):
        pair = [torch.randn(RANK, into), torch.randn(out, RANK)] if adapted else [None, None]
        tensors += [torch.randn(out, into), None, *pair]
    x, grad, scales = torch.randn(ROWS, WIDE), torch.randn(ROWS, WIDE), [2.0] * 3
    needed = [from_above, *ins, *ins, *down]
    tiled = (tensors, scales, [], [], "silu", "two")
    with FlopCounterMode(display=False) as counted:
        mlp_block._tiled_forward(x, *tiled)
    assert mlp_block._forward_flops(x, *tiled) == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        mlp_block._tiled_backward(grad, x, *tiled, needed)
    assert mlp_block._backward_flops(grad, x, *tiled, needed) == counted.get_total_flops()
