"""Recipes in the style of Axolotl's examples of preference methods, and what runs them here.

Tests reach neither the hub's models nor its datasets. Tiny models and rows of the same form lie in
folders of the names that a recipe has for them, so that it is run as it is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from . import families, public_rows

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "preferences").glob("*.yaml"))
ORIGINALS = {
    "falcon-e-dpo": "falcon-e/falcon-e-3b-dpo.yaml",
    "gemma-2-reward": "gemma2/reward-model.yaml",
    "llama-3-dpo-deduplicated": "llama-3/lora-1b-deduplicate-dpo.yml",
    "llama-3-dpo-lora": "llama-3/instruct-dpo-lora-8b.yml",
    "llama-3-gdpo": "llama-3/qlora-1b-gdpo.yaml",
    "llama-3-kto-qlora": "llama-3/qlora-1b-kto.yaml",
    "mistral-dpo-qlora": "mistral/dpo/mistral-dpo-qlora.yml",
    "mistral-orpo-qlora": "mistral/orpo/mistral-qlora-orpo.yml",
    "qwen2-dpo": "qwen2/dpo.yaml",
    "qwen2-process-reward": "qwen2/prm.yaml",
    "qwen2-reward": "qwen2/reward-model.yaml",
    "qwen3-reward": "qwen3/reward-model.yaml",
    "swanlab-dpo-completions": "swanlab/dpo-swanlab-completions.yml",
    "swanlab-dpo-full": "swanlab/dpo-swanlab-full-featured.yml",
    "llama-3-simpo-lora": "docs/rlhf.qmd, SimPO",
    "mistral-kto-own-format": "docs/rlhf.qmd, KTO with user_defined.default",
    "qwen2-grpo-vllm": "docs/rlhf.qmd, GRPO",
    "qwen2-ipo": "docs/rlhf.qmd, IPO",
}
"""The example of Axolotl 0.21 that a recipe is in the style of, with its keys and values. Those for
methods without an example have the keys of the documentation. ``rl: ebft`` has nine examples more,
and no trainer but Axolotl's own."""

_OF_THE_MODEL: dict[str, dict[str, Any]] = {
    # of a model that has learnt nothing, the loss is above any threshold
    "mistral-orpo-qlora": {"loss_watchdog_threshold": 100.0},
    "falcon-e-dpo": {"use_onebitllms": False},  # its weights have 1.58 bits, a tiny model's do not
}
"""Keys that describe the model that a tiny one replaces."""


def values(path: Path) -> dict[str, Any]:
    """What a recipe says."""
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def overrides(path: Path) -> dict[str, Any]:
    """What is changed to run a recipe here: its length, and what describes its model."""
    return {"max_steps": 3, **_OF_THE_MODEL.get(path.stem, {})}


def provide(path: Path, folder: Path) -> None:
    """Put a model and rows where a recipe, run in ``folder``, looks for them."""
    recipe = values(path)
    families.save(recipe["base_model"], folder / recipe["base_model"])
    for name in {dataset["path"] for dataset in recipe["datasets"]}:
        public_rows.save(name, folder / name)
