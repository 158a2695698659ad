"""Attention written out: recognised as transformers has it, and refused where it differs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ..capturing import capture, rewrite, rewritten

F32, BF16 = torch.float32, torch.bfloat16
SPELLINGS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sinks": True},
    "openai_privacy_filter": {"sinks": True},
    "mimo_v2_flash": {"sinks": True},
    "flint": {"sinks": True},
    "granite_swa": {"sinks": True},
    "gemma2": {"softcap": 2.0},
}


class _Module:
    """What an eager function reads of its module."""

    def __init__(self, sinks: Tensor | None) -> None:
        self.sinks, self.num_key_value_groups, self.training = sinks, 2, True


def _eager(model: str) -> Callable[..., tuple[Tensor, Tensor]]:
    pytest.importorskip(f"transformers.models.{model}", reason=f"no {model} in this transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    function: Callable[..., tuple[Tensor, Tensor]] = module.eager_attention_forward
    return function


def _formula(model: str, **options: Any) -> Callable[..., Any]:
    eager = _eager(model)

    def fn(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return eager(_Module(sinks), q, k, v, mask, scaling=0.3, **options)

    return fn


def _inputs(dtype: torch.dtype, sinks: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 7, n, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for n in (4, 2, 2)
    )
    order = torch.arange(7)
    hidden = order[:, None] < order
    mask = torch.zeros(2, 1, 7, 7, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    column = torch.randn(4, generator=generator).to(dtype).requires_grad_() if sinks else None
    return [q, k, v, mask, column]


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("model", SPELLINGS)
def test_spellings(model: str, dtype: torch.dtype) -> None:
    options = dict(SPELLINGS[model])
    inputs, fn = _inputs(dtype, options.pop("sinks", False)), _formula(model, **options)
    graph = capture(lambda *t: fn(*t)[0], *inputs)
    findings = rewrite(graph)
    assert rewritten(findings) == ["attention"], findings
    without = [*inputs[:3], None, inputs[4]]
    findings = rewrite(capture(lambda *t: fn(*t)[0], *without))
    assert rewritten(findings) == ["attention"], findings


def test_without_sinks_it_is_left_where_pytorch_has_a_kernel(
    choose_for: Callable[[str], None],
) -> None:
    fn = _formula("llama")
    for kind, dtype, found in (("avx512_bf16", BF16, ["attention"]), ("amx", F32, [])):
        choose_for(kind)
        findings = rewrite(capture(lambda *t: fn(*t)[0], *_inputs(dtype, False)))
        assert rewritten(findings) == found, findings


def test_weights_that_are_returned_stay() -> None:
    findings = rewrite(capture(_formula("gpt_oss"), *_inputs(F32, True)))
    assert rewritten(findings) == []


def test_dropout_stays() -> None:
    fn = _formula("gpt_oss", dropout=0.5)
    assert rewritten(rewrite(capture(lambda *t: fn(*t)[0], *_inputs(F32, True)))) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda q, k, v, m, s: [q, k, v, m == 0, s], "no mask"),
        (lambda q, k, v, m, s: [q, k, v, m[0, 0], s], "no mask"),
        (lambda q, k, v, m, s: [q, k, v, m.clone().requires_grad_(), s], "requires a gradient"),
    ],
)
def test_refusals(change: Callable[..., list[Any]], reason: str) -> None:
    fn = _formula("gpt_oss")
    findings = rewrite(capture(lambda *t: fn(*t)[0], *change(*_inputs(F32, True))))
    assert rewritten(findings) == []
    assert any(reason in f.reason for f in findings), findings
