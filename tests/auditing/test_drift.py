"""The bias of gradients' errors: found where there is one, and not where there is only rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fusewright.auditing.drift import Lean, drifts, lean

PRECISIONS = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
WIDTH, TOKENS, CLASSES, LAYERS = 32, 96, 64, 4

Gradients = dict[str, Tensor]


def _weights(dtype: torch.dtype) -> Gradients:
    shapes = {f"layers.{i}.{n}_proj.weight": (WIDTH, WIDTH) for i in range(LAYERS) for n in "ab"}
    shapes["head.weight"] = (CLASSES, WIDTH)
    return {name: (torch.randn(shape) / WIDTH**0.5).to(dtype) for name, shape in shapes.items()}


def _gradients(
    weights: Gradients, x: Tensor, y: Tensor, dtype: torch.dtype, chunks: int = 1
) -> Gradients:
    """Those of a residual network, by ``chunks`` of the batch, the last one first."""
    leaves = {name: w.to(dtype, copy=True).requires_grad_() for name, w in weights.items()}
    for rows, labels in reversed(list(zip(x.chunk(chunks), y.chunk(chunks), strict=True))):
        h = rows.to(dtype)
        for i in range(LAYERS):
            inner = F.silu(F.linear(h, leaves[f"layers.{i}.a_proj.weight"]))
            h = h + F.linear(inner, leaves[f"layers.{i}.b_proj.weight"])
        logits = F.linear(h, leaves["head.weight"])
        loss = F.cross_entropy(logits.to(PRECISIONS[torch.bfloat16] if dtype == torch.bfloat16
                                         else dtype), labels, reduction="sum")  # fmt: skip
        (loss / len(y)).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}  # type: ignore[misc]


def _plain(gradient: Tensor, name: str) -> Tensor:
    return gradient.double()


def _half_a_unit(gradient: Tensor) -> Tensor:
    exponent = gradient.double().abs().clamp_min(1e-300).log2().floor()
    return exponent.exp2() * torch.finfo(gradient.dtype).eps / 2


def _truncated(gradient: Tensor, name: str) -> Tensor:
    return gradient.double() - gradient.double().sign() * _half_a_unit(gradient)


def _rounded_down(gradient: Tensor, name: str) -> Tensor:
    return gradient.double() - _half_a_unit(gradient)


def _scaled(gradient: Tensor, name: str) -> Tensor:
    return gradient.double() * (1 - torch.finfo(gradient.dtype).eps / 2)


def _one_kind(gradient: Tensor, name: str) -> Tensor:
    return _truncated(gradient, name) if "a_proj" in name else gradient.double()


def _found(
    seed: int, low: torch.dtype, steps: int, *plants: Callable[[Tensor, str], Tensor]
) -> list[set[str]]:
    """Kinds and directions with a bias, for each plant; the order of the sums is another one."""
    torch.manual_seed(seed)
    weights = _weights(low)
    leans: list[list[dict[str, Lean]]] = [[] for _ in plants]
    trained = 0
    for _ in range(steps):
        number = TOKENS - int(torch.randint(0, 40, ()))
        x, y = torch.randn(number, WIDTH).to(low), torch.randint(0, CLASSES, (number,))
        trained += number
        exact = _gradients(weights, x, y, PRECISIONS[low])
        eager = _gradients(weights, x, y, low)
        other = _gradients(weights, x, y, low, chunks=3)
        for plant, of in zip(plants, leans, strict=True):
            of.append({n: lean(plant(other[n], n), eager[n], exact[n]) for n in exact})  # type: ignore[misc]
    return [
        {f"{d.kind} {d.direction}" for d in drifts(each, low, trained) if d.exceeded}
        for each in leans
    ]


@pytest.mark.parametrize(("low", "steps"), [(torch.bfloat16, 1), (torch.float32, 1),
                                            (torch.float32, 4)])  # fmt: skip
def test_rounding_in_another_order_is_no_bias(low: torch.dtype, steps: int) -> None:
    assert [_found(seed, low, steps, _plain)[0] for seed in range(12)] == [set()] * 12


def test_half_a_unit_is_a_bias_in_bf16() -> None:
    for seed in range(12):
        truncated, down, scaled, one = _found(
            seed, torch.bfloat16, 2, _truncated, _rounded_down, _scaled, _one_kind
        )
        assert {" size", "layers.a_proj size"} & truncated
        assert " offset" in down
        assert " size" in scaled
        assert "a_proj size" in one
        assert "b_proj size" not in one


def test_in_fp32_a_scale_takes_more_steps() -> None:
    """A single rounded number, such as the reciprocal of the tokens, scales all of one step."""
    for seed in range(3):
        once, many = (_found(seed, torch.float32, n, _scaled, _rounded_down) for n in (1, 24))
        assert " size" not in once[0]
        assert " size" in many[0]
        assert " offset" in many[1]


def test_a_better_way_than_eager_has_no_bias() -> None:
    exact = {f"{i}.weight": torch.randn(64, 64, dtype=torch.float64) for i in range(4)}
    eager = {name: t * (1 + 2**-7) for name, t in exact.items()}
    step = {name: lean(t, eager[name], t) for name, t in exact.items()}
    assert not any(d.exceeded for d in drifts([step], torch.bfloat16, 1000))  # type: ignore[list-item]


def test_where_a_mean_has_no_meaning() -> None:
    zero, nan = torch.zeros(4), torch.tensor([1.0, float("nan"), 0.0, 0.0])
    assert lean(torch.ones(4), None, zero) is None
    assert lean(nan, None, torch.ones(4)) is None
    one = lean(torch.ones(4), None, torch.ones(4))
    assert one is not None
    assert drifts([{"a": one}], torch.float32, 10) == []
