"""Checkpoints of a language model with towers (for images, sound, video).

The language model is what has the configuration's ``text_config``, with its embeddings and its
head; the towers, and what projects their outputs, are everything else.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from ...errors import RecipeError
from ..recipe.methods_table import LANGUAGE_HEAD
from ..recipe.recipe import Recipe
from .quantize import head_modules

_CAUSAL = LANGUAGE_HEAD.auto
_TABLES = {
    _CAUSAL: "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMultimodalLM": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}
"""The Auto classes of models that write text, with their tables by types of models."""

_MULTIMODAL = tuple(auto for auto in _TABLES if auto != _CAUSAL)


# --- the class of a checkpoint --------------------------------------------------------------------


def auto_class(config: Any) -> str:
    """The Auto class that loads a configuration's checkpoint as it was saved, with all tensors.

    ``config`` is a configuration, or the content of its file.
    """
    is_content = isinstance(config, Mapping)
    ours = is_content or type(config).__module__.startswith("transformers.")
    kind, named, remote = (
        config.get(key) if is_content else getattr(config, key, None)
        for key in ("model_type", "architectures", "auto_map")
    )
    if remote and not ours:  # a class that comes with the checkpoint
        return next((name for name in (_CAUSAL, *_MULTIMODAL) if name in remote), _CAUSAL)
    causal = _names(_CAUSAL, kind)
    for auto in _MULTIMODAL:
        classes = _names(auto, kind)
        # where a type has both, the causal one loads only a part of the checkpoint
        if classes and not set(causal) & {*classes, *(named or ())}:
            return auto
    return _CAUSAL


def is_multimodal(config: Any) -> bool:
    """Whether transformers has a class for text and more for the type of a configuration."""
    return any(_names(auto, config.model_type) for auto in _MULTIMODAL)


def _names(auto: str, model_type: Any) -> tuple[str, ...]:
    """The classes that an Auto class has for a type of models."""
    from transformers.models.auto import modeling_auto

    mapping: Any = getattr(modeling_auto, _TABLES[auto], {})
    names = mapping.get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)


def require_text(model: Any, name: str) -> None:
    """Raise a RecipeError if a model of transformers cannot be trained on text alone."""
    kind = type(model)
    ours = kind.__module__.startswith("transformers.")
    if not ours or kind.__name__ in _names(_CAUSAL, model.config.model_type):
        return
    about = inspect.signature(kind.forward).parameters
    needed = [
        p.name for p in about.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        and p.name not in ("self", "input_ids")
    ]  # fmt: skip
    problem = None
    if needed:
        problem = f"needs {' and '.join(needed)} in every call"
    elif "input_ids" not in about or "labels" not in about:
        problem = "does not write text after text"
    elif model.config.is_encoder_decoder:
        problem = "is an encoder and a decoder"
    if problem is not None:
        raise RecipeError(
            f"base_model: {name} is a {kind.__name__}, which {problem}: it cannot be trained on "
            "text alone; use a model that generates text from text"
        )


# --- its parts ------------------------------------------------------------------------------------


def towers(model: Any) -> list[str]:
    """The paths of the outermost modules, and of single parameters, outside the language model.

    Empty for a plain language model.
    """
    from transformers import PreTrainedModel

    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return []
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # several, of which none is the one
        return []
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if text is config:
        if not is_multimodal(config):
            return []
        # one configuration for text and all: what has another one is a tower
        names = {id(m): path for path, m in model.named_modules()}
        foreign = [names[id(m)] for m in parts if type(m.config) is not type(config)]
        return [p for p in foreign if not any(p.startswith(f"{q}.") for q in foreign)]
    language = [m for m in parts if m.config is text]
    if not language:
        return []
    ends = (model.get_input_embeddings(), *head_modules(model).values())
    inside = {id(m) for part in (*language, *ends) if part is not None for m in part.modules()}
    return list(_outside(model, "", inside))


def _outside(module: nn.Module, path: str, inside: set[int]) -> Iterator[str]:
    for name, child in module.named_children():
        place = f"{path}{name}"
        if id(child) in inside:
            continue
        if any(id(m) in inside for m in child.modules()):
            yield from _outside(child, f"{place}.", inside)
        else:
            yield place
    for name, _ in module.named_parameters(recurse=False):
        yield f"{path}{name}"


def is_in(name: str, places: Iterable[str]) -> bool:
    """Whether a module or parameter is one of ``places``, or in one."""
    return any(name == place or name.startswith(f"{place}.") for place in places)


def tower_parameters(model: Any) -> list[nn.Parameter]:
    """The parameters of towers, with those of their adapters."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    places = towers(base)
    return [p for name, p in base.named_parameters() if is_in(name, places)]


def left_out(model: Any, recipe: Recipe) -> list[str]:
    """The parts in which a recipe trains nothing: towers, unless it says otherwise."""
    return towers(model) if recipe.freeze_mm_modules else []


def pattern_of(places: Iterable[str]) -> str | None:
    """A regular expression for the whole names of all modules in ``places``; None: for none."""
    either = "|".join(map(re.escape, places))
    return rf"(?:{either})(?:\..*)?" if either else None


