"""Which other engines would run a recipe, and what each lacks for it.

It follows the documentation of Unsloth 2026.11, Axolotl 0.21 and TRL 1.16 (2026-11-27).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..recipe.keys.fusewright import FusewrightKeys
from ..recipe.recipe import Recipe
from .count.layout import ProcessLayout

_UNSLOTH = (
    "llama", "mistral", "gemma", "gemma2", "gemma3", "gemma3_text", "qwen2", "qwen3", "qwen3_moe",
    "phi3", "cohere", "granite", "falcon_h1", "gpt_oss", "llama4",
)  # fmt: skip
"""Model types that Unsloth has patches for; it trains others at the speed of transformers."""


def which_engines(recipe: Recipe, layout: ProcessLayout, model_type: str, on_gpu: bool) -> str:
    """One sentence on other engines that would run this recipe."""
    looks: dict[str, Callable[[], list[str]]] = {
        "Axolotl": lambda: _axolotl(recipe, on_gpu),
        "Unsloth": lambda: _unsloth(layout, model_type, on_gpu),
        "TRL": lambda: _trl(recipe),
    }
    parts = []
    for name, look in looks.items():
        lacks = look()
        parts.append(f"{name} {'would run it' if not lacks else f'would need {_and(lacks)}'}")
    return f"other engines: {'; '.join(parts)}."


def _axolotl(recipe: Recipe, on_gpu: bool) -> list[str]:
    lacks = [] if on_gpu else ["a GPU"]
    keys = recipe.model_fields_set & set(FusewrightKeys.model_fields)
    if keys:
        lacks.append(f"the keys {_and(sorted(keys))} removed")
    if recipe.base_model.endswith(".gguf") or "package:" in recipe.base_model:
        lacks.append("the weights as safetensors")
    return lacks


def _unsloth(layout: ProcessLayout, model_type: str, on_gpu: bool) -> list[str]:
    lacks = ["a Python script (it reads no recipes)"]
    if not on_gpu:
        lacks.append("a GPU")
    if layout.engine not in ("one process", "DDP"):
        lacks.append(f"another strategy than {layout.engine}")
    if model_type not in _UNSLOTH:
        lacks.append(f"patches for {model_type}, which it trains at the speed of transformers")
    return lacks


def _trl(recipe: Recipe) -> list[str]:
    lacks = ["a Python script"]
    if recipe.packs() and recipe.attention() in (None, "sdpa", "eager"):
        lacks.append("flash attention, to keep packed samples apart")
    return lacks


def _and(words: list[Any]) -> str:
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last
