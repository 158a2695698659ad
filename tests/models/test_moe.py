"""Tiny mixtures of experts: routed experts rewritten, loss and every gradient equal eager's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from fusewright import explain, optimize, restore

from .architectures import build
from .test_models import Pair, _assert_equal_steps, _batches
from .zoo import Family

NAMES = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss")
SITES = {"mixtral": 2, "qwen3_moe": 2, "deepseek_v3": 1, "olmoe": 2, "gpt_oss": 2}
QUICK = ("mixtral", "gpt_oss")
ADAPTERS = ("plain", "attention", "experts")


def _adapted(model: nn.Module, where: str) -> Any:
    if where == "plain":
        return model
    from peft import LoraConfig, get_peft_model

    names = [n for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
    chosen: dict[str, Any] = {"target_modules": ["o_proj"]}
    if where == "experts":
        chosen["target_parameters"] = sorted({".".join(n.split(".")[-3:]) for n in names})
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **chosen))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
    return adapted


def _pair(
    name: str, where: str, dtype: torch.dtype = torch.float32, codegen: Any = "eager"
) -> Pair:
    torch.manual_seed(0)
    model = _adapted(build(name), where).to(dtype)
    if dtype is torch.bfloat16:
        # a rounding that sends a token to another expert would hide the errors looked for here
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = module.num_experts
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # torch's grouped matmul takes no fp64
    family = Family(name, lambda: model.config, {}, {})
    return Pair(family, where != "plain", optimize(model, codegen=codegen), eager, exact)


@pytest.mark.long("gpt_oss-attention")
@pytest.mark.long("gpt_oss-experts", "mixtral-experts")
@pytest.mark.parametrize("where", ADAPTERS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_loss_and_gradients_equal_eager(name: str, where: str) -> None:
    pair = _pair(name, where)
    _assert_equal_steps(pair, _batches(2, 13))
    report = explain(pair.ours)
    if where != "experts":  # PEFT swaps parameters during the call, which is not captured
        assert report.by_rule().get("moe_experts") == SITES[name], str(report)
    assert not [s for s in report.sites if s.rule == "moe_experts" and s.status != "rewritten"]
    restore(pair.ours)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe"])
def test_the_auxiliary_loss_is_untouched(name: str) -> None:
    pair = _pair(name, "plain")
    _assert_equal_steps(pair, _batches(2, 13), output_router_logits=True)
    ids = _batches(2, 13)[0][0]
    ours, eager = (
        m(input_ids=ids, labels=ids, output_router_logits=True).aux_loss
        for m in (pair.ours, pair.eager)
    )
    torch.testing.assert_close(ours, eager)
    torch._dynamo.reset()


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bf16(codegen: str) -> None:
    pair = _pair("qwen3_moe", "plain", torch.bfloat16, codegen)
    _assert_equal_steps(pair, _batches(2, 13))
    assert explain(pair.ours).by_rule()["moe_experts"] == 2
    torch._dynamo.reset()
