"""Gated MLPs and linears on one input: joined, and left alone where they are something else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusewright.rewrite.findings import Finding

from ..capturing import capture, rewrite, rewritten

D, WIDE, RANK = 24, 40, 4
Fn = Callable[..., object]


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, D, dtype=dtype, requires_grad=True)


def _weights(
    *sizes: tuple[int, int], dtype: torch.dtype = torch.float32, trained: bool = False
) -> list[Tensor]:
    return [(torch.randn(*s) / s[1] ** 0.5).to(dtype).requires_grad_(trained) for s in sizes]


def _adapter(out: int, inner: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return _weights((RANK, inner), (out, RANK), dtype=dtype, trained=True)


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, *bias: Tensor, drop: float = 0.0) -> Tensor:
    inner = F.dropout(x, drop) if drop else x
    update = F.linear(F.linear(inner.to(a.dtype), a), b, *bias[1:]) * 2.0
    return (F.linear(x, w, *bias[:1]) + update).to(x.dtype)


def _mlp(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)


def _found(fn: Fn, *inputs: Tensor) -> tuple[Counter[str], list[Finding], fx.GraphModule]:
    graph = capture(fn, *inputs)
    findings = rewrite(graph)
    return Counter(rewritten(findings)), findings, graph


def _kept(graph: fx.GraphModule) -> list[object]:
    """What the blocks of a graph are told to keep."""
    return [n.kwargs["keep"] for n in graph.graph.nodes if "keep" in n.kwargs]


MLPS: dict[str, Fn] = {
    "silu": _mlp,
    "commuted": lambda x, g, u, d: F.linear(F.linear(x, u) * F.silu(F.linear(x, g)), d),
    "gelu": lambda x, g, u, d: F.linear(F.gelu(F.linear(x, g)) * F.linear(x, u), d),
    "matmuls": lambda x, g, u, d: (F.silu(x @ g.T) * (x @ u.T)) @ d.T,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", MLPS)
def test_gated_mlps(name: str, trained: bool, dtype: torch.dtype) -> None:
    weights = _weights((WIDE, D), (WIDE, D), (D, WIDE), dtype=dtype, trained=trained)
    counts, _, graph = _found(MLPS[name], _x(dtype), *weights)
    assert counts == {"glu": 1, "mlp_block": 1}
    assert _kept(graph) == ["gate_up"]
    assert len([n for n in graph.graph.nodes if n.op.startswith("call")]) == 1


@pytest.mark.parametrize("gate_first", [True, False])
def test_a_packed_gate_and_up(gate_first: bool) -> None:
    def fn(x: Tensor, both: Tensor, d: Tensor) -> Tensor:
        a, b = F.linear(x, both).chunk(2, dim=-1)
        return F.linear(F.silu(a) * b if gate_first else F.silu(b) * a, d)

    counts, _, graph = _found(fn, _x(), *_weights((2 * WIDE, D), (D, WIDE)))
    assert counts == {"glu": 1, "mlp_block": 1}
    layout = "gate first" if gate_first else "up first"
    assert any(layout in n.args for n in graph.graph.nodes)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_on_all_and_on_some(adapter: torch.dtype) -> None:
    dtype = torch.bfloat16
    g, u, d = _weights((WIDE, D), (WIDE, D), (D, WIDE), dtype=dtype)
    on_gate, on_up, on_down = (
        _adapter(out, inner, adapter) for out, inner in ((WIDE, D), (WIDE, D), (D, WIDE))
    )

    def all_three(x: Tensor, g: Tensor, u: Tensor, d: Tensor, *ab: Tensor) -> Tensor:
        inner = F.silu(_lora(x, g, *ab[:2])) * _lora(x, u, *ab[2:4])
        return _lora(inner, d, *ab[4:])

    counts, _, _ = _found(all_three, _x(dtype), g, u, d, *on_gate, *on_up, *on_down)
    assert counts == {"glu": 1, "lora_linear": 3, "mlp_block": 1}

    def one(x: Tensor, g: Tensor, u: Tensor, d: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, g)) * _lora(x, u, a, b), d)

    counts, _, _ = _found(one, _x(dtype), g, u, d, *on_up)
    assert counts == {"glu": 1, "lora_linear": 1, "mlp_block": 1}


def test_biases_of_base_and_adapter() -> None:
    g, u, d = _weights((WIDE, D), (WIDE, D), (D, WIDE))
    biases = [torch.randn(WIDE, requires_grad=True) for _ in range(3)]

    def fn(x: Tensor, g: Tensor, u: Tensor, d: Tensor, a: Tensor, b: Tensor, *bias: Tensor):
        inner = F.silu(_lora(x, g, a, b, *bias[:2])) * F.linear(x, u, bias[2])
        return F.linear(inner, d)

    counts, _, _ = _found(fn, _x(), g, u, d, *_adapter(WIDE, D), *biases)
    assert counts == {"glu": 1, "lora_linear": 1, "mlp_block": 1}


def test_mlps_that_are_something_else() -> None:
    weights = _weights((WIDE, D), (WIDE, D), (D, WIDE), trained=True)
    x, other = _x(), _x()

    def different_inputs(x: Tensor, y: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, g)) * F.linear(y, u), d)

    assert _found(different_inputs, x, other, *weights)[0] == {"glu": 1}

    def normed(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.silu(F.linear(x, g)) * F.linear(x, u)), d)

    assert _found(normed, x, *weights)[0] == {"glu": 1}

    def no_gate(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, g)), d) + F.linear(F.linear(x, u), d)

    assert "mlp_block" not in _found(no_gate, x, *weights)[0]


def test_a_value_used_outside_leaves_the_parts() -> None:
    def fn(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        up = F.linear(x, u)
        return F.linear(F.silu(F.linear(x, g)) * up, d), up

    counts, findings, _ = _found(fn, _x(), *_weights((WIDE, D), (WIDE, D), (D, WIDE), trained=True))
    assert counts == {"glu": 1}
    assert [f.reason for f in findings if f.rule == "mlp_block"] == [
        "a value inside the MLP is also used outside it"
    ]
    assert all(f.status != "missed" for f in findings)


def test_a_write_in_place_between_refuses() -> None:
    def fn(x: Tensor, g: Tensor, u: Tensor, d: Tensor) -> Tensor:
        y = x * 1.5
        gate = F.linear(y, g)
        y.add_(1)
        return F.linear(F.silu(gate) * F.linear(y, u), d)

    counts, _, _ = _found(fn, _x(), *_weights((WIDE, D), (WIDE, D), (D, WIDE)))
    assert "mlp_block" not in counts


def test_without_a_gradient_nothing_is_kept_and_nothing_joined() -> None:
    x = torch.randn(2, 5, D)
    counts, _, _ = _found(_mlp, x, *_weights((WIDE, D), (WIDE, D), (D, WIDE)))
    assert counts == {"glu": 1}


def _qkv(x: Tensor, q: Tensor, k: Tensor, v: Tensor, *ab: Tensor) -> tuple[Tensor, ...]:
    return _lora(x, q, *ab[:2]), _lora(x, k, *ab[2:4]), _lora(x, v, *ab[4:6])


def _qkv_inputs(dtype: torch.dtype, adapter: torch.dtype) -> list[Tensor]:
    sizes = (D, 8, 8)
    weights = _weights(*((s, D) for s in sizes), dtype=dtype)
    return [_x(dtype), *weights, *(t for s in sizes for t in _adapter(s, D, adapter))]


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_adapted_linears_on_one_input(dtype: torch.dtype, adapter: torch.dtype) -> None:
    counts, _, graph = _found(_qkv, *_qkv_inputs(dtype, adapter))
    assert counts == {"lora_linear": 3, "qkv_block": 1}
    assert _kept(graph) == ["all"]


def test_some_adapted_and_other_users_of_the_input() -> None:
    x, q, k, v, *ab = _qkv_inputs(torch.float32, torch.float32)

    def fn(x: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return _lora(x, q, a, b), F.linear(x, k).sin(), F.linear(x, v), x.cos()

    counts, _, _ = _found(fn, x, q, k, v, *ab[:2])
    assert counts == {"lora_linear": 1, "qkv_block": 1}


def test_an_input_that_needs_no_gradient() -> None:
    x, q, k, _, *ab = _qkv_inputs(torch.float32, torch.float32)

    def fn(x: Tensor, q: Tensor, k: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, k), _lora(x, q, a, b)

    counts, findings, _ = _found(fn, x.detach(), q, k, *ab[:2])
    assert counts == {"lora_linear": 1, "qkv_block": 1}, [f.reason for f in findings]


def test_linears_that_stay_by_themselves() -> None:
    x, q, k, v, *ab = _qkv_inputs(torch.float32, torch.float32)

    def plain(x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, q), F.linear(x, k)

    assert _found(plain, x, q.requires_grad_(), k)[0] == {}

    def different_inputs(x: Tensor, y: Tensor, q: Tensor, v: Tensor, *ab: Tensor) -> object:
        return _lora(x, q, *ab[:2]), _lora(y, v, *ab[2:])

    counts, _, _ = _found(different_inputs, x, _x(), q.detach(), v, *ab[:2], *ab[4:])
    assert counts == {"lora_linear": 2}

    def one_after_the_other(x: Tensor, q: Tensor, *ab: Tensor) -> Tensor:
        return F.linear(_lora(x, q, *ab), q)

    assert _found(one_after_the_other, x, q.detach(), *ab[:2])[0] == {"lora_linear": 1}

    def a_result_is_a_weight(x: Tensor, q: Tensor, *ab: Tensor) -> object:
        first = _lora(x, q, *ab)
        return first, F.linear(x, first.sum((0, 1)).expand(3, D))

    assert "qkv_block" not in _found(a_result_is_a_weight, x, q.detach(), *ab[:2])[0]


def test_a_write_between_linears_refuses() -> None:
    x, q, k, _, *ab = _qkv_inputs(torch.float32, torch.float32)

    def fn(x: Tensor, q: Tensor, k: Tensor, *ab: Tensor) -> object:
        y = x * 1.5
        first = _lora(y, q, *ab[:2])
        y.add_(1)
        return first, _lora(y, k, *ab[2:4])

    assert "qkv_block" not in _found(fn, x, q, k, *ab[:4])[0]


def test_dropout_before_the_adapters_leaves_them_with_the_reason() -> None:
    def fn(x: Tensor, q: Tensor, k: Tensor, v: Tensor, *ab: Tensor) -> tuple[Tensor, ...]:
        pairs = zip((q, k, v), (ab[:2], ab[2:4], ab[4:6]), strict=True)
        return tuple(_lora(x, w, *two, drop=0.3) for w, two in pairs)

    counts, findings, _ = _found(fn, *_qkv_inputs(torch.float32, torch.float32))
    assert counts == {"lora_linear": 3}
    left = [f for f in findings if f.rule == "qkv_block"]
    assert [f.status for f in left] == ["left"]
    assert "dropout" in left[0].reason


@pytest.mark.parametrize("drops", [(0.1, 0.1, 0.1), (0.0, 0.0, 0.1)], ids=str)
def test_dropout_inside_an_mlp_is_the_reason_that_is_given(drops: tuple[float, ...]) -> None:
    """That of down's adapter reads the product of gate and up, too, which must not hide it."""
    sizes = (WIDE, D), (WIDE, D), (D, WIDE)

    def fn(x: Tensor, g: Tensor, u: Tensor, d: Tensor, *ab: Tensor) -> Tensor:
        gate = _lora(x, g, *ab[:2], drop=drops[0])
        inner = F.silu(gate) * _lora(x, u, *ab[2:4], drop=drops[1])
        return _lora(inner, d, *ab[4:], drop=drops[2])

    adapters = [t for size in sizes for t in _adapter(*size)]
    counts, findings, _ = _found(fn, _x(), *_weights(*sizes), *adapters)
    assert counts["lora_linear"] == 3
    assert not counts["mlp_block"]
    assert [f.reason for f in findings if f.rule == "mlp_block"] == [
        "an adapter has an input of its own, after dropout"
    ]
