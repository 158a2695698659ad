"""Configurations of models without weights, and jobs planned for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fusewright.train.plan.count.blueprint import Blueprint, draw
from fusewright.train.plan.count.step import take
from fusewright.train.plan.count.tensors import fsdp_units
from fusewright.train.plan.estimate import Process, TrainingJob
from fusewright.train.recipe.load import check
from fusewright.train.recipe.recipe import Recipe

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with nothing but the configuration of a small Llama."""
    folder = tmp_path / "model"
    LlamaConfig(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(config: Path, tmp_path: Path) -> MakeRecipe:
    """Makes recipes for it; their rows are elsewhere."""

    def make(**keys: Any) -> Recipe:
        given = {
            "base_model": str(config), "datasets": [{"path": "elsewhere.jsonl"}], "bf16": True,
            "sequence_len": 128, "micro_batch_size": 2, "codegen": "eager",
            "output_dir": str(tmp_path / "out"), **keys,
        }  # fmt: skip
        return check(given, with_data=False).recipe

    return make


LORA = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}


def make_job(recipe: Recipe, dtype: torch.dtype = torch.bfloat16) -> TrainingJob:
    """What a recipe runs, in a process that takes nothing itself."""
    blueprint: Blueprint = draw(recipe, dtype)
    step = take(blueprint, recipe, "eager")
    bits = 4 if recipe.load_in_4bit else None
    return TrainingJob(
        blueprint, fsdp_units(blueprint, bits, recipe.quantize_moe_experts), step, recipe.optimizer,
        recipe.accumulation(), recipe.checkpointing(), recipe.memory, "eager",
        Process(0, 0, 0.0, True), recipe.optimize, recipe.quantize_moe_experts,
    )  # fmt: skip
