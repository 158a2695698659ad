"""Loads the model of a recipe."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import RecipeError
from ..recipe.locate import locate
from ..recipe.paths import require_consent
from ..recipe.preferences import head_of
from ..recipe.recipe import Recipe
from ..requirements import attention
from .from_pretrained import class_by_name, class_of, clear_gguf_marks, meta_model, pretrained
from .multimodal import use_cache, weighs_tokens, without_towers
from .precision import device_for_training, dtype_for_training, keep_norms_in_float32
from .quantize import (
    clear_marks,
    leave_head_out,
    quantization,
    quantize,
    quantize_experts,
    stay_trainable,
    take_any_rank,
    unpacking,
)
from .stored import keep_compressed, require_usable, require_whole
from .tokenizer import set_padding

OTHER_EXPERTS = ("scattermoe", "sonicmoe")
"""Implementations of experts that come from other packages than transformers."""

_NOT_OURS = (
    "fan_in_fan_out is set to",  # PEFT adapts the Conv1D of GPT-2 as it should
    "Could not find a config file in",  # PEFT, saving an adapter without a network
    "Setting `save_embedding_layers` to `True`",
    "Slicing a flattened dim from root mesh",  # accelerate, for copies of a sharded model
    "Dynamo detected a call to a `functools.lru_cache`",  # of DeepSpeed's markers for profilers
)
"""Beginnings of warnings from other libraries about what they handle correctly."""


_WARNING = (
    "bitsandbytes", "kernels", "accelerate", "peft",
    "torch.distributed.tensor._redistribute",  # of shards of parts of layers, gathered in two steps
)  # fmt: skip
"""Loggers with warnings about correct behaviour."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of the libraries below out of our output."""
    import transformers

    hf: Any = transformers.utils.logging
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    others = [logging.getLogger(name) for name in _WARNING]
    hub = logging.getLogger("huggingface_hub.utils._http")
    deepspeed = logging.getLogger("DeepSpeed")  # to standard output; sets its level at import
    levels = [logger.level for logger in others]
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    hub.addFilter(_is_no_retry)
    deepspeed.addFilter(_is_error)
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # PEFT, Trainer and DeepSpeed still use names that others have deprecated
            old_names = r"transformers|peft|torch\.distributed"
            warnings.filterwarnings("ignore", category=FutureWarning, module=old_names)
            for start in _NOT_OURS:
                warnings.filterwarnings("ignore", message=start, category=UserWarning)
            yield
    finally:
        hub.removeFilter(_is_no_retry)
        deepspeed.removeFilter(_is_error)
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
        for logger, old in zip(others, levels, strict=True):
            logger.setLevel(old)


