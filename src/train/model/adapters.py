"""Selects what of a model is trained: adapters, all of its weights, or some."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ModelError, RecipeError, first_line
from ..recipe.preferences import head_of
from ..recipe.recipe import Recipe
from .adapter_files import put_adapter
from .multimodal import freeze, is_in, language_path, left_out, pattern_of
from .precision import computes_in
from .quantize import head_modules

Say = Callable[[str], None]

_USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names that recipes list for any architecture; one that a model lacks is no mistake."""


def add_adapter(model: Any, recipe: Recipe, say: Say | None = None) -> Any:
    """Wrap ``model`` with the adapters that the recipe asks for, or choose the weights to train.

    Quantized weights are frozen and everything else keeps its dtype: that of the norms and the
    embeddings is the dtype of the computation, which does not need PEFT's float32 copies of them.
    ``say`` is called with a line about layers that are left out. Raises a RecipeError if the model
    lacks layers, blocks or parameters that the recipe names.
    """
    if recipe.adapter is None:
        return _unfrozen(model, recipe, say)
    places = left_out(model, recipe)
    model = _with_adapter(model, recipe, say)
    # which biases may be: PEFT trains all of a name
    freeze(model.get_base_model(), places)
    if computes_in(recipe.precision()) == "float16" and recipe.strategy().deepspeed is None:
        _widen_gradients(model)  # DeepSpeed has a scaler of its own
    return model


def _widen_gradients(model: Any) -> None:
    """Let gradients be float32: PyTorch's scaler unscales no others.

    Whole modules that are trained get weights in float32, which autocast computes with. Raises a
    RecipeError if anything else would be trained in float16.
    """
    narrow = []
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype is torch.float16:
            if ".modules_to_save." in name:
                p.data = p.data.float()
            else:
                narrow.append(name)
    if narrow:
        more = f" and {len(narrow) - 1} more" if narrow[1:] else ""
        raise RecipeError(
            f"fp16: {narrow[0]}{more} would be trained in float16, and a scaled loss needs "
            "gradients of float32: leave out what trains it "
            "(peft_autocast_adapter_dtype: false), or set float32: true"
        )


def _with_adapter(model: Any, recipe: Recipe, say: Say | None) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _reach_blocks(model, recipe)
    if recipe.lora_model_dir:
        folder = Path(recipe.lora_model_dir).expanduser()
        name = str(folder.resolve()) if folder.exists() else recipe.lora_model_dir
        autocast = recipe.peft_autocast_adapter_dtype
        _require_task(name, recipe)
        try:
            return put_adapter(model, name, is_trainable=True, autocast_adapter_dtype=autocast)
        except ModelError as error:
            raise RecipeError(f"lora_model_dir: {error}") from error
    return _adapted(model, recipe, _config(model, recipe, say))


def _require_task(name: str, recipe: Recipe) -> None:
    """Raise a RecipeError if an adapter lacks the head of a classifier, which would be random."""
    from peft import PeftConfig

    head = head_of(recipe)
    if not head.classifies:
        return
    try:
        task = PeftConfig.from_pretrained(name).task_type
    except Exception:  # PEFT and the hub raise anything; put_adapter says what
        return
    if task != head.task:
        raise RecipeError(
            f"lora_model_dir: {name} has no head for {head.key} (its task_type is {task}, not "
            f"{head.task}); merge it into its base, and set base_model to the result"
        )


def _adapted(model: Any, recipe: Recipe, config: Any) -> Any:
    from peft import get_peft_model

    try:
        # adapters in fp32 next to 16-bit weights, unless the recipe says otherwise
        return get_peft_model(
            model, config, autocast_adapter_dtype=recipe.peft_autocast_adapter_dtype
        )
    except (ValueError, TypeError, ImportError) as error:  # TypeError: pissa on quantized weights
        message = f"adapter: PEFT refuses these settings: {first_line(error)}"
        if recipe.lora_target_linear and "target_modules" in message:
            message += " List it in lora_exclude_modules, which lora_target_linear leaves out."
        elif recipe.lora_dropout and "lora_dropout" in message:
            message += " Set lora_dropout: 0: layers of the list are weights that hold all experts."
        raise RecipeError(message) from error


