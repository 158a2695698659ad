"""The model of a recipe: its weights, its tokenizer, its adapters."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RecipeError
from .recipe import Recipe
from .source import Source, locate


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress bars and warnings of the libraries below out of our own output."""
    import transformers

    hf: Any = transformers.utils.logging
    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    others = [logging.getLogger(name) for name in ("bitsandbytes", "accelerate", "peft")]
    levels = [logger.level for logger in others]
    hf.set_verbosity_error()
    hf.disable_progress_bar()
    for logger in others:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # PEFT and Trainer still use names that transformers has deprecated
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|peft")
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
        for logger, old in zip(others, levels, strict=True):
            logger.setLevel(old)


def device_for_training() -> torch.device:
    """The device that the trainer will use."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else (torch.device("cpu"))
    )


def dtype_for_training(bf16: bool | str) -> torch.dtype:
    """The dtype of the weights, from the recipe's ``bf16``."""
    if bf16 == "auto":
        bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def load_model(recipe: Recipe) -> Any:
    """Load ``base_model`` on the training device, without adapters and without a KV cache.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype_for_training(recipe.bf16)}
    if recipe.attn_implementation:
        options["attn_implementation"] = recipe.attn_implementation
    model = pretrained(AutoModelForCausalLM, recipe.base_model, **options)
    forget_gguf(model)
    # with a cache transformers neither makes the mask of a pack nor needs what it stores
    model.config.use_cache = False
    if recipe.gradient_checkpointing:
        _checkpoint(model)
    return model.to(device_for_training())


def _checkpoint(model: Any) -> None:
    """Checkpoint each block, by the name that this transformers has for it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def add_adapter(model: nn.Module, recipe: Recipe) -> Any:
    """Wrap ``model`` with the adapters that the recipe asks for, if any.

    Raises:
        RecipeError: ``lora_target_modules`` names layers that the model does not have.
    """
    if recipe.adapter is None:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=_targets(model, recipe),
    )
    return get_peft_model(model, config)  # adapters in fp32 beside bf16 weights: PEFT's default


def parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _targets(model: Any, recipe: Recipe) -> list[str] | str:
    named = recipe.lora_target_modules or []
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in named if name.rpartition(".")[2] not in present]
    if unknown:
        raise RecipeError(f"lora_target_modules: the model has no layer {', '.join(unknown)}")
    if not recipe.lora_target_linear:
        return named
    if not named:
        return "all-linear"
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    return sorted(linear | set(named))


def pretrained(factory: Any, name: str, **options: Any) -> Any:
    """Call ``factory.from_pretrained`` for whatever ``base_model`` may be.

    Args:
        factory: one of the Auto classes of transformers.
        name: as a recipe's ``base_model``.
        options: for ``from_pretrained``.

    Raises:
        RecipeError: there is none, or it cannot be read.
    """
    source = locate(name, [Path.cwd()])
    if source.gguf_file:
        options |= _gguf(source, options)
    bar = contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else None
    try:
        with bar or contextlib.nullcontext():  # unpacking a GGUF file draws its own progress bar
            return factory.from_pretrained(source.name, **options)
    except (OSError, ValueError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"base_model: {name} cannot be loaded: {first}") from error


def _gguf(source: Source, options: dict[str, Any]) -> dict[str, Any]:
    """What ``from_pretrained`` needs for a GGUF file: dense weights, made from its blocks."""
    extra: dict[str, Any] = {"gguf_file": source.gguf_file}
    if "dtype" in options:  # a model; older transformers always unpack, and have no such config
        with contextlib.suppress(ImportError):
            from transformers import GgufConfig

            extra["quantization_config"] = GgufConfig(dequantize=True)
    return extra


def forget_gguf(model: Any) -> None:
    """Clear the marks of a GGUF file, whose weights are plain now; else nothing can be saved."""
    kind = getattr(model, "quantization_method", None)
    if str(getattr(kind, "value", kind)) != "gguf":
        return
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
