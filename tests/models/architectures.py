"""Tiny random instances of the models that transformers registers for language.

Causal language models, models of several media, classifiers of texts, base models whose hidden
states are embeddings, and encoder-decoders: `KINDS`. `build` shrinks the default configuration of a
registered name: sizes come from one table, the layers are a subset of the default ones with every
kind of layer in it, dropout is off. What single families insist on stands in `special.SPECIAL`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import sys
import time
from collections.abc import Collection, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto as auto
from transformers.pytorch_utils import Conv1D

from . import media
from .special import (
    CODEBOOKS,
    DEPTHS,
    ENCODER_SIZES,
    FEATURES,
    IMPOSSIBLE,
    LISTS,
    PARTS,
    PICTURES,
    SAME_LENGTH,
    SIZES,
    SPECIAL,
    TOKENS,
    UNTARGETABLE,
    WHOLE,
)

MAX_PARAMETERS = 25_000_000
BATCH, LENGTH = media.BATCH, 24
FIRST_ID, LAST_ID = media.FIRST_ID, media.LAST_ID
# A per-layer list with more distinct values than this is a list of indices or the like.
MAX_KINDS = 4


class CannotBuild(Exception):
    """A registered name has no tiny model that trains."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a model is registered for.

    Attributes:
        names: the registered names.
        classes: configuration class -> model class; the first that has it counts.
    """

    names: tuple[str, ...]
    classes: tuple[Mapping[Any, Any], ...]

    def model(self, config: type) -> Any:
        """The model class of a configuration class, or None."""
        for classes in self.classes:
            with contextlib.suppress(KeyError):
                found = classes[config]
                return found[0] if isinstance(found, tuple) else found
        return None


def _registered(*mappings: Collection[str], but: Collection[str] = ()) -> tuple[str, ...]:
    return tuple(sorted(set().union(*mappings) - set(but)))


_SEVERAL = _registered(
    auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
)
# Encoder-decoders are measured with their loss; of some, transformers knows the encoder alone.
_WITH_ENCODER = _registered(
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    auto.MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES,
    but=auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
_OF_TEXT = _registered(
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    but=_SEVERAL + _WITH_ENCODER,
)
KINDS: dict[str, Kind] = {
    "causal": Kind(
        _registered(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), (auto.MODEL_FOR_CAUSAL_LM_MAPPING,)
    ),
    "multimodal": Kind(
        _SEVERAL,
        (auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
    ),
    "classification": Kind(
        _registered(auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,),
    ),
    "embedding": Kind(
        tuple(n for n in _OF_TEXT if n in auto.MODEL_MAPPING_NAMES),
        (auto.MODEL_FOR_TEXT_ENCODING_MAPPING, auto.MODEL_MAPPING),
    ),
    "encoder-decoder": Kind(
        _registered(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, but=_SEVERAL),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,),
    ),
}


def names(kind: str = "causal") -> list[str]:
    """Return all registered names of a kind, sorted."""
    return list(KINDS[kind].names)


def build(name: str, kind: str = "causal", seed: int = 0) -> nn.Module:
    """Build the tiny model of a registered name, in fp32 and train mode.

    Args:
        name: A name from `names(kind)`.
        kind: A key of `KINDS`.
        seed: Seeds the random weights.

    Returns:
        The model; of a multimodal one, the text decoder alone where the kind has that.

    Raises:
        CannotBuild: The name has no model that trains on random inputs.
    """
    if (kind, name) in IMPOSSIBLE:
        raise CannotBuild(IMPOSSIBLE[kind, name])
    registered = CONFIG_MAPPING[name]
    try:
        default = registered(**({} if kind == "causal" else PARTS.get(name, {})))
        part = default
        whole = kind in ("multimodal", "encoder-decoder") or default.is_encoder_decoder
        if kind == "causal" or not whole:
            part = default.get_text_config(decoder=True)
        if (model_class := KINDS[kind].model(type(part))) is None:
            model_class = KINDS[kind].model(registered)
        config = shrink(part, decoder=kind == "causal")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model_class(config).parameters())
    except (ImportError, TypeError, StrictDataclassError) as error:
        raise CannotBuild(" ".join(str(error).split())) from error
    if parameters > MAX_PARAMETERS:
        raise CannotBuild(f"{parameters} parameters are more than {MAX_PARAMETERS}")
    # Building can write into the configuration, so the real model gets a fresh one.
    config = shrink(part, decoder=kind == "causal")
    torch.manual_seed(seed)
    model = model_class(config).float().train()
    if kind != "causal":
        _fill_zeros(model)
    return model


def _fill_zeros(model: nn.Module) -> None:
    """Draw what begins as zeros anew: behind a closed gate, nothing has a gradient."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and not parameter.any():
                nn.init.normal_(parameter, std=0.1)


