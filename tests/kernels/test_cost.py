"""What a call costs: counted without running it, equal to what happens when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from fusewright.kernels.attention import attention
from fusewright.kernels.cost import _formula, cost
from fusewright.kernels.launch import library_op
from fusewright.kernels.mlp import mlp_block
from fusewright.kernels.op import Maker
from fusewright.kernels.scan import ssd

from .calls import CASES, ODD
from .util import saved_tensors

BF16 = torch.bfloat16
ROWS, WIDE, OUT, RANK = 35, 64, 48, 4


def _x(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def _w(*shape: int, dtype: torch.dtype = BF16) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape).to(dtype))


def _args(name: str) -> tuple[Any, ...]:
    """The arguments of an op's example, the weights being parameters."""
    generator = torch.Generator().manual_seed(0)
    maker = Maker(BF16, sizes=ODD, adapters=torch.float32, generator=generator)
    return CASES[name].example(maker)


def _saved(call: Callable[[], Any], parameters: list[Tensor]) -> int:
    """Bytes of the memories that a real call keeps for backward, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    with saved_tensors() as saved:
        call()
    kept = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}
    return sum(size for place, size in kept.items() if place not in known)


# PyTorch's own kernel takes a plain layer norm, and no fake tensors
@pytest.mark.parametrize("name", [name for name in CASES if name != "layer_norm-plain"])
def test_the_cost_is_what_happens(name: str) -> None:
    op, args = CASES[name].op, _args(name)
    given = [t for t in tree_iter(args) if isinstance(t, Tensor)]
    found = op.cost(*args)
    parameters = [t for t in given if isinstance(t, nn.Parameter)]
    assert found.bytes_saved == _saved(lambda: op.call(*args), parameters)
    assert (found.bytes_saved > 0) is any(t.requires_grad for t in given)
    assert found.bytes_read == sum(t.nbytes for t in given)
    with FlopCounterMode(display=False) as counter:
        out = op.call(*args)
    assert found.bytes_written == sum(t.nbytes for t in tree_iter(out))
    assert found.flops == counter.get_total_flops()


def _counted_otherwise(name: str, flops: int) -> int | None:
    """What the ops count whose products are not those of their reference; None if not tested."""
    s = ODD
    match CASES[name].op.name:
        case "linear_cross_entropy":  # and the gradients of x and of the head
            return 3 * flops
        case "selective_scan":  # no products: 15 for each state of each step
            return 15 * s.batch * s.seq * s.hidden * s.states
        case "ssd":  # other chunks than the reference's
            features, states = s.head_dim, 4 * s.states
            of_step = 2 * ssd.CHUNK * (states + features) + 4 * states * features
            return s.batch * s.seq * s.heads * of_step
        case "moe_experts" | "moe_up" | "moe_down" as op if name.endswith("lora"):
            # thin products of rows, where the reference makes the sum of the stacks
            hidden, inner, rank, rows = s.hidden, s.inner // 2, 4, 2 * s.batch * s.seq
            thin = 2 * rank * (rows * (hidden + inner) - s.experts * hidden * inner)
            return flops + thin * (2 if op == "moe_experts" else 1)
        case "gated_delta_rule" | "kda":
            features, values = s.head_dim, s.rank
            of_step = ssd.CHUNK * (4 * features + 3 * values) + 6 * features * values
            return s.batch * s.seq * s.heads * of_step
        case "attention" | "segment_attention" | "dora_row_norms":
            return None  # PyTorch's counter does not know its kernels for the CPU; tiles
    return flops


@pytest.mark.parametrize("name", CASES)
def test_the_flops_are_those_of_the_formula(name: str) -> None:
    """Forward's products are those of the reference."""
    op, args = CASES[name].op, _args(name)
    with FlopCounterMode(display=False) as counter:
        op.reference(*args)
    expected = _counted_otherwise(name, counter.get_total_flops())
    assert expected is None or op.cost(*args).flops == expected


def test_attention_counts_the_scores_that_are_seen() -> None:
    q, k, v = _x(1, 2, 4, 8), _x(1, 1, 4, 8), _x(1, 1, 4, 8)
    seen = {
        "all": (16, attention.OP.cost(q, k, v, None, False)),
        "causal": (10, attention.OP.cost(q, k, v, None, True)),
        "window": (4, attention.OP.cost(q, k, v, None, True, None, 1)),
    }
    for pairs, found in seen.values():
        assert found.flops == 2 * 2 * pairs * 16


@pytest.mark.parametrize("kind", ["flash", "efficient", "cudnn"])
def test_heads_of_keys_that_several_of_queries_share_count_for_each(kind: str) -> None:
    """PyTorch 2.11's own formula refuses them."""
    q, k = torch.empty(2, 8, 5, 16), torch.empty(2, 2, 7, 16)
    for tail, tensors in (("", (q, k, k)), ("_backward", (q, q, k, k))):
        packet = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}_attention{tail}")
        formula = _formula(packet)
        whole = [t if t is q else k.repeat_interleave(4, 1) for t in tensors]
        assert formula(*tensors, out_val=q) == formula(*whole, out_val=q) > 0


@pytest.mark.parametrize("name", ["lora_linear", "quant_linear", "moe_experts", "attention"])
def test_backward_counts_as_much_as_pytorch_does(name: str) -> None:
    op, args = CASES[name].op, _args(name)
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


NOTHING_ELSE = (False, False)  # neither a bias of B nor an input of the adapter's own
WEIGHT = (True, False, False, False, *NOTHING_ELSE)
ADAPTER = (False, False, True, True, *NOTHING_ELSE)
FROZEN = (False,) * 6


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
        (True, (True, False, True, True, *NOTHING_ELSE), WEIGHT),
    ],
)
def test_operations_of_tiles(
    adapted: bool, ins: tuple[bool, ...], down: tuple[bool, ...], from_above: bool
) -> None:
    """Counted by a formula as many as their products make."""
    tensors: list[Tensor | None] = []
    for out, into in ((OUT, WIDE), (OUT, WIDE), (WIDE, OUT)):
        pair = [torch.randn(RANK, into), torch.randn(out, RANK)] if adapted else [None, None]
        tensors += [torch.randn(out, into), None, *pair, None, None]
    x, grad, scales = torch.randn(ROWS, WIDE), torch.randn(ROWS, WIDE), [2.0] * 3
    needed = [from_above, *ins, *ins, *down]
    tiled = (tensors, scales, [], [], None, None, "silu", "two")
    backward = (grad, x, needed, x.dtype, *tiled)
    with FlopCounterMode(display=False) as counted:
        mlp_block._tiled_forward(x, *tiled)
    assert mlp_block._forward_flops(x, *tiled) == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        mlp_block._tiled_backward(*backward)
    assert mlp_block._backward_flops(*backward) == counted.get_total_flops()