def require_names(model: Any, recipe: Recipe) -> None:
    """Raise a RecipeError unless ``model`` has what the recipe names, and PEFT accepts it.

    ``model`` is on the meta device, and cannot be used afterwards: adapters are put on it.
    """
    if recipe.adapter is None:
        _unmatched(model, recipe, recipe.unfrozen_parameters or [])
    elif not recipe.lora_model_dir:
        config = _config(model, recipe)
        try:
            _adapted(model, recipe, config)
        except RecipeError:
            raise
        except Exception:  # initial values from the weights may fail without them
            return


def _config(model: Any, recipe: Recipe, say: Say | None = None) -> Any:
    from peft import LoraConfig

    _require_present(model, recipe, recipe.lora_modules_to_save, "lora_modules_to_save")
    kwargs: dict[str, Any] = {
        "r": recipe.lora_r,
        "lora_alpha": recipe.lora_alpha,
        "rank_pattern": recipe.lora_rank_pattern,
        "alpha_pattern": recipe.lora_alpha_pattern,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": _targets(model, recipe, say),
        "target_parameters": _listed(recipe.lora_target_parameters),
        "exclude_modules": _excluded(model, recipe, say),
        "modules_to_save": _saved(model, recipe),
        "fan_in_fan_out": recipe.lora_fan_in_fan_out,
        "bias": recipe.lora_bias,
        "use_dora": recipe.peft_use_dora,
        "use_rslora": recipe.peft_use_rslora,
        "layers_to_transform": recipe.peft_layers_to_transform,
        "layers_pattern": recipe.peft_layers_pattern,
        "layer_replication": recipe.peft_layer_replication,
        "init_lora_weights": recipe.peft_init_lora_weights,
        "trainable_token_indices": recipe.peft_trainable_token_indices,
        "ensure_weight_tying": recipe.peft_ensure_weight_tying,
    }
    try:  # what is unset is PEFT's to choose
        return LoraConfig(
            task_type=head_of(recipe).task, **{k: v for k, v in kwargs.items() if v is not None}
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"adapter: PEFT refuses these settings: {first_line(error)}") from error


def _listed(names: list[str] | str | None) -> list[str] | None:
    return [names] if isinstance(names, str) else names


def _saved(model: Any, recipe: Recipe) -> list[str] | None:
    """The modules that are trained as a whole: the recipe's, and a head that PEFT does not know."""
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    modules = list(recipe.lora_modules_to_save or [])
    if modules and (places := left_out(model, recipe)):  # which may have modules of the same names
        paths = [name for name, _ in model.named_modules() if not is_in(name, places)]
        modules = [p for p in paths if any(p == n or p.endswith(f".{n}") for n in modules)]
    if head_of(recipe).classifies:
        head = dict.fromkeys(name.partition(".")[0] for name in head_modules(model))
        trained = [n for n in head if any(True for _ in getattr(model, n).parameters())]
        modules += [n for n in trained if n not in (*modules, *SEQ_CLS_HEAD_NAMES)]
    return modules or None


def _targets(model: Any, recipe: Recipe, say: Say | None) -> list[str] | str:
    targets = recipe.lora_target_modules
    all_linear = recipe.lora_target_linear
    if targets in ("all-linear", ["all-linear"]):
        targets, all_linear = None, True
    if isinstance(targets, str):
        if all_linear:
            raise RecipeError(
                "lora_target_modules: a regular expression already selects the layers; set "
                "lora_target_linear to false"
            )
        return _by_expression(model, targets, recipe, say)
    absent = [name for name in _absent(model, recipe, targets) if name in _USUAL]
    if absent and len(absent) < len(targets or []):
        targets = [name for name in targets or [] if name not in absent]
        if say is not None:
            say(f"lora_target_modules: the model has no layer {', '.join(absent)}: left out")
    _require_present(model, recipe, targets, "lora_target_modules")
    targets = list(targets or [])
    if not all_linear:
        return targets
    # PEFT wants names for layers_to_transform, and does not know the heads of all classifiers
    numbered = recipe.peft_layers_to_transform is not None
    without_experts = bool(recipe.lora_dropout) and _means_experts(model)
    if without_experts and say is not None:
        say("lora_target_linear: the experts are left out, because PEFT has no dropout for their "
            "weights; lora_dropout: 0 adapts them, too")  # fmt: skip
    if not (targets or numbered or without_experts or head_of(recipe).classifies):
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    head = set(head_modules(model).values())
    places = left_out(model, recipe)
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in head
        and not is_in(name, places)
    }  # fmt: skip
    return sorted(linear | set(targets))