def freeze(model: Any, places: Iterable[str]) -> None:
    """Train nothing in ``places``, such as towers, to which text gives no gradients."""
    for name, parameter in model.named_parameters():
        if is_in(name, places):
            parameter.requires_grad_(False)


def language_path(model: Any) -> str:
    """The path of the language model, without its head, in a model that has towers, too."""
    from transformers import PreTrainedModel

    text = model.config.get_text_config(decoder=True)
    paths = [name for name, m in model.named_modules()
             if isinstance(m, PreTrainedModel) and m.config is text]  # fmt: skip
    # a language model with its head in it has its backbone below, with the same configuration
    return max(paths, key=len, default="")


def use_cache(config: Any, value: bool) -> None:
    """Switch the cache of keys and values on or off, in the configurations of parts, too."""
    config.use_cache = value
    for name in getattr(config, "sub_configs", ()):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "use_cache"):
            use_cache(part, value)


def weighs_tokens(model: Any) -> bool:
    """Whether a model divides the sum of its loss by the number of tokens that a call names.

    Classes for images say that they do not (``accepts_loss_kwargs``), of the time when they left
    out the tokens of images, and most of them do. ``model`` is on the meta device, and cannot be
    used afterwards.
    """
    import torch

    counts: list[Any] = []

    def loss(*_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
        counts.append(num_items_in_batch)
        return torch.zeros((), device="meta")

    size = model.config.get_text_config(decoder=True).hidden_size
    states = torch.zeros(1, 2, size, dtype=model.dtype, device="meta")
    model.loss_function = loss
    if model.base_model is not model:  # what is below the head may need values
        model.base_model.forward = lambda *_, **__: _HiddenStates(states)
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        model(input_ids=ids, labels=ids, num_items_in_batch=1)
    except Exception:  # a model's code raises anything
        return False
    return counts == [1]


class _HiddenStates:
    """The outputs of a backbone that has no others."""

    def __init__(self, last: Any) -> None:
        self.last_hidden_state = last

    def __getitem__(self, index: int) -> Any:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None


class NotLoaded(nn.Module):
    """A tower that was not loaded, as ``language_model_only`` says."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Never called in training on text."""
        raise RecipeError(
            "language_model_only: the model calls a part that was not loaded: leave the key out"
        )


def without_towers(kind: type[Any]) -> type[Any]:
    """A class like ``kind`` whose models have no towers, so that their weights are not loaded.

    Give a loaded model ``kind`` as its class again.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        remove_towers(self)

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def remove_towers(model: Any) -> None:
    """Replace each tower by one without weights."""
    for place in towers(model):
        path, _, name = place.rpartition(".")
        parent = model.get_submodule(path)
        if name in parent._parameters:
            parent._parameters[name] = None
        else:
            setattr(parent, name, NotLoaded())


# --- its files ------------------------------------------------------------------------------------


def names_in_model(model: Any, keys: Iterable[str], renamed_only: bool = False) -> dict[str, str]:
    """For each key in a checkpoint's files, the name of the tensor in ``model``.

    Where several become one tensor (or one changes), each has that one's name; ``renamed_only``
    leaves these out. A key that the class does not load stays as it is.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
    state |= {name: True for name, _ in model.named_buffers()}
    prefix, names = model.base_model_prefix or None, {}
    for key in sorted(keys):
        name, converted = rename_source_key(key, renamings, converters, prefix, state)
        if not (renamed_only and converted):
            names[key] = name
    return names


def untrained_towers(model: Any) -> list[str]:
    """The paths of towers in which nothing is trained."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return [place for place in towers(model) if not any(is_in(name, [place]) for name in trained)]


def untrained(model: Any, keys: Iterable[str]) -> list[str]:
    """The keys in a base model's files that ``model`` does not train: towers, and what it ignores.

    These are tensors that the class does not load, such as the layers for several tokens at a time
    (``mtp``), but not buffers that it computes itself, nor the scales of weights that it loads.
    """
    places = untrained_towers(model)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    own = {name.rpartition(".")[2] for name, _ in model.named_buffers()} | {"inv_freq"}
    modules, names = dict(model.named_modules()), names_in_model(model, keys)
    ignored = (
        key for key, name in names.items()
        if not _is_of(name, known) and name.rpartition(".")[2] not in own
        and not _is_inside(name, modules)
    )  # fmt: skip
    wanted = {*ignored, *(key for key, name in names.items() if is_in(name, places))}
    return [key for key in keys if key in wanted]


def _is_inside(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a tensor is of a module that is loaded, in whatever form its weights are stored."""
    parent = name.rpartition(".")[0]
    if parent in modules:
        return True
    while parent not in modules:  # the experts of a layer may be one module, and apart in the files
        parent = parent.rpartition(".")[0]
    return bool(modules[parent]._parameters)


_OF_8_BITS = (".SCB", ".weight_format")


def _is_of(name: str, parameters: Collection[str]) -> bool:
    """Whether a tensor is a parameter, or belongs to one that bitsandbytes has packed."""
    for end in _OF_8_BITS:
        if name.endswith(end):
            name = f"{name.removesuffix(end)}.weight"
    parts = name.split(".")
    return any(".".join(parts[:n]) in parameters for n in range(1, len(parts) + 1))
