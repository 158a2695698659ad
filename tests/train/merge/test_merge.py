"""Merged models: PEFT's own result, file by file, and loadable by plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fusewright.train.checkpoint.save_model import save
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge import merged_in_memory

from ..commands import fusewright, refused
from ..conftest import checked, make_adapter, make_model, make_tokenizer

IDS = torch.tensor([[1, 7, 45, 99, 130, 2, 200, 31]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def plain(adapter: Path, **options: Any) -> Any:
    """The adapter on its base, by PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base", **options)
    return PeftModel.from_pretrained(base, adapter)


def merged(adapter: Path, *arguments: str, how: str = "file by file") -> Path:
    done = fusewright("merge", adapter, *arguments)
    assert done.exit_code == 0, done.output
    assert how in done.stdout
    return adapter / "merged"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved block": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "embeddings with dora": {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_peft(tmp_path: Path, kind: str) -> None:
    adapter = make_adapter(tmp_path, **KINDS[kind])
    adapted = plain(adapter)
    expected = logits(adapted)
    with adapted.disable_adapter():
        assert not torch.allclose(expected, logits(adapted), atol=1e-3)
    folder = merged(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    wanted = adapted.merge_and_unload().state_dict()
    for name, tensor in tensors(folder).items():
        assert torch.allclose(tensor, wanted[name], atol=1e-6, rtol=1e-6), name


@pytest.mark.parametrize(
    "settings", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}], ids=str
)
def test_biases(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = make_model(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    adapter = make_adapter(tmp_path, model, **settings)
    expected = logits(plain(adapter))
    model = AutoModelForCausalLM.from_pretrained(merged(adapter))
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_layers_that_hold_their_weights_transposed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=262, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    adapter = make_adapter(tmp_path, GPT2LMHeadModel(config), fan_in_fan_out=True)
    # as the files of GPT-2 itself are: without the prefix of the causal model
    files = sorted((tmp_path / "base").glob("*.safetensors"))
    for file in files:
        content = load_file(file)
        named = {name.removeprefix("transformer."): t for name, t in content.items()}
        save_file(named, file, metadata={"format": "pt"})
    index = tmp_path / "base" / "model.safetensors.index.json"
    text = index.read_text().replace('"transformer.', '"')
    index.write_text(text)
    expected = logits(plain(adapter))
    model = AutoModelForCausalLM.from_pretrained(merged(adapter))
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("settings", "stays"),
    [
        ({}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
    ],
    ids=str,
)
def test_tied_embeddings_stay_tied_unless_the_adapter_parts_them(
    tmp_path: Path, settings: dict[str, Any], stays: bool
) -> None:
    adapter = make_adapter(tmp_path, make_model(tie_word_embeddings=True), **settings)
    expected = logits(plain(adapter))
    folder = merged(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is stays
    assert ("lm_head.weight" in tensors(folder)) is not stays


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, dtype=torch.bfloat16)
    exact = plain(adapter, dtype=torch.float32).merge_and_unload().state_dict()
    peft = plain(adapter).merge_and_unload().state_dict()
    for name, tensor in tensors(merged(adapter)).items():
        assert tensor.dtype is torch.bfloat16
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
        unit = torch.finfo(torch.bfloat16).eps * exact[name].abs()
        assert bool(((tensor.float() - peft[name].float()).abs() <= unit + 1e-12).all()), name


def test_a_wider_base_is_rounded_once_in_memory_too(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, dtype=torch.float32)
    exact = plain(adapter, dtype=torch.float32).merge_and_unload().state_dict()
    found = merged_in_memory(open_run(adapter), torch.bfloat16, dequantize=False).state_dict()
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_shards_have_the_size_asked_for_and_an_index(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    folder = merged(adapter, "--max_shard_size", "30KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert max(f.stat().st_size for f in files) < 40_000  # one tensor is 33 KB
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert set(index["weight_map"]) == set(make_model().state_dict())
    expected = logits(plain(adapter))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("float16", torch.float16)])
def test_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    folder = merged(make_adapter(tmp_path), "--dtype", name)
    assert {t.dtype for t in tensors(folder).values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(folder).dtype is dtype


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path / "small")
    model.resize_token_embeddings(270)
    adapter = make_adapter(
        tmp_path, model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    expected = logits(plain(adapter))
    make_tokenizer().save_pretrained(tmp_path / "small")
    done = fusewright("merge", adapter, "--base_model", tmp_path / "small")
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(adapter / "merged")
    assert model.config.vocab_size == 270
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_a_run_and_its_checkpoint(trained: Path, tmp_path: Path, base: Path) -> None:
    for run in (trained, trained / "checkpoint-2"):
        output = tmp_path / run.name
        done = fusewright("merge", run, "--output", output)
        assert done.exit_code == 0, done.output
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run)
        model = AutoModelForCausalLM.from_pretrained(output)
        assert torch.allclose(logits(model), logits(adapted), atol=1e-5)
        assert AutoTokenizer.from_pretrained(output).chat_template
        assert (output / "generation_config.json").exists()
        assert model.config.use_cache == make_model().config.use_cache


@pytest.mark.parametrize("settings", [True, False], ids=["settings", "none"])
def test_other_tools_stop_where_a_turn_ends(tmp_path: Path, settings: bool) -> None:
    """Of a base whose texts end otherwise: its own end, and that of the chat template.

    Settings that transformers would not save, though many models are published with such, are kept.
    """
    adapter = make_adapter(tmp_path)
    base = tmp_path / "base"
    for name, more in {"config.json": {}, "generation_config.json": {"temperature": 0.5}}.items():
        given = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**given, "eos_token_id": 9, **more}))
    if not settings:
        (base / "generation_config.json").unlink()
    folder = merged(adapter)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == 9
    assert model.generation_config.eos_token_id == [9, 2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(2) == "<|im_end|>"
    model.generation_config.pad_token_id = 0  # as Trainer sets it
    save(model, tokenizer, tmp_path / "whole", recipe=checked(base))  # as a run does
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert again.generation_config.eos_token_id == [9, 2]
    expected = (0.5, 0) if settings else (None, 0)
    assert (again.generation_config.temperature, again.generation_config.pad_token_id) == expected


def test_adapters_that_are_not_lora_are_merged_by_peft(tmp_path: Path) -> None:
    from peft import LoHaConfig, get_peft_model

    model = make_model()
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    folder = merged(tmp_path / "adapter", "--dtype", "float32", how="in memory: the adapter is")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(model), logits(adapted), atol=1e-5)
    assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file()}) == 1


