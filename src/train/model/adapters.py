"""Selects what of a model is trained: adapters, all of its weights, or some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import ModelError, RecipeError, first_line
from ..recipe.preferences import head_of
from ..recipe.recipe import Recipe
from .files import adapter_folder, adapter_weights, damaged, in_shards, read_object, shards_problem
from .quantize import head_modules


def add_adapter(model: Any, recipe: Recipe) -> Any:
    """Wrap ``model`` with the adapters that the recipe asks for, or choose the weights to train.

    Quantized weights are frozen and everything else keeps its dtype: that of the norms and the
    embeddings is the dtype of the computation, which does not need PEFT's float32 copies of them.
    Raises a RecipeError if the model lacks layers, blocks or parameters that the recipe names.
    """
    if recipe.adapter is None:
        return _unfrozen(model, recipe.unfrozen_parameters)
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
    return _adapted(model, recipe, _config(model, recipe))


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
        raise RecipeError(message) from error


def require_names(model: Any, recipe: Recipe) -> None:
    """Raise a RecipeError unless ``model`` has what the recipe names, and PEFT accepts it.

    ``model`` is on the meta device, and cannot be used afterwards: adapters are put on it.
    """
    if recipe.adapter is None:
        _matched(model, recipe.unfrozen_parameters or [])
    elif not recipe.lora_model_dir:
        config = _config(model, recipe)
        try:
            _adapted(model, recipe, config)
        except RecipeError:
            raise
        except Exception:  # initial values from the weights may fail without them
            return


def _config(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig

    _require_present(model, recipe.lora_modules_to_save, "lora_modules_to_save")
    kwargs: dict[str, Any] = {
        "r": recipe.lora_r,
        "lora_alpha": recipe.lora_alpha,
        "rank_pattern": recipe.lora_rank_pattern,
        "alpha_pattern": recipe.lora_alpha_pattern,
        "lora_dropout": recipe.lora_dropout,
        "target_modules": _targets(model, recipe),
        "target_parameters": _listed(recipe.lora_target_parameters),
        "exclude_modules": recipe.lora_exclude_modules,
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
    if head_of(recipe).classifies:
        head = dict.fromkeys(name.partition(".")[0] for name in head_modules(model))
        trained = [n for n in head if any(True for _ in getattr(model, n).parameters())]
        modules += [n for n in trained if n not in (*modules, *SEQ_CLS_HEAD_NAMES)]
    return modules or None


def _targets(model: Any, recipe: Recipe) -> list[str] | str:
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
        if not any(re.fullmatch(targets, name) for name, _ in model.named_modules()):
            raise RecipeError(f"lora_target_modules: no layer's whole name matches {targets!r}")
        return targets
    _require_present(model, targets, "lora_target_modules")
    targets = list(targets or [])
    if not all_linear:
        return targets
    # PEFT wants names for layers_to_transform, and does not know the heads of all classifiers
    numbered = recipe.peft_layers_to_transform is not None
    if not (targets or numbered or head_of(recipe).classifies):
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    head = set(head_modules(model).values())
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in head
    }
    return sorted(linear | set(targets))


def _require_present(model: nn.Module, named: list[str] | None, key: str) -> None:
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in named or [] if name.rpartition(".")[2] not in present]
    if unknown:
        kinds = (nn.Linear, nn.Embedding)
        inner = [name for name, m in model.named_modules() if isinstance(m, kinds)]
        names = dict.fromkeys(name.rpartition(".")[2] for name in inner)
        raise RecipeError(
            f"{key}: the model has no layer {', '.join(unknown)}; it has {', '.join(names)}"
        )


def _unfrozen(model: nn.Module, patterns: list[str] | None) -> Any:
    """Train the parameters whose names begin like one of ``patterns``; None: all of them."""
    if patterns:
        _matched(model, patterns)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))
    return model


def _matched(model: nn.Module, patterns: list[str]) -> None:
    """Raise a RecipeError unless every pattern is the beginning of some parameter's name."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            matched = any(re.match(pattern, name) for name in names)
        except re.error as error:
            raise RecipeError(f"unfrozen_parameters: {pattern!r}: {error}") from None
        if not matched:
            raise RecipeError(
                f"unfrozen_parameters: no parameter name matches {pattern!r}; examples of names: "
                f"{names[0]}, {names[-1]}"
            )


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


WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MISMATCH = re.compile(
    r"size mismatch for (?P<name>\S+): .*?Size\((?P<there>\[.*?\])\).*?Size\((?P<here>\[.*?\])\)"
)


def adapter_problem(folder: Path) -> str | None:
    """Why the folder cannot hold an adapter; None if its files look right. Nothing is loaded."""
    try:
        config = read_object(folder / "adapter_config.json")
    except ValueError as error:
        return f"{error}; copy the whole folder again, or name one that holds a PEFT adapter"
    if "peft_type" not in config:
        return f"{folder / 'adapter_config.json'} has no peft_type: it is not of a PEFT adapter"
    if in_shards(folder):
        problem = shards_problem(folder)
        return f"{problem}; copy the whole folder again" if problem else None
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        return f"{folder} has no {WEIGHTS[0]}: saving or copying it was not completed"
    problem = damaged(weights[:1])
    return f"{problem}; copy it again" if problem else None


def put_adapter(model: Any, folder: str, **options: Any) -> Any:
    """Put an adapter on its base; its file and the model must have the same tensors.

    ``folder`` may also be an id on the hub; ``options`` are for ``PeftModel.from_pretrained``. The
    vocabulary of ``model`` must already have the adapter's size. Raises a ModelError if the adapter
    cannot be read, or was made for another base.
    """
    from peft import PeftModel

    if Path(folder).is_dir() and (problem := adapter_problem(Path(folder))) is not None:
        raise ModelError(problem)
    try:
        with adapter_folder(folder) as whole:
            adapted = PeftModel.from_pretrained(model, whole, **options)
        extra, missing = _misplaced(adapted, adapter_weights(folder))
    except Exception as error:  # PEFT, torch and the hub raise anything
        raise ModelError(_explained(error, folder)) from error
    if extra or missing:
        many = [f"{len(names)} {what}, such as {names[0]}" for names, what in (
            (extra, "of its tensors do not exist in the base model"),
            (missing, "tensors are missing in it"),
        ) if names]  # fmt: skip
        raise ModelError(_other_base(folder, ", and ".join(many)))
    return adapted


def _misplaced(model: Any, weights: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names in the file without a place in the model, and those of adapters that the file lacks."""
    from peft import LoraConfig, get_peft_model_state_dict

    if not all(isinstance(config, LoraConfig) for config in model.peft_config.values()):
        return [], []  # others save less than they have, or under other names
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # embeddings that are adapted are saved with the adapter, under either name
    base = {_of_base(name) for name in model.state_dict()}
    extra = [name for name in weights if name not in expected and _of_base(name) not in base]
    return extra, sorted(expected - set(weights))


def _of_base(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _explained(error: Exception, folder: str) -> str:
    text = str(error).strip()
    mismatches = [match.groupdict() for match in _MISMATCH.finditer(text)]
    if mismatches:
        first, more = mismatches[0], len(mismatches) - 1
        return _other_base(
            folder,
            f"{first['name']} is {first['there']} in its file and {first['here']} here"
            + (f", and {more} more tensors differ" if more else ""),
        )
    if "not found in the base model" in text:
        return _other_base(folder, "the layers that it adapts do not exist in the base model")
    reason = (text.splitlines() or [""])[0].rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"its adapter_config.json says {reason}, which this version of PEFT does not know"
    return f"{folder}: the adapter cannot be loaded: {reason}"


def _other_base(folder: str, what: str) -> str:
    base = None
    if (Path(folder) / "adapter_config.json").is_file():
        base = read_object(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    of = f" (it names {base})" if base else ""
    return (
        f"{folder}: the adapter does not match the base model: {what}; set base_model to the model "
        f"that it was trained on{of}"
    )
