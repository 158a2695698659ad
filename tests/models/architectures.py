"""Tiny random instances of every causal language model registered in transformers.

`build` shrinks the default configuration of a registered name: sizes come from one table, the
layers are a subset of the default ones with every kind of layer in it, dropout is off. What
single families insist on stands in `special.SPECIAL`.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import time
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from .special import (
    CODEBOOKS,
    DEPTHS,
    ENCODER_SIZES,
    FEATURES,
    IMPOSSIBLE,
    PICTURES,
    SIZES,
    SPECIAL,
    UNTARGETABLE,
)

MAX_PARAMETERS = 20_000_000
BATCH, LENGTH = 2, 24
FIRST_ID, LAST_ID = 3, 200
# A per-layer list with more distinct values than this is a list of indices or the like.
MAX_KINDS = 4


class CannotBuild(Exception):
    """A registered name has no tiny model that trains on token ids alone."""


def names() -> list[str]:
    """Return all registered names, sorted."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(name: str, seed: int = 0) -> nn.Module:
    """Build the tiny model of a registered name, in fp32 and train mode.

    Args:
        name: A name from `names()`.
        seed: Seeds the random weights.

    Returns:
        The causal language model, or the text decoder of a multimodal one.

    Raises:
        CannotBuild: The name has no model that trains on token ids alone.
    """
    if name in IMPOSSIBLE:
        raise CannotBuild(IMPOSSIBLE[name])
    registered = CONFIG_MAPPING[name]
    try:
        default = registered()
        decoder = default.get_text_config(decoder=True)
        text_only = type(decoder) in MODEL_FOR_CAUSAL_LM_MAPPING
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(decoder) if text_only else registered]
        config = shrink(decoder)
    except (ImportError, TypeError, StrictDataclassError) as error:
        raise CannotBuild(" ".join(str(error).split())) from error
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model_class(config).parameters())
    if parameters > MAX_PARAMETERS:
        raise CannotBuild(f"{parameters} parameters are more than {MAX_PARAMETERS}")
    # Building can write into the configuration, so the real model gets a fresh one.
    config = shrink(decoder)
    torch.manual_seed(seed)
    return model_class(config).float().train()


def shrink(default: PreTrainedConfig, nested: bool = False) -> PreTrainedConfig:
    """Return a tiny configuration of the same class.

    Args:
        default: A configuration with its default values.
        nested: Whether it is a part of another configuration.
    """
    default.allow_global_per_layer_attribute_access = True
    fields = {f.name for f in dataclasses.fields(default)}
    values = {name: getattr(default, name, None) for name in fields}
    layers = _layers(default, values)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = shrink(value, nested=True)
        elif name in FEATURES:
            tiny[name] = FEATURES[name]
        elif name in DEPTHS and _is_int(value):
            tiny[name] = len(layers)
        elif isinstance(value, list | tuple):
            if _kinds(value, _depth(default)):
                tiny[name] = [_size(name, value[layer]) for layer in layers]
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            tiny[name] = 0.0
        elif nested and name in ENCODER_SIZES and _is_int(value):
            tiny[name] = ENCODER_SIZES[name]
        elif _is_int(value) and value and name in SIZES:
            tiny[name] = SIZES[name]
    _tie_sizes(values, tiny)
    tiny.update(SPECIAL.get(default.model_type, {}))
    return type(default)(**tiny)


