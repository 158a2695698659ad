"""Quantizes frozen weights to 4 or 8 bits with bitsandbytes."""

from __future__ import annotations

import functools
import importlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import RecipeError
from ...kernels.linear.quantized import Quantized
from ...kernels.moe.packed_experts import PackedExperts
from ..recipe.deepspeed_config import stage
from ..recipe.recipe import Recipe
from .stored import is_stored, unpacked_weight


def quantization(recipe: Recipe, dtype: torch.dtype) -> Any:
    """The ``BitsAndBytesConfig`` that the recipe asks for, or None.

    Four bits are NF4 with quantized scales, computed in ``dtype``, and stored in it where they are
    sharded; ``bnb_config_kwargs`` take precedence. Raises a RecipeError if ``BitsAndBytesConfig``
    does not accept them.
    """
    if not (recipe.load_in_4bit or recipe.load_in_8bit):
        return None
    import transformers

    make: Any = transformers.BitsAndBytesConfig
    options: dict[str, Any] = {"load_in_8bit": True}
    if recipe.load_in_4bit:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
        if (storage := quant_storage(recipe)) is not None:
            options["bnb_4bit_quant_storage"] = dtype if storage == "auto" else storage
    kwargs = recipe.bnb_config_kwargs or {}
    unknown = sorted(set(kwargs) - set(vars(make())))
    if unknown:
        raise RecipeError(f"bnb_config_kwargs: BitsAndBytesConfig has no {', '.join(unknown)}")
    try:
        return make(**{**options, **kwargs})
    except (TypeError, ValueError, AttributeError, ImportError) as error:
        raise RecipeError(f"bnb_config_kwargs: {error}") from error


def quant_storage(recipe: Recipe) -> str | None:
    """The dtype in which weights of 4 bits are stored; None: bitsandbytes' default, uint8.

    Shards can be gathered only where all weights have a floating-point dtype, so it is the dtype of
    computation under FSDP and ZeRO-3, or ``"auto"``: that of the model's other weights. Each value
    holds as many 4-bit weights as fit.
    """
    if not recipe.load_in_4bit:
        return None
    kwargs = recipe.bnb_config_kwargs or {}
    if (storage := kwargs.get("bnb_4bit_quant_storage")) is not None:
        return _name(storage)
    config = recipe.strategy()
    if config.fsdp is None and stage(config.deepspeed or {}) != 3:
        return None
    compute = kwargs.get("bnb_4bit_compute_dtype")
    return recipe.precision() if compute is None else _name(compute)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def unpacking(recipe: Recipe) -> Any:
    """The transformers configuration that unpacks the base model while it is loaded, or None.

    Raises a RecipeError if it does not take ``model_quantization_config_kwargs``.
    """
    if recipe.model_quantization_config is None:
        return None
    import transformers

    name = recipe.model_quantization_config
    make: Any = getattr(transformers, name, None)
    if make is None:
        raise RecipeError(f"model_quantization_config: this transformers has no {name}")
    try:
        return make(**(recipe.model_quantization_config_kwargs or {}))
    except (TypeError, ValueError, ImportError) as error:
        raise RecipeError(f"model_quantization_config_kwargs: {error}") from error


def head_modules(model: Any) -> dict[str, nn.Module]:
    """The modules of a model's head, by name: what it has above its backbone, without adapters."""
    output = model.get_output_embeddings()
    if output is not None:  # that of a language model
        return {name: module for name, module in model.named_modules() if module is output}
    backbone = set(model.base_model.modules())  # the model itself, if it has no other
    return {name: module for name, module in model.named_modules()
            if module not in backbone and module is not model}  # fmt: skip


def leave_head_out(config: Any, model: Any) -> None:
    """Let the head of a classifier keep its weights: they are new, and trained.

    ``config`` is changed in place; of the model only the structure is read. Bitsandbytes and
    transformers leave out the last module by themselves, but not one with a bias.
    """
    config.llm_int8_skip_modules = [*(config.llm_int8_skip_modules or ()), *head_modules(model)]


def quantize(model: nn.Module, config: Any, device: torch.device) -> None:
    """Quantize the linear layers of a loaded model in place on ``device``, all but the output head.

    For weights that transformers cannot quantize while it loads them, such as those of a GGUF file.
    The result is what ``from_pretrained`` makes of the same weights.
    """
    skipped = set(config.llm_int8_skip_modules or ())
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    for parent_name, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            path = f"{parent_name}.{name}".lstrip(".")
            if type(layer) is not nn.Linear or layer is head:
                continue
            if any(path == skip or path.split(".")[-1] == skip for skip in skipped):
                continue
            quantized = _four(layer, config) if config.load_in_4bit else _eight(layer, config)
            quantized.bias = layer.bias
            setattr(parent, name, quantized.to(device).train(layer.training))
    bits = 4 if config.load_in_4bit else 8
    model.__dict__[f"is_loaded_in_{bits}bit"] = True  # PEFT asks for it