def _means_experts(model: Any) -> bool:
    """Whether PEFT takes all linear layers to be also the weights that hold all experts at once."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules="all-linear")
    convert_peft_config_for_transformers(config, model, None)
    return bool(config.target_parameters)


def _excluded(model: Any, recipe: Recipe, say: Say | None) -> list[str] | str | None:
    """The layers that get no adapter: the recipe's, those of towers, and those PEFT refuses."""
    named, outside = recipe.lora_exclude_modules, pattern_of(left_out(model, recipe))
    refused = _refused(model, recipe)
    if refused and say is not None:
        listed = ", ".join(refused)
        say(f"lora_target_linear: leaves out {listed}, which PEFT cannot adapt in this model")
    names = [*(named if isinstance(named, list) else ()), *refused]
    patterns = [p for p in (outside, named if isinstance(named, str) else None) if p]
    if not patterns:
        return names or None
    if names:  # as PEFT reads a list of names
        patterns.append(rf"(.*\.)?({'|'.join(map(re.escape, names))})")
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def _refused(model: Any, recipe: Recipe) -> list[str]:
    """The names of layers that ``lora_target_linear`` would adapt, and PEFT cannot adapt.

    Such as Mamba's ``out_proj``, which PEFT refuses: its kernel reads the weight, and would pass by
    the adapter; and linear layers whose products are others, as of groups of features. A layer that
    the recipe names is none of them: it is refused with PEFT's words.
    """
    targets = recipe.lora_target_modules
    all_linear = recipe.lora_target_linear or targets in ("all-linear", ["all-linear"])
    if not all_linear or recipe.lora_model_dir or recipe.adapter is None:
        return []
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    check: Any = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    named = set(targets) if isinstance(targets, list) else set()
    linears = [(n.rpartition(".")[2], m) for n, m in model.named_modules()
               if isinstance(m, nn.Linear)]  # fmt: skip
    names = {name for name, _ in linears} - named
    refused = sorted({n for n, m in linears if n in names and not _is_row_by_row(m)})
    for name in sorted(names.difference(refused)) if check is not None else ():
        try:
            check(LoraConfig(task_type=head_of(recipe).task), model, name)
        except ValueError:
            refused.append(name)
    return refused


def _is_row_by_row(linear: nn.Linear) -> bool:
    """Whether a layer makes a row of its output features of each row, as PEFT's adapters do."""
    weight, size = linear.weight, (linear.out_features, linear.in_features)
    # a library's layer with a packed weight, which may be stored in any dtype, is row by row
    is_packed = weight.shape != size or weight.dtype.itemsize < 2
    if type(linear).forward is nn.Linear.forward or is_packed:
        return True
    rows = weight.new_zeros(5, 7, linear.in_features)
    buffers = {n: b.clone() for n, b in linear.named_buffers()}
    try:
        with torch.no_grad():
            output = torch.func.functional_call(linear, buffers, (rows,))
    except Exception:  # a model's own code raises anything
        return False
    return isinstance(output, Tensor) and output.shape == (5, 7, linear.out_features)


