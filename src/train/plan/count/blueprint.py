"""The model of a recipe without its weights: one block of each kind, and how often it occurs.

Models have dozens of equal blocks. One of a kind is counted, and multiplied by the number of its
kind; only where a recipe adapts blocks by their number is every block kept.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ....compiler.regions import find
from ....errors import RecipeError
from ...model.adapters import add_adapter
from ...model.from_pretrained import meta_model
from ...model.load import load_config, quiet
from ...model.merge_aware import exported_layers, round_in_training
from ...model.multimodal import is_in, towers, use_cache
from ...model.stored import Packing, packing
from ...recipe.recipe import Recipe

Kind = tuple[Any, ...]
"""What tells kinds of blocks apart: the class, and the names and shapes of the parameters."""


@dataclass(frozen=True)
class Blueprint:
    """A model on the meta device, with its adapters.

    Attributes:
        model: with at least one block of each kind.
        blocks: those of ``model``, by their paths in it.
        times: the number of the whole model's blocks that each represents.
        depth: the number of blocks of the whole language model.
        of_towers: the paths of blocks that are outside of it.
    """

    model: Any
    config: Any
    blocks: dict[str, nn.Module]
    times: dict[str, int]
    depth: int
    stored: Packing | None = None
    of_towers: frozenset[str] = frozenset()


def draw(recipe: Recipe, dtype: torch.dtype) -> Blueprint:
    """The model that ``recipe`` trains, without weights.

    ``dtype`` is that of the weights that are not adapters. Raises a RecipeError if there is no such
    model, or it has no such layers.
    """
    with quiet():
        config = load_config(recipe)
        stored = None if recipe.model_quantization_config else packing(config)
        if stored is not None and not recipe.adapter:
            raise RecipeError("base_model: weights in few bits cannot be trained: set adapter")
        use_cache(config, False)
        plain = copy.deepcopy(config)
        plain.__dict__.pop("quantization_config", None)
        model = meta_model(recipe, plain).to(dtype)
        times = _keep_one_of_each(model, _numbers_blocks(recipe))
        paths = exported_layers(model, recipe)
        model = _adapted(model, recipe)
        round_in_training(model, recipe, paths)
    blocks = {r.path: r.module for r in find(model) if r.kind == "block"}
    times_of = {path: times.get(id(block), 1) for path, block in blocks.items()}
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    places = towers(base)
    inside = {id(m) for name, m in base.named_modules() if is_in(name, places)}
    of_towers = frozenset(path for path, block in blocks.items() if id(block) in inside)
    depth = sum(n for path, n in times_of.items() if path not in of_towers)
    return Blueprint(model.train(), config, blocks, times_of, depth, stored, of_towers)


def _adapted(model: Any, recipe: Recipe) -> Any:
    """The model with its adapters, as far as these need no weights."""
    if recipe.adapter is not None and recipe.lora_model_dir:
        from peft import PeftConfig, get_peft_model

        for parameter in model.parameters():
            parameter.requires_grad_(False)
        config = PeftConfig.from_pretrained(recipe.lora_model_dir)
        config.inference_mode = False
        wide = recipe.peft_autocast_adapter_dtype
        return get_peft_model(model, config, autocast_adapter_dtype=wide)
    # initial values of adapters may be made from the weights, which are not here
    return add_adapter(model, recipe.model_copy(update={"peft_init_lora_weights": True}))


def kind_of(block: nn.Module) -> Kind:
    """The kind of ``block``."""
    return type(block), tuple((name, p.shape, p.dtype) for name, p in block.named_parameters())


_BY_NUMBER = ("peft_layers_to_transform", "peft_layers_pattern", "peft_layer_replication")


def _numbers_blocks(recipe: Recipe) -> bool:
    """Whether a recipe names single blocks, so that equal ones differ after all."""
    keys = [
        recipe.lora_target_modules, recipe.lora_exclude_modules, recipe.lora_target_parameters,
        recipe.lora_modules_to_save, recipe.unfrozen_parameters,
    ]  # fmt: skip
    return any(getattr(recipe, key) for key in _BY_NUMBER) or any(
        re.search(r"\d", str(value)) is not None for value in keys if value
    )


def _keep_one_of_each(model: nn.Module, every: bool) -> dict[int, int]:
    """Remove equal blocks but the first from the model's lists, unless ``every`` is kept.

    Returns, by ``id``, how many blocks each of the remaining ones represents; one if not named.
    """
    blocks = {id(r.module): kind_of(r.module) for r in find(model) if r.kind == "block"}
    if every or len(set(blocks.values())) == len(blocks):
        return {}
    times: dict[int, int] = {}
    # each once, though two modules may have it
    owners = {c: m for m in model.modules() for c in m.children() if isinstance(c, nn.ModuleList)}
    for stack, owner in owners.items():
        kinds = [blocks.get(id(m)) for m in stack]
        if not kinds or None in kinds:
            continue
        keep = [i for i, kind in enumerate(kinds) if kinds.index(kind) == i]
        # a single block does not show that it repeats: a second one is kept
        if len(keep) == 1 and len(kinds) > 1:
            keep.append(1)
        whole, remaining = Counter(kinds), Counter(kinds[i] for i in keep)
        for i in keep:
            share, more = divmod(whole[kinds[i]], remaining[kinds[i]])
            times[id(stack[i])] = share + (more if kinds.index(kinds[i]) == i else 0)
        modules = [stack[i] for i in keep]
        for names in _names_of_layers(owner, len(kinds)):
            names[:] = [names[i] for i in keep]
        del stack[:]
        stack.extend(modules)
    return times


def _names_of_layers(owner: nn.Module, depth: int) -> list[list[str]]:
    """What a configuration calls each layer: by its number in them, a layer gets its mask."""
    lists = [v for v in vars(getattr(owner, "config", object)).values() if isinstance(v, list)]
    return [v for v in lists if len(v) == depth and all(isinstance(n, str) for n in v)]