_MARKS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit",
          "is_loaded_in_8bit")  # fmt: skip


def clear_marks(model: Any) -> None:
    """Remove the marks of a quantized model once its weights are plain, so that it can be saved."""
    for mark in _MARKS:
        if mark in vars(model):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def dequantize_linears(model: Any, dtype: torch.dtype) -> None:
    """Replace every linear in few bits, with or without adapters, by a plain one, in place.

    The weights are dequantized in the layers' own dtype, then cast to ``dtype``.
    """
    from peft.utils.integrations import dequantize_module_weight

    parent: Any
    layer: Any
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer).__module__.startswith("bitsandbytes."):
                weight = dequantize_module_weight(layer).detach()
            elif is_stored(layer):
                weight = unpacked_weight(layer, dtype)
            else:
                continue
            plain = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
            plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            plain.bias = layer.bias
            setattr(parent, name, plain.train(layer.training))
    clear_marks(model.get_base_model() if hasattr(model, "peft_config") else model)


def stay_trainable(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that gradients go through; call it before the first use.

    On CPUs with AVX-512 bf16, bitsandbytes repacks them at the first evaluation, for a kernel that
    has no backward and raises no error: a later training step would have no gradients below.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def take_any_rank(model: nn.Module) -> None:
    """Let 8-bit layers take inputs of more than three dimensions, in place.

    Without gradients of weights, bitsandbytes returns two dimensions for them (multi-head latent
    attention of transformers expands keys of four).
    """
    plain: Any = importlib.import_module("bitsandbytes.nn").Linear8bitLt
    layer: Any
    for layer in model.modules():
        if type(layer) is plain:
            layer.__class__ = _of_any_rank(plain)  # type: ignore[arg-type]  # 2026-11-30: a class


@functools.cache
def _of_any_rank(kind: Any) -> Any:
    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() <= 3:
            return cast("Tensor", kind.forward(self, x))
        rows: Tensor = kind.forward(self, x.flatten(0, -2))
        return cast("Tensor", rows.unflatten(0, x.shape[:-1]))

    # the names of its base, by which layers of bitsandbytes are known
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _four(layer: nn.Linear, config: Any) -> Any:
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    options = {
        "compress_statistics": config.bnb_4bit_use_double_quant,
        "quant_type": config.bnb_4bit_quant_type,
        "quant_storage": config.bnb_4bit_quant_storage,
    }
    linear = bnb.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None,
        config.bnb_4bit_compute_dtype, device="meta", **options,
    )  # fmt: skip
    linear.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, module=linear, **options)
    return linear


def _eight(layer: nn.Linear, config: Any) -> Any:
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    linear = bnb.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False,
        threshold=config.llm_int8_threshold, device="meta",
    )  # fmt: skip
    linear.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return linear


# --- experts: bare parameters, which are no linear layers ----------------------------------------


def quantize_experts(model: nn.Module, recipe: Recipe, config: Any) -> None:
    """Quantize the bare weights of experts of a loaded model in place, if the recipe says so.

    These are the frozen parameters of three dimensions in modules that have "expert" in their
    names: what Axolotl quantizes, too. Raises a RecipeError if the model has none.
    """
    if not recipe.quantize_moe_experts:
        return
    weights = bare_experts(model)
    if not weights:
        raise RecipeError(
            "quantize_moe_experts: the model has no bare weights of experts; leave it out: its "
            "linear layers are quantized"
        )
    for module, name, parameter in weights:
        four = config.load_in_4bit
        packed = _experts_in_4_bits(parameter, config) if four else _experts_in_8_bits(parameter)
        setattr(module, name, nn.Parameter(packed, requires_grad=False))


def bare_experts(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The bare weights of a model's experts: the module, the name in it, and the parameter."""
    return [
        (module, name, parameter)
        for path, module in model.named_modules()
        if "expert" in path.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]


def _experts_in_4_bits(weights: Tensor, config: Any) -> PackedExperts:
    from bitsandbytes.functional import quantize_4bit

    nested, kind = config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type

    def stored(matrix: Tensor) -> Quantized:
        packed, state = quantize_4bit(matrix, compress_statistics=nested, quant_type=kind)
        out, into = matrix.shape
        tensors: tuple[Tensor | None, ...]
        if not nested:
            tensors = packed, state.absmax, None, None, None
        else:
            tensors = packed, state.state2.absmax, state.absmax, state.state2.code, state.offset
        return Quantized(tensors, (out, into), state.blocksize, kind)

    return PackedExperts.stack([stored(w) for w in weights.detach()], weights.dtype)


def _experts_in_8_bits(weights: Tensor) -> PackedExperts:
    from bitsandbytes.functional import int8_vectorwise_quant

    def stored(matrix: Tensor) -> Quantized:
        packed, absmax = int8_vectorwise_quant(matrix.to(torch.float16))[:2]
        out, into = matrix.shape
        return Quantized((packed, absmax), (out, into), into, "int8")

    return PackedExperts.stack([stored(w) for w in weights.detach()], weights.dtype)
