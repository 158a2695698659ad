"""Model code may add to an op's output in place, as it may to eager's (Falcon does)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusewright.kernels.linear.linears import Linear
from fusewright.rewrite.op_table import OF_CALL, TABLE

from .quantized_weights import random_weight

Call = Callable[[], "Tensor | tuple[Tensor, ...]"]


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def _linears(op: str, *extra: object, out: tuple[int, ...] = (8, 4)) -> Call:
    """A call of a block of linears, with biases and adapters."""

    def call() -> tuple[Tensor, ...]:
        weights, biases = [_x(n, 16) for n in out], [_x(n) for n in out]
        lora_as, lora_bs = [_x(2, 16) for _ in out], [_x(n, 2) for n in out]
        parts = zip(weights, biases, lora_as, lora_bs, strict=True)
        return TABLE[op](_x(2, 3, 16), [Linear(*one, 2.0) for one in parts], *extra)

    return call


CALLS: dict[str, Call] = {
    "rms_norm": lambda: TABLE["rms_norm"](_x(2, 3, 16), _x(16), 1e-6),
    "layer_norm": lambda: TABLE["layer_norm"](_x(2, 3, 16), _x(16), _x(16), 1e-6),
    "layer_norm, by heads": lambda: TABLE["layer_norm"](_x(2, 3, 16), _x(3, 16), None, 1e-6),
    "add_rms_norm": lambda: TABLE["add_rms_norm"](_x(2, 3, 16), _x(2, 3, 16), _x(16), 1e-6),
    "rms_norm_linear": lambda: TABLE["rms_norm_linear"](
        _x(2, 3, 16), _x(16), 1e-6, 0.0, "inner", [_x(8, 16), _x(4, 16)], [None, None]
    ),
    "rms_norm_linear, bias": lambda: TABLE["rms_norm_linear"](
        _x(2, 3, 16), _x(16), 1e-6, 0.0, "inner", [_x(8, 16), _x(4, 16)], [_x(8), _x(4)]
    ),
    "rms_norm_linear, of rows": lambda: TABLE["rms_norm_linear"](
        _x(3, 16), _x(16), 1e-6, 0.0, "inner", [_x(8, 16), _x(4, 16)], [_x(8), _x(4)]
    ),
    "rope": lambda: TABLE["rope"](
        [_x(2, 4, 3, 8), _x(2, 2, 3, 8)], torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 8), 8
    ),
    "rope, in part": lambda: TABLE["rope"](
        [_x(2, 4, 3, 8), _x(2, 2, 3, 8)], torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), 4
    ),
    "glu": lambda: TABLE["glu"](_x(2, 3, 8), _x(2, 3, 8), "silu"),
    "glu_packed": lambda: TABLE["glu_packed"](_x(2, 3, 16), "silu"),
    "lora_linear": lambda: TABLE["lora_linear"](
        _x(2, 3, 16), Linear(_x(8, 16), None, _x(2, 16), _x(8, 2), 2.0)
    ),
    "lora_linear, bias": lambda: TABLE["lora_linear"](
        _x(2, 3, 16), Linear(_x(8, 16), _x(8), _x(2, 16), _x(8, 2), 2.0)
    ),
    "dora": lambda: TABLE["dora"](_x(2, 3, 8), _x(8)),
    "dora, bias": lambda: TABLE["dora"](_x(2, 3, 8), _x(8), _x(8)),
    "dora, update": lambda: TABLE["dora"](_x(2, 3, 8), _x(8), _x(2, 3, 8), _x(2, 3, 8), 2.0),
    "quant_linear": lambda: TABLE["quant_linear"](_x(2, 3, 16), random_weight((8, 16)), _x(8)),
    "quant_lora_linear": lambda: TABLE["quant_lora_linear"](
        _x(2, 3, 16), Linear(random_weight((8, 16)), _x(8), _x(2, 16), _x(8, 2), 2.0)
    ),
    "qkv_block": _linears("qkv_block"),
    "mlp_block": _linears("mlp_block", "silu", out=(16, 16, 16)),
    "mlp_block, in tiles": _linears("mlp_block", "silu", "two", "input", out=(16, 16, 16)),
    "attention": lambda: TABLE["attention"](
        _x(2, 4, 3, 8), _x(2, 2, 3, 8), _x(2, 2, 3, 8), None, True
    ),
    "linear_cross_entropy": lambda: TABLE["linear_cross_entropy"](
        _x(6, 16), _x(32, 16), None, torch.randint(0, 32, (6,))
    ),
    "linear_logprob": lambda: TABLE["linear_logprob"](
        _x(2, 3, 16), _x(32, 16), None, torch.randint(0, 32, (2, 3)), ("logprob", "topk_values"), 2
    ),
    "linear_logprob, frozen": lambda: TABLE["linear_logprob"](
        _x(6, 16), _x(32, 16).detach(), None, torch.randint(0, 32, (6,)), ("logprob", "entropy")
    ),
    "linear_divergence": lambda: TABLE["linear_divergence"](
        _x(2, 3, 16), _x(32, 16), None, _x(2, 3, 8), _x(32, 8), None
    ),
    "linear_divergence, frozen": lambda: TABLE["linear_divergence"](
        _x(6, 16), _x(32, 16).detach(), None, _x(6, 8), _x(32, 8), None
    ),
    "selective_scan": lambda: TABLE["selective_scan"](
        _x(2, 4, 5), _x(2, 4, 5), -torch.rand(4, 3), _x(2, 3, 5), _x(2, 3, 5), _x(4), _x(2, 4, 5)
    ),
    "ssd": lambda: TABLE["ssd"](
        _x(2, 5, 2, 4), torch.rand(2, 5, 2), -torch.rand(2), _x(2, 5, 1, 3), _x(2, 5, 1, 3), _x(2)
    ),
    "moe_up": lambda: TABLE["moe_up"](_x(3, 8), _x(2, 8, 5), None, *_route(), 2),
    "moe_down": lambda: TABLE["moe_down"](_x(6, 5), _x(6), _x(2, 5, 8), None, *_route(), 2),
}


def _route() -> tuple[Tensor, ...]:
    """Three tokens, each with both of two experts."""
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    return order, torch.tensor([0, 3, 1, 4, 2, 5]), torch.tensor([3, 6], dtype=torch.int32)


def _outputs(name: str) -> list[Tensor]:
    made = CALLS[name]()
    return [made] if isinstance(made, Tensor) else list(made)


@pytest.mark.parametrize("name", CALLS)
def test_outputs_may_be_written_to(name: str) -> None:
    for i in range(len(_outputs(name))):
        outputs = _outputs(name)
        if i not in OF_CALL[TABLE[name.split(",")[0]]].kept_outputs:  # those, the engine copies
            outputs[i].mul_(2)
        sum(o.sum() for o in outputs).backward()


@pytest.mark.parametrize("name", CALLS)
def test_a_write_into_one_output_changes_no_other(name: str) -> None:
    with torch.no_grad():
        outputs = _outputs(name)
        for i, written in enumerate(outputs):
            others = [o.clone() for o in outputs]
            written.add_(1)
            for j, (other, before) in enumerate(zip(outputs, others, strict=True)):
                assert i == j or torch.equal(other, before)


@pytest.mark.parametrize("name", CALLS)
def test_outputs_that_are_kept_are_known(name: str) -> None:
    kept: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = _outputs(name)
    found = [i for i, o in enumerate(outputs) if o.untyped_storage().data_ptr() in kept]
    known = list(OF_CALL[TABLE[name.split(",")[0]]].kept_outputs)
    assert found == ([] if name == "attention" else known)  # that one's, where Triton runs it


def test_every_op_is_tried() -> None:
    """But those whose results have no gradient."""
    without = {"dora_row_norms"}
    assert {name.split(",")[0] for name in CALLS} == set(TABLE) - without
