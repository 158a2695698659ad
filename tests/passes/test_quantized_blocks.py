"""Adapted linears over quantized weights: joined, and left alone where they differ."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright.kernels.linear.linear import qkv_block
from fusewright.kernels.mlp import mlp_block
from fusewright.rewrite import op_table as ops
from fusewright.rewrite.findings import Finding

from ..capturing import capture, rewrite, rewritten
from ..models.quantized import quantize

BF16, F32 = torch.bfloat16, torch.float32
D, WIDE = 64, 128


class _Three(nn.Module):
    """Three linears on one input; those in ``plain`` are not quantized."""

    names = ("q", "k", "v")

    def __init__(self, plain: str = "", storage: torch.dtype = torch.uint8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (self._layer(D, n) for n in (D, 32, 32))
        self._quantize(plain, storage)

    @staticmethod
    def _layer(into: int, out: int) -> nn.Linear:
        return nn.Linear(into, out, bias=False).to(BF16)

    def _quantize(self, plain: str, storage: torch.dtype) -> None:
        kept = {name: getattr(self, name) for name in plain}
        for name in plain:
            delattr(self, name)
        quantize(self, compute=BF16, storage=storage)
        for name, layer in kept.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.q(x), self.k(x), self.v(x)


class _Mlp(_Three):
    """Gate, up and down."""

    names = ("g", "u", "d")

    def __init__(self, plain: str = "", storage: torch.dtype = torch.uint8) -> None:
        nn.Module.__init__(self)
        torch.manual_seed(0)
        self.g, self.u = self._layer(D, WIDE), self._layer(D, WIDE)
        self.d = self._layer(WIDE, D)
        self._quantize(plain, storage)

    def forward(self, x: Tensor) -> Any:
        return self.d(torch.nn.functional.silu(self.g(x)) * self.u(x))


def _found(module: _Three, dtype: torch.dtype = BF16) -> tuple[Counter[str], list[Finding]]:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=list(module.names), init_lora_weights=False)
    adapted = peft.get_peft_model(module, config).base_model.model.train()
    x = torch.randn(2, 5, D).to(dtype).requires_grad_()
    adapted(x)  # bitsandbytes arranges its state in the first call
    findings = rewrite(capture(adapted, x))
    return Counter(rewritten(findings)), findings


def _of(findings: list[Finding], rule: str) -> list[Finding]:
    return [f for f in findings if f.rule == rule]


@pytest.mark.parametrize("storage", [torch.uint8, BF16, F32], ids=str)
def test_all_quantized(storage: torch.dtype) -> None:
    counts, findings = _found(_Three(storage=storage))
    assert counts == {"quant_linear": 3, "lora_linear": 3, "qkv_block": 1}
    counts, more = _found(_Mlp(storage=storage))
    assert counts == {"quant_linear": 3, "lora_linear": 3, "glu": 1, "mlp_block": 1}
    # bytes that are stored as floating-point numbers were not taken for such in verification
    errors = {f.rule: f.figures.error for f in findings + more if f.rule != "quant_linear"}
    assert all(0 < (error or 0) < 0.02 for error in errors.values()), errors


def test_a_plain_linear_beside_quantized_ones_stays_by_itself() -> None:
    counts, findings = _found(_Three(plain="v"))
    assert counts == {"quant_linear": 2, "lora_linear": 3, "qkv_block": 1}
    counts, findings = _found(_Mlp(plain="d"))
    assert counts == {"quant_linear": 2, "lora_linear": 3, "glu": 1, "qkv_block": 1}
    assert "some are not" in _of(findings, "mlp_block")[0].reason


@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_that_read_x_before_its_cast_are_joined_with_it(autocast: bool) -> None:
    """As over norms in fp32: the layers cast to what they compute in, and back."""
    for module, block in ((_Three(), "qkv_block"), (_Mlp(), "mlp_block")):
        with torch.autocast("cpu", BF16, enabled=autocast):
            counts, _ = _found(module, F32)
        assert counts["quant_linear"] == counts["lora_linear"] == 3
        assert counts[block] == 1


@pytest.mark.parametrize("storage", [torch.uint8, BF16, F32], ids=str)
@pytest.mark.parametrize("name", ["qkv_block", "mlp_block"])
def test_a_wrong_op_is_refused(
    name: str, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"qkv_block": qkv_block, "mlp_block": mlp_block.mlp_block}[name]

    def wrong(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        return tuple(1.1 * o for o in out) if isinstance(out, tuple) else 1.1 * out

    monkeypatch.setitem(ops.TABLE, name, wrong)
    counts, findings = _found((_Three if name == "qkv_block" else _Mlp)(storage=storage))
    assert counts[name] == 0
    (finding,) = _of(findings, name)
    assert finding.status == "refused"
    assert "output 0" in finding.reason