def _by_expression(model: Any, expression: str, recipe: Recipe, say: Say | None) -> list[str] | str:
    """The trained layers whose whole names match, in whatever class's names."""
    places = left_out(model, recipe)
    names = [name for name, _ in model.named_modules() if not is_in(name, places)]
    matches = [n for n, _ in model.named_modules() if re.fullmatch(expression, n)]
    if any(not is_in(name, places) for name in matches):
        if (frozen := [n for n in matches if is_in(n, places)]) and say is not None:
            say(f"lora_target_modules: {len(frozen)} of the layers, such as {frozen[0]}, stay as "
                "they are, because freeze_mm_modules is true: false adapts them")  # fmt: skip
        return expression
    # what a checkpoint's layers are called in older versions of its class, or in its class for text
    path = language_path(model) if places else ""
    inner = [name.removeprefix(f"{path}.") for name in names if name.startswith(f"{path}.")]
    starts = ("model.language_model", "language_model.model", "language_model", "model")
    targets = [
        f"{path}.{name}"
        for name in inner
        if any(re.fullmatch(expression, f"{start}.{name}") for start in starts)
    ]
    if not targets:
        more = ""
        if any(re.fullmatch(expression, name) for name, _ in model.named_modules()):
            more = " but such as freeze_mm_modules leaves as they are: set it to false"
        raise RecipeError(
            f"lora_target_modules: no layer's whole name matches {expression!r}{more}"
        )
    return targets


def _require_present(model: nn.Module, recipe: Recipe, named: list[str] | None, key: str) -> None:
    if unknown := _absent(model, recipe, named):
        places = left_out(model, recipe)
        inside = [(name, m) for name, m in model.named_modules() if not is_in(name, places)]
        kinds = (nn.Linear, nn.Embedding)
        inner = [name for name, m in inside if isinstance(m, kinds)]
        names = dict.fromkeys(name.rpartition(".")[2] for name in inner)
        raise RecipeError(
            f"{key}: the model has no layer {', '.join(unknown)}; it has {', '.join(names)}"
        )


def _absent(model: nn.Module, recipe: Recipe, named: list[str] | None) -> list[str]:
    places = left_out(model, recipe)
    inside = (name for name, _ in model.named_modules() if not is_in(name, places))
    present = {name.rpartition(".")[2] for name in inside}
    return [name for name in named or [] if name.rpartition(".")[2] not in present]


def _unfrozen(model: nn.Module, recipe: Recipe, say: Say | None) -> Any:
    """Train the parameters whose names begin like one of the recipe's patterns, or all of them."""
    if patterns := recipe.unfrozen_parameters:
        if (useless := _unmatched(model, recipe, patterns)) and say is not None:
            say(f"unfrozen_parameters: no parameter name matches {', '.join(map(repr, useless))}")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))
    freeze(model, left_out(model, recipe))
    return model


def _unmatched(model: nn.Module, recipe: Recipe, patterns: list[str]) -> list[str]:
    """The patterns that are no beginning of a parameter's name.

    Raises a RecipeError if that are all of them, or one is no regular expression.
    """
    places = left_out(model, recipe)
    names = [name for name, _ in model.named_parameters() if not is_in(name, places)]
    useless = []
    for pattern in patterns:
        try:
            if not any(re.match(pattern, name) for name in names):
                useless.append(pattern)
        except re.error as error:
            raise RecipeError(f"unfrozen_parameters: {pattern!r}: {error}") from None
    if patterns and len(useless) == len(patterns):
        raise RecipeError(
            f"unfrozen_parameters: no parameter name matches {', '.join(map(repr, patterns))}; "
            f"examples of names: {names[0]}, {names[-1]}"
        )
    return useless


def _reach_blocks(model: Any, recipe: Recipe) -> None:
    """Pass the gradient into checkpointed blocks, which look only at that of their inputs."""
    options = recipe.gradient_checkpointing_kwargs or {}
    if recipe.checkpointing() and options.get("use_reentrant"):
        model.enable_input_require_grads()


def parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trained and of all parameters; 4-bit weights are two to an element."""
    trained = total = 0
    for p in model.parameters():
        size = p.numel()
        shape = getattr(getattr(p, "quant_state", None), "shape", None)
        if shape is not None:
            size = shape.numel()
        total += size
        trained += size if p.requires_grad else 0
    return trained, total


# --- adapters on disk ----------------------------------------------------------------------------
