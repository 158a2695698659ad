"""Experts in 4 and 8 bits, and base models that are unpacked while they are loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GptOssConfig, Qwen3MoeConfig

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.kernels.moe.packed_experts import PackedExperts
from fusewright.train import train
from fusewright.train.model.load import load_model
from fusewright.train.model.quantize import quantize_experts
from fusewright.train.recipe.load import load_recipe
from tests.explained import explain

from ..conftest import make_model, make_tokenizer, small_recipe

BASE = {"base_model": "a/b", "datasets": [{"path": "a/b"}], "adapter": "qlora",
        "lora_target_linear": True, "quantize_moe_experts": True}  # fmt: skip
WAYS = {"4 bits": "load_in_4bit", "8 bits": "load_in_8bit"}
SIZES = {
    "vocab_size": 262, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixture(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 4, "moe_intermediate_size": 64, **changes}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes))


def quantized(model: Any, way: str) -> Any:
    recipe = load_recipe({**BASE, way: True, "adapter": "lora" if "8" in way else "qlora"})
    make: Any = BitsAndBytesConfig
    config = make(**{way: True}, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantize_experts(model, recipe, config)
    return model


def experts(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_packed_experts_are_nearly_what_they_were(way: str) -> None:
    before = experts(mixture()).gate_up_proj.detach()
    after = experts(quantized(mixture(), way)).gate_up_proj
    assert isinstance(after, PackedExperts)
    assert (after.shape, after.dtype, after.requires_grad) == (before.shape, before.dtype, False)
    size = after.parts[0].numel() * after.parts[0].element_size()
    assert size * (8 if "4" in way else 4) == before.numel() * before.element_size()
    error = (after + 0 - before).abs().mean() / before.abs().mean()
    assert 0 < error < (0.12 if "4" in way else 0.02)
    torch.testing.assert_close(after[2], (after + 0)[2])


@pytest.mark.long("optimized-eager", "optimized-batched_mm", "optimized-grouped_mm")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("change", ["plain", "optimized", "checkpointed"])
def test_adapters_train_through_packed_experts(implementation: str, change: str) -> None:
    """As through the unpacked numbers: the same loss and gradients, of experts' adapters, too."""
    found = []
    for packed in (True, False):
        model = quantized(mixture(), "load_in_4bit")
        model.set_experts_implementation(implementation)
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                if isinstance(p, PackedExperts) and not packed:
                    setattr(module, name, torch.nn.Parameter(p.unpacked(), requires_grad=False))
        names = ["experts.gate_up_proj", "experts.down_proj"]
        torch.manual_seed(1)
        adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"],
                                                        target_parameters=names))  # fmt: skip
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.data = 0.05 * torch.randn_like(p)
        adapted.train()
        if change == "checkpointed":
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        if change == "optimized" and packed:
            adapted = optimize(adapted, codegen="eager")
        ids = torch.arange(40).reshape(2, 20) % 200 + 3
        for _ in range(2):  # nothing of the first pass is left
            adapted.zero_grad()
            loss = adapted(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        grads = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
        assert any("experts" in n for n in grads)
        found.append((loss.detach(), grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for name, grad in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_packed_experts_are_multiplied_one_at_a_time(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers over them are rewritten, never whole in plain numbers, without those of no token."""
    model = quantized(mixture(num_experts=12), way)
    model.set_experts_implementation("grouped_mm")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapted: Any = get_peft_model(model, LoraConfig(target_parameters=names))
    optimize(adapted.train(), codegen="eager")
    ids = torch.arange(3).reshape(1, 3) + 3  # 6 pairs: half of the experts have no token
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()  # captured, verified
    assert explain(adapted).by_rule()["moe_experts"] == 2
    with torch.no_grad():  # with a cache, blocks run as they were
        adapted.eval().generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    adapted.train()
    dequantized: list[int] = []
    one = PackedExperts.expert
    monkeypatch.setattr(PackedExperts, "unpacked", lambda self: pytest.fail("unpacked whole"))
    monkeypatch.setattr(
        PackedExperts, "expert", lambda self, e: dequantized.append(e) or one(self, e)
    )
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert 0 < len(dequantized) <= 2 * 2 * 2 * 6  # two layers, two weights, twice each


def test_views_and_copies_stay_packed() -> None:
    weights = experts(quantized(mixture(), "load_in_4bit")).gate_up_proj.detach()
    plain = weights.unpacked()
    views = {
        "transposed": (weights.mT, plain.mT),
        "some": (weights[1:3], plain[1:3]),
        "some, transposed": (weights[:2].transpose(1, 2)[1:], plain[:2].mT[1:]),
        "a copy": (weights.clone(), plain),
        "in another dtype": (weights.bfloat16(), plain.bfloat16()),
        "a deep copy": (copy.deepcopy(nn.Parameter(weights, requires_grad=False)), plain),
    }
    for name, (view, expected) in views.items():
        assert isinstance(view, PackedExperts), name
        assert (view.shape, view.dtype, view.stride()) == (
            expected.shape, expected.dtype, expected.stride(),
        ), name  # fmt: skip
        torch.testing.assert_close(view.unpacked(), expected, rtol=0, atol=0, msg=name)
        torch.testing.assert_close(view[-1], expected[-1], rtol=0, atol=0, msg=name)


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(RecipeError, match="quantize_moe_experts: the model has no bare weights"):
        quantized(make_model(), "load_in_4bit")
    with pytest.raises(RecipeError, match="quantize_moe_experts: needs load_in_4bit"):
        load_recipe({**BASE, "adapter": "lora"})
    with pytest.raises(RecipeError, match="quantize_moe_experts: DeepSpeed cannot send packed"):
        load_recipe(
            {**BASE, "load_in_4bit": True, "deepspeed": {"zero_optimization": {"stage": 2}}}
        )


def test_a_run_with_packed_experts(rows: Path, tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    keys = {"load_in_4bit": True, "adapter": "qlora", "quantize_moe_experts": True,
            "experts_implementation": "eager", "lora_target_parameters": ["experts.down_proj"],
            "lora_target_linear": False, "lora_target_modules": ["q_proj"]}  # fmt: skip
    recipe = {**small_recipe(tmp_path / "base", rows, tmp_path / "out"), **keys}
    result = train(recipe, console=Console(quiet=True))
    assert result.status == "finished"
    assert not result.problems
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["eager", "batched_mm"])
def test_experts_of_transformers(name: str, tmp_path: Path) -> None:
    mixture().save_pretrained(tmp_path)
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}]}
    model = load_model(load_recipe({**keys, "experts_implementation": name}))
    assert model.config._experts_implementation == name


def test_a_base_model_in_mxfp4_is_unpacked(tmp_path: Path) -> None:
    """Experts of a fabricated checkpoint: 32 numbers of 4 bits that share an exponent."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    config = GptOssConfig(**{**SIZES, "intermediate_size": 64, "num_local_experts": 2})
    model: Any = AutoModelForCausalLM.from_config(config)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {}
    for name in [k for k in state if k.endswith(("gate_up_proj", "down_proj"))]:
        count, rows_, columns = state.pop(name).shape  # (experts, in, out)
        blocks = torch.randint(0, 256, (count, columns, rows_ // 32, 16), dtype=torch.uint8)
        scales = torch.randint(120, 124, (count, columns, rows_ // 32), dtype=torch.uint8)
        expected[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    keys = {"base_model": str(tmp_path), "datasets": [{"path": "a/b"}], "bf16": True,
            "model_quantization_config": "Mxfp4Config"}  # fmt: skip
    with pytest.raises(RecipeError, match=r"Mxfp4Config needs .*dequantize: true"):
        load_recipe(keys)
    recipe = load_recipe({**keys, "model_quantization_config_kwargs": {"dequantize": True}})
    loaded = load_model(recipe)
    for name, value in expected.items():
        torch.testing.assert_close(loaded.get_parameter(name).detach(), value)
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")