def shrink(
    default: PreTrainedConfig, nested: bool = False, decoder: bool = True
) -> PreTrainedConfig:
    """Return a tiny configuration of the same class.

    Args:
        default: A configuration with its default values.
        nested: Whether it is a part of another configuration.
        decoder: Whether what can be an encoder is made a decoder.
    """
    default.allow_global_per_layer_attribute_access = True
    fields = {f.name for f in dataclasses.fields(default)}
    values = {name: getattr(default, name, None) for name in fields}
    layers = _layers(default, values)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = shrink(value, nested=True, decoder=decoder)
        elif name in FEATURES and (decoder or name != "is_decoder"):
            tiny[name] = FEATURES[name]
        elif name in ("is_decoder", "add_cross_attention") and value:
            tiny[name] = value
        elif name in TOKENS and (_is_int(value) or (value is None and not (nested or decoder))):
            tiny[name] = TOKENS[name]
        elif name in LISTS and value:
            tiny[name] = LISTS[name]
        elif name in DEPTHS and _is_int(value):
            tiny[name] = len(layers)
        elif isinstance(value, list | tuple):
            if _kinds(value, _depth(default)):
                tiny[name] = [_size(name, value[layer]) for layer in layers]
            elif nested and ("indexes" in name or "indices" in name) and layers:
                tiny[name] = [len(layers) - 1]
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            tiny[name] = 0.0
        elif (nested or not decoder) and name in ENCODER_SIZES and _is_int(value):
            tiny[name] = ENCODER_SIZES[name]
        elif not decoder and name.startswith("initializer_") and 0.0 < value < 1e-3:
            tiny[name] = 0.02  # weights of nothing make a constant of a layer
        elif _is_int(value) and value and name in SIZES:
            tiny[name] = SIZES[name]
    _tie_sizes(values, tiny)
    if nested and isinstance(rope := values.get("rope_parameters"), dict):
        _shorten_sections(rope, tiny)
    tiny.update(SPECIAL.get(default.model_type, {}))
    if not decoder:
        if default.is_encoder_decoder and not nested:
            tiny["decoder_start_token_id"] = 0
        tiny.update(WHOLE.get(default.model_type or type(default).__name__, {}))
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


def _shorten_sections(rope: dict[str, Any], tiny: dict[str, Any]) -> None:
    """Share a head's frequencies out between time, height and width."""
    if "mrope_section" in rope:
        half = tiny.get("head_dim", SIZES["head_dim"]) // 2
        half = int(half * rope.get("partial_rotary_factor", 1.0))
        side = half // 3
        tiny["rope_parameters"] = {**rope, "mrope_section": [half - 2 * side, side, side]}


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


def step_inputs(model: nn.Module, kind: str = "causal") -> dict[str, Any]:
    """Return keyword arguments for one step of training."""
    if kind == "multimodal" or hasattr(model.config, "audio_config"):
        return media.batch(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ID, LAST_ID, (BATCH, LENGTH), generator=generator)
    if kind == "causal":
        return _causal_inputs(model, ids, generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "encoder-decoder":
        length = LENGTH if model.config.model_type in SAME_LENGTH else LENGTH // 2
        labels = torch.randint(FIRST_ID, LAST_ID, (BATCH, length), generator=generator)
        return {**inputs, "labels": labels}
    if kind == "classification":
        if model.config.is_encoder_decoder:
            ids[:, -1] = model.config.eos_token_id
        inputs["labels"] = torch.arange(BATCH) % 2
    return inputs


def _causal_inputs(model: nn.Module, ids: Tensor, generator: torch.Generator) -> dict[str, Any]:
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


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The model's own loss; without labels, one of its embeddings: the means of hidden states."""
    output = model(**inputs)
    if (loss := getattr(output, "loss", None)) is not None:
        return loss
    embeddings = output.last_hidden_state.mean(1)
    wanted = torch.linspace(-1, 1, embeddings.numel(), dtype=embeddings.dtype)
    return (embeddings - wanted.view_as(embeddings)).square().mean()


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


def linears(model: nn.Module) -> list[str]:
    """Return the paths of all linear layers but the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    excluded = UNTARGETABLE.get(model.config.model_type, frozenset())
    return [
        path
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
        and module is not head
        and path.rpartition(".")[2] not in excluded
    ]


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


def main(kind: str = "causal", *chosen: str) -> None:
    """Build the chosen models (all by default), run one step of each, print a line per name."""
    # Models this small only lose time to threads that wait for each other.
    torch.set_num_threads(1)
    built = 0
    for name in chosen or names(kind):
        start = time.perf_counter()
        try:
            model = build(name, kind)
            loss = loss_of(model, step_inputs(model, kind))
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
    print(f"{built} of {len(chosen or names(kind))} built")


if __name__ == "__main__":
    main(*sys.argv[1:])
