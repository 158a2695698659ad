"""Tiny mixtures of experts: routed experts rewritten, loss and every gradient equal eager's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fusewright import optimize, restore
from tests.explained import explain

from .architectures import build
from .test_models import Pair, _assert_equal_steps, _batches
from .tiny import token_ids
from .zoo import Family

SITES = {
    "mixtral": 2, "qwen3_moe": 2, "deepseek_v3": 1, "olmoe": 2, "gpt_oss": 2, "glm4_moe": 1,
    "qwen3_5_moe_text": 2, "granitemoe": 2, "gemma4_text": 4, "minimax": 2,
}  # fmt: skip
"""Layers with routed experts: each is rewritten, with adapters and without."""

QUICK = ("mixtral", "gpt_oss")
ADAPTERS = ("plain", "attention", "experts")


def _tiny(name: str) -> Any:
    model = build(name)
    if name == "gemma4_text":  # its experts are optional
        model.config.enable_moe_block = True
        model.config.num_experts, model.config.top_k_experts = 8, 2
        model.config.moe_intermediate_size = 32
        torch.manual_seed(0)
        model = type(model)(model.config).train()
    return model


def _lora(model: nn.Module, where: str = "experts", **more: Any) -> LoraConfig:
    chosen: dict[str, Any] = {"target_modules": ["o_proj"]}
    if where == "experts":
        names = [n for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
        chosen["target_parameters"] = sorted({".".join(n.split(".")[-3:]) for n in names})
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **chosen, **more})


def _draw(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)


def _adapted(model: nn.Module, where: str, **more: Any) -> Any:
    if where == "plain":
        return model
    adapted = get_peft_model(model, _lora(model, where, **more))
    _draw(adapted)
    return adapted


def _pair(
    name: str, where: str, dtype: torch.dtype = torch.float32, codegen: Any = "eager", **more: Any
) -> Pair:
    torch.manual_seed(0)
    return _paired(_adapted(_tiny(name), where, **more).to(dtype), name, where, codegen)


def _paired(model: Any, name: str, where: str = "experts", codegen: Any = "eager") -> Pair:
    if next(model.parameters()).dtype is torch.bfloat16:
        # a rounding that sends a token to another expert would hide the errors looked for here
        for module in model.modules():
            if hasattr(module, "top_k"):
                module.top_k = module.num_experts
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # torch's grouped matmul takes no fp64
    family = Family(name, lambda: model.config, {}, {})
    return Pair(family, where != "plain", optimize(model, codegen=codegen), eager, exact)


def _assert_rewritten(pair: Pair) -> None:
    report = explain(pair.ours)
    assert report.by_rule().get("moe_experts") == SITES[pair.family.name], str(report)
    assert not [s for s in report.sites if s.rule == "moe_experts" and s.status != "rewritten"]


@pytest.mark.long("gpt_oss-attention")
@pytest.mark.long("gpt_oss-experts", "mixtral-experts")
@pytest.mark.parametrize("where", ADAPTERS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SITES]
)
def test_loss_and_gradients_equal_eager(name: str, where: str) -> None:
    pair = _pair(name, where)
    # the largest of gemma's many gradients depends on more chance
    _assert_equal_steps(pair, _batches(2, 13, draws=24 if name == "gemma4_text" else 6))
    _assert_rewritten(pair)
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
@pytest.mark.parametrize("where", ["plain", pytest.param("experts", marks=pytest.mark.slow)])
def test_bf16(where: str, codegen: str) -> None:
    pair = _pair("qwen3_moe", where, torch.bfloat16, codegen)
    _assert_equal_steps(pair, _batches(2, 13))
    assert explain(pair.ours).by_rule()["moe_experts"] == 2
    torch._dynamo.reset()


# -- adapters of the experts -----------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"modules_to_save": ["gate"]}], ids=str)
def test_settings_of_adapters(settings: dict[str, Any]) -> None:
    pair = _pair("qwen3_moe", "experts", **settings)
    _assert_equal_steps(pair, _batches(2, 13))
    _assert_rewritten(pair)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = _tiny("qwen3_moe")
    config = _lora(plain, r=3, lora_alpha=10)
    model = _adapted(plain, "experts")
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    _draw(model)
    pair = _paired(model.to(dtype), "qwen3_moe")
    _assert_equal_steps(pair, _batches(2, 13, draws=24))  # of few, one decides
    _assert_rewritten(pair)
    torch._dynamo.reset()


@pytest.mark.slow
def test_under_autocast() -> None:
    pair = _pair("qwen3_moe", "experts")
    ids = token_ids(2, 13)
    results = []
    for model in (pair.ours, pair.eager):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    (ours, grads), (eager, eager_grads) = results
    torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)
    assert grads.keys() == eager_grads.keys()
    for name, grad in grads.items():
        assert (grad - eager_grads[name]).norm() <= 0.1 * eager_grads[name].norm(), name
    _assert_rewritten(pair)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_life_of_adapters(tmp_path: Path) -> None:
    """Switched off and on, merged and not, saved and loaded: always what eager PEFT does."""
    pair = _pair("mixtral", "experts")
    ids = token_ids(2, 13)

    def equal() -> Tensor:
        losses = []
        for model in (pair.ours, pair.eager):
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            if loss.requires_grad:
                loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
        for (_, mine), (_, theirs) in zip(
            *(sorted(m.named_parameters()) for m in (pair.ours, pair.eager)), strict=True
        ):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        return losses[0]

    adapted = equal()
    classes = [type(m) for m in pair.ours.modules()]
    with pair.ours.disable_adapter(), pair.eager.disable_adapter():
        assert not torch.equal(equal(), adapted)
    for model in (pair.ours, pair.eager):
        model.merge_adapter()
    torch.testing.assert_close(equal(), adapted)
    for model in (pair.ours, pair.eager):
        model.unmerge_adapter()
    equal()
    assert [type(m) for m in pair.ours.modules()] == classes
    pair.ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(_tiny("mixtral"), tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids, labels=ids).loss, adapted)
    restore(pair.ours)
    equal()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["min", "auto"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_memory_levels(memory: Any, checkpoint: bool) -> None:
    torch.manual_seed(0)
    model = _adapted(_tiny("qwen3_moe"), "experts")
    other = copy.deepcopy(model)
    if checkpoint:
        for m in (model, other):
            m.gradient_checkpointing_enable()
            m.enable_input_require_grads()
    ids, results = token_ids(2, 13), []
    for m in (optimize(model, codegen="eager", memory="speed"), optimize(other, memory=memory)):
        m(input_ids=ids, labels=ids).loss.backward()
        results.append([p.grad for p in m.parameters() if p.requires_grad])
        assert explain(m).by_rule()["moe_experts"] == 2
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()