def _is_no_retry(record: logging.LogRecord) -> bool:
    """False for a request to the hub that is tried again; the last failure is an error."""
    return not str(record.msg).startswith("Retrying in ") and "thrown while" not in str(record.msg)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def load_model(
    recipe: Recipe, device: torch.device | None = None,
    say: Callable[[str], None] | None = None, trains: bool = False,
) -> Any:  # fmt: skip
    """Load ``base_model`` with the head that is trained, without adapters and without a KV cache.

    Weights of 4 or 8 bits are always made on the training device, the default of ``device``.
    ``say`` is called with a line if the head is new, because the files have none. Raises a
    RecipeError if there is no such model, it cannot be read as the recipe says, or, with
    ``trains``, nothing can be trained over weights that are packed.
    """
    require_consent(recipe)
    device, quantizing = device or device_for_training(), device_for_training()
    dtype = dtype_for_training(recipe.precision(), recipe.adapter is not None)
    config = quantization(recipe, dtype)
    options: dict[str, Any] = {"dtype": dtype, **_hub(recipe)}
    if (name := attention(recipe)[0]) is not None:
        options["attn_implementation"] = name
    if recipe.experts_implementation not in (None, *OTHER_EXPERTS):
        options["experts_implementation"] = recipe.experts_implementation
    dense = locate(recipe.base_model, [Path.cwd()]).gguf_file is not None
    if config is not None and not dense:
        options |= {"quantization_config": config, "device_map": {"": quantizing}}
    if (unpacked := unpacking(recipe)) is not None:
        options["quantization_config"] = unpacked
    head = head_of(recipe)
    changed = recipe.base_model_config or recipe.overrides_of_model_config
    if changed or recipe.cls_model_config or head.classifies:
        options["config"] = load_config(recipe)
    if config is not None and head.classifies:
        leave_head_out(config, meta_model(recipe, options["config"]))
    if not dense:
        require_usable(recipe, options.get("config") or load_config(recipe), trains)
    model = _read(recipe, {**options, **(recipe.overrides_of_model_kwargs or {})}, say)
    clear_gguf_marks(model)
    require_whole(model)
    keep_compressed(model)
    if unpacked is not None:
        clear_marks(model)
    keep_norms_in_float32(model, recipe)
    # with a cache transformers neither makes the mask of a pack nor needs what it stores
    use_cache(model.config, False)
    set_padding(model.config, recipe)
    if getattr(model, "accepts_loss_kwargs", None) is False and not head.classifies:
        model.accepts_loss_kwargs = weighs_tokens(meta_model(recipe, load_config(recipe)))
    if recipe.checkpointing():
        _checkpoint(model, recipe.gradient_checkpointing_kwargs)
    if config is None:
        return model.to(device)
    if dense:
        quantize(model, config, quantizing)
    stay_trainable(model)
    if recipe.load_in_8bit:
        take_any_rank(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model = model.to(quantizing) if dense else model
    quantize_experts(model, recipe, config)
    return model


def _read(recipe: Recipe, options: dict[str, Any], say: Callable[[str], None] | None) -> Any:
    """Read the model from its files; a head that they lack begins from the recipe's seed."""
    head = head_of(recipe)

    def on_new_head(names: Sequence[str]) -> None:
        if say is not None and not recipe.lora_model_dir:  # which brings its own
            say(f"new head ({', '.join(names)}), initialized from seed {recipe.seed}: "
                f"{recipe.base_model} has none that fits")  # fmt: skip

    kind = smaller = _class(recipe, options)
    if recipe.language_model_only:
        kind = type(meta_model(recipe, options.get("config") or load_config(recipe)))
        smaller = without_towers(kind)
    gpu = device_for_training()
    with torch.random.fork_rng([gpu] if gpu.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        if recipe.reinit_weights:
            model = _random(smaller, recipe, options)
        else:
            model = pretrained(
                smaller, recipe.base_model, on_new_head=on_new_head if head.classifies else None,
                **options,
            )  # fmt: skip
    if type(model) is smaller:
        model.__class__ = kind
    return model


def _class(recipe: Recipe, options: dict[str, Any]) -> Any:
    """The class to load a recipe's model with, of which the configuration is read if needed."""
    config = options.get("config")
    is_gguf = locate(recipe.base_model, [Path.cwd()]).gguf_file is not None
    if config is None and not is_gguf and not head_of(recipe).classifies:
        config = load_config(recipe)
    return class_of(recipe, config)


def _random(kind: Any, recipe: Recipe, options: Mapping[str, Any]) -> Any:
    """A model of the configuration with random weights."""
    config = options.get("config") or load_config(recipe)
    names = ("dtype", "attn_implementation", "experts_implementation", "trust_remote_code")
    kwargs = {name: options[name] for name in names if name in options}
    if hasattr(kind, "from_config"):  # an auto class
        return kind.from_config(config, **kwargs)
    del kwargs["trust_remote_code"]
    return kind._from_config(config, **kwargs)


def _hub(recipe: Recipe) -> dict[str, Any]:
    """The options that decide which files of a model on the hub are read, and run."""
    options: dict[str, Any] = {"trust_remote_code": recipe.consent.trust_remote_code}
    if recipe.revision_of_model:
        options["revision"] = recipe.revision_of_model
    return options


def load_config(recipe: Recipe) -> Any:
    """The configuration of the model, with the values that the recipe overrides.

    Raises a RecipeError if it cannot be read, or has no such values.
    """
    require_consent(recipe)
    config = pretrained(
        class_by_name(
            recipe.cls_model_config, "AutoConfig", "PreTrainedConfig", "cls_model_config"
        ),
        recipe.base_model_config or recipe.base_model,
        kind="config",
        key="base_model_config" if recipe.base_model_config else "base_model",
        **_hub(recipe),
    )
    for name, value in (recipe.overrides_of_model_config or {}).items():
        if not hasattr(config, name):
            raise RecipeError(
                f"overrides_of_model_config: {type(config).__name__} has no attribute {name}"
            )
        setattr(config, name, value)
    if (labels := head_of(recipe).labels) is not None:
        config.num_labels = labels
    return config


def _checkpoint(model: Any, options: dict[str, Any] | None) -> None:
    """Checkpoint each block, under the name that this version of transformers has for it."""
    options = {"use_reentrant": False, **(options or {})}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def fit_embeddings(model: Any, tokenizer: Any, recipe: Recipe) -> int:
    """Give every token of the tokenizer a row in the embeddings, and return the number of new rows.

    Raises a RecipeError if an adapter would leave the new rows untrained, and not save them.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    size = len(tokenizer)
    if recipe.resize_token_embeddings_to_32x:
        size = -(-size // 32) * 32
    if size == rows or (size < rows and not recipe.shrink_embeddings):
        return 0
    names, saved = _vocabulary(model), tuple(recipe.lora_modules_to_save or ())
    if recipe.adapter and not all(name.endswith(saved) for name in names):  # as PEFT finds them
        raise RecipeError(
            f"the vocabulary has {size} tokens and the model {rows} embeddings; with an adapter, "
            f"the new ones are trained and saved only with lora_modules_to_save: "
            f"[{', '.join(name.rpartition('.')[2] for name in names)}]"
        )
    model.resize_token_embeddings(size, mean_resizing=recipe.mean_resizing_embeddings)
    return size - rows


def _vocabulary(model: Any) -> list[str]:
    """The names, in their parents, of the modules with a row for each token."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, m in model.named_modules() if any(m is b for b in both)]
