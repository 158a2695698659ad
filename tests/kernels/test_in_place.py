"""Model code may add to an op's output in place, as it may to eager's (Falcon does)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusewright.passes.ops import TABLE


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


CALLS: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
    "rms_norm": lambda: TABLE["rms_norm"](_x(2, 3, 16), _x(16), 1e-6),
    "layer_norm": lambda: TABLE["layer_norm"](_x(2, 3, 16), _x(16), _x(16), 1e-6),
    "layer_norm, by heads": lambda: TABLE["layer_norm"](_x(2, 3, 16), _x(3, 16), None, 1e-6),
    "add_rms_norm": lambda: TABLE["add_rms_norm"](_x(2, 3, 16), _x(2, 3, 16), _x(16), 1e-6)[1],
    "rms_norm_linear": lambda: TABLE["rms_norm_linear"](
        _x(2, 3, 16), _x(16), 1e-6, 0.0, "inner", [_x(8, 16), _x(4, 16)], [None, None]
    ),
    "rope": lambda: TABLE["rope"](
        [_x(2, 4, 3, 8), _x(2, 2, 3, 8)], torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 8), 8
    ),
    "glu": lambda: TABLE["glu"](_x(2, 3, 8), _x(2, 3, 8), "silu"),
    "glu_packed": lambda: TABLE["glu_packed"](_x(2, 3, 16), "silu"),
    "lora_linear": lambda: TABLE["lora_linear"](
        _x(2, 3, 16), _x(8, 16), None, _x(2, 16), _x(8, 2), 2.0
    ),
    "linear_cross_entropy": lambda: TABLE["linear_cross_entropy"](
        _x(6, 16), _x(32, 16), None, torch.randint(0, 32, (6,))
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_outputs_may_be_written_to(name: str) -> None:
    outputs = CALLS[name]()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(o.add_(1).sum() for o in outputs).backward()