def _tie_sizes(values: dict[str, Any], tiny: dict[str, Any]) -> None:
    """Keep the relations between sizes that the default configuration has."""
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if _is_int(heads) and _is_int(kv_heads):
        if heads == kv_heads and "kv_lora_rank" in values:
            tiny["num_key_value_heads"] = tiny["num_attention_heads"]
        elif kv_heads == 1:
            tiny["num_key_value_heads"] = 1
    rope, head = values.get("qk_rope_head_dim"), values.get("head_dim")
    if _is_int(rope) and _is_int(head) and "head_dim" in tiny:
        tiny["head_dim"] = tiny["qk_rope_head_dim"] * max(1, head // rope)
    for groups in ("n_group", "num_expert_group"):
        if values.get(groups) == 1:
            tiny[groups] = 1
    for active in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k"):
        if values.get(active) == 1:
            tiny[active] = 1


def _size(name: str, value: Any) -> Any:
    return SIZES.get(name, value) if _is_int(value) and value else value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _depth(config: PreTrainedConfig) -> int:
    return next((n for name in DEPTHS if _is_int(n := getattr(config, name, None))), 0)


def _kinds(value: Any, depth: int) -> bool:
    """Tell whether a value is a list that gives every layer its kind."""
    if not isinstance(value, list | tuple) or len(value) != depth or not depth:
        return False
    return all(isinstance(v, str | int | float) for v in value) and len(set(value)) <= MAX_KINDS


def _layers(config: PreTrainedConfig, values: dict[str, Any]) -> list[int]:
    """Pick the default layers to keep: the first of each kind, and at least two."""
    depth = _depth(config)
    lists = [value for _, value in sorted(values.items()) if _kinds(value, depth)]
    first: dict[tuple[Any, ...], int] = {}
    for layer in range(depth):
        first.setdefault(tuple(kinds[layer] for kinds in lists), layer)
    picked = sorted(first.values())
    return picked if len(picked) > 1 else [0, min(1, max(depth - 1, 0))]


def step_inputs(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments with which the model's output has a loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ID, LAST_ID, (BATCH, LENGTH), generator=generator)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids.clone()}
    kind = model.config.model_type
    if kind in CODEBOOKS:
        inputs["input_ids"] = ids.repeat_interleave(model.config.num_codebooks, dim=0)
        inputs["labels"] = ids.unsqueeze(-1).expand(-1, -1, model.config.num_codebooks)
    if kind in PICTURES:
        vision = model.config.vision_config
        shape = (BATCH, vision.num_channels, vision.image_size, vision.image_size)
        inputs["pixel_values"] = torch.randn(shape, generator=generator)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def targets(model: nn.Module) -> list[str]:
    """Return the names that make LoRA cover every linear layer of the decoder blocks.

    A name is the last part of the modules' paths, with as many parts before it as it takes to
    match no other module (the output head, a router that is not a plain linear layer).
    """
    paths = [path for path, _ in model.named_modules()]
    modules = dict(model.named_modules(remove_duplicate=False))
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    excluded = UNTARGETABLE.get(model.config.model_type, frozenset())
    wanted = {path for path in paths if _is_target(path, modules, head, excluded)}
    found: set[str] = set()
    for path in wanted:
        parts = path.split(".")
        start = len(parts) - 1
        while start and (
            parts[start].isdigit()
            or any(_matches(p, ".".join(parts[start:])) for p in paths if p not in wanted)
        ):
            start -= 1
        found.add(".".join(parts[start:]))
    return sorted(found)


def _is_target(
    path: str, modules: dict[str, nn.Module], head: nn.Module | None, excluded: frozenset[str]
) -> bool:
    module, parts = modules[path], path.split(".")
    # Subclasses of these are routers and grouped projections with a forward of their own.
    if type(module) not in (nn.Linear, Conv1D) or module is head or parts[-1] in excluded:
        return False
    parents = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(isinstance(modules[parent], nn.ModuleList) for parent in parents)


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def main(chosen: list[str]) -> None:
    """Build the chosen models (all by default), run one step of each, print a line per name."""
    # Models this small only lose time to threads that wait for each other.
    torch.set_num_threads(1)
    built = 0
    for name in chosen or names():
        start = time.perf_counter()
        try:
            model = build(name)
            loss = model(**step_inputs(model)).loss
            loss.backward()
        except CannotBuild as reason:
            print(f"{name:28} CannotBuild {reason}", flush=True)
            continue
        except Exception as error:
            message = " ".join(str(error).split())[:300]
            print(f"{name:28} FAILED {type(error).__name__}: {message}", flush=True)
            continue
        finite = bool(torch.isfinite(loss))
        built += finite
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{name:28} {'ok' if finite else 'NOT FINITE'} {type(model).__name__}"
            f" {parameters} {loss.item():.3f} {time.perf_counter() - start:.1f}s",
            flush=True,
        )
    print(f"{built} of {len(chosen or names())} built")


if __name__ == "__main__":
    main(sys.argv[1:])