def test_prompts_that_were_learnt_cannot_be_merged(tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model = make_model()
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    get_peft_model(
        model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ).save_pretrained(tmp_path / "adapter")
    assert "cannot be merged" in refused("merge", tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "merged").exists()
    assert not list((tmp_path / "adapter").glob(".merged*"))


def test_what_is_refused(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    whole = tmp_path / "base"
    assert "holds a whole model: there is nothing to merge" in refused("merge", whole)
    assert "must be float32" in refused("merge", adapter, "--dtype", "int8")
    assert "--max-shard-size: " in refused("merge", adapter, "--max_shard_size", "large")
    assert not (adapter / "merged").exists()
    (adapter / "merged").mkdir()
    (adapter / "merged" / "mine.txt").write_text("mine")
    assert "merged is there already" in refused("merge", adapter)
    assert [p.name for p in (adapter / "merged").iterdir()] == ["mine.txt"]
    file = tmp_path / "file"
    file.write_text("")
    assert "file is there already" in refused("merge", adapter, "--output", file)


def test_a_base_that_lacks_a_file(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    lost = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    lost.rename(tmp_path / "lost")
    assert f"names {lost.name}, which is not there" in refused("merge", adapter)
    lost.write_bytes((tmp_path / "lost").read_bytes()[:1000])
    assert f"{lost} cannot be read: " in refused("merge", adapter)
    assert [p.name for p in adapter.iterdir() if "merged" in p.name] == []


def test_what_was_left_half_written_is_not_used(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    half = adapter / ".merged.unfinished"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (half / "model-00009-of-00009.safetensors").write_bytes(b"half")
    folder = merged(adapter)
    assert set(tensors(folder)) == set(make_model().state_dict())
    assert not half.exists()


def test_the_configuration_is_that_of_the_run(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path)
    changed = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
    recipe = {"base_model": str(tmp_path / "base"), "adapter": "lora", "bf16": False}
    facts = {"recipe": {**recipe, "overrides_of_model_config": changed}}
    (adapter / "run.json").write_text(json.dumps(facts))
    model = AutoModelForCausalLM.from_pretrained(merged(adapter))
    assert model.config.rope_parameters["rope_theta"] == 777.0
