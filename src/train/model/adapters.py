"""What of a model is trained: adapters beside it, or all of its weights, or some."""

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

    Raises:
        RecipeError: the recipe names layers, blocks or parameters that the model does not have.
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
    """See that an adapter brings the head of a classifier along, which would else be random.

    Raises:
        RecipeError: it was not trained with one.
    """
    from peft import PeftConfig

    head = head_of(recipe)
    if not head.classifies:
        return
    try:
        task = PeftConfig.from_pretrained(name).task_type
    except Exception:  # PEFT and the hub raise whatever they meet; put_adapter says what
        return
    if task != head.task:
        raise RecipeError(
            f"lora_model_dir: {name} has no head for {head.key} (its task_type is {task}, not "
            f"{head.task}); merge it into its base, and set base_model to the result"
        )


def _adapted(model: Any, recipe: Recipe, config: Any) -> Any:
    from peft import get_peft_model

    try:
        # adapters in fp32 beside 16-bit weights, unless the recipe says otherwise
        return get_peft_model(
            model, config, autocast_adapter_dtype=recipe.peft_autocast_adapter_dtype
        )
    except (ValueError, TypeError, ImportError) as error:  # TypeError: pissa on quantized weights
        said = f"adapter: PEFT refuses these settings: {first_line(error)}"
        if recipe.lora_target_linear and "target_modules" in said:
            said += " List it in lora_exclude_modules, which lora_target_linear leaves out."
        raise RecipeError(said) from error


def require_names(model: Any, recipe: Recipe) -> None:
    """See that ``model`` has what the recipe names, and that PEFT takes it.

    Args:
        model: without weights (on the meta device), and of no other use: adapters are put on it.
        recipe: checked.

    Raises:
        RecipeError: it has no such layers or parameters, or PEFT refuses the settings.
    """
    if recipe.adapter is None:
        _matched(model, recipe.unfrozen_parameters or [])
    elif not recipe.lora_model_dir:
        config = _config(model, recipe)
        try:
            _adapted(model, recipe, config)
        except RecipeError:
            raise
        except Exception:  # what is begun from the weights may be beyond a model without them
            return


def _config(model: Any, recipe: Recipe) -> Any:
    from peft import LoraConfig

    _require_present(model, recipe.lora_modules_to_save, "lora_modules_to_save")
    given: dict[str, Any] = {
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
            task_type=head_of(recipe).task, **{k: v for k, v in given.items() if v is not None}
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"adapter: PEFT refuses these settings: {first_line(error)}") from error


def _listed(names: list[str] | str | None) -> list[str] | None:
    return [names] if isinstance(names, str) else names


def _saved(model: Any, recipe: Recipe) -> list[str] | None:
    """What is trained as a whole: the recipe's modules, and a head that PEFT does not know.

    PEFT adds those that it knows by itself, to the list that it is given.
    """
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES

    named = list(recipe.lora_modules_to_save or [])
    if head_of(recipe).classifies:
        head = dict.fromkeys(name.partition(".")[0] for name in head_modules(model))
        trained = [n for n in head if any(True for _ in getattr(model, n).parameters())]
        named += [n for n in trained if n not in (*named, *SEQ_CLS_HEAD_NAMES)]
    return named or None


def _targets(model: Any, recipe: Recipe) -> list[str] | str:
    named = recipe.lora_target_modules
    every = recipe.lora_target_linear
    if named in ("all-linear", ["all-linear"]):
        named, every = None, True
    if isinstance(named, str):
        if every:
            raise RecipeError(
                "lora_target_modules: a regular expression already selects the layers; set "
                "lora_target_linear to false"
            )
        if not any(re.fullmatch(named, name) for name, _ in model.named_modules()):
            raise RecipeError(f"lora_target_modules: no layer's whole name matches {named!r}")
        return named
    _require_present(model, named, "lora_target_modules")
    named = list(named or [])
    if not every:
        return named
    # PEFT wants names for layers_to_transform, and does not know the heads of all classifiers
    numbered = recipe.peft_layers_to_transform is not None
    if not (named or numbered or head_of(recipe).classifies):
        return "all-linear"
    from transformers.pytorch_utils import Conv1D

    head = set(head_modules(model).values())
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module not in head
    }
    return sorted(linear | set(named))


def _require_present(model: nn.Module, named: list[str] | None, key: str) -> None:
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    unknown = [name for name in named or [] if name.rpartition(".")[2] not in present]
    if unknown:
        kinds = (nn.Linear, nn.Embedding)
        inner = [name for name, m in model.named_modules() if isinstance(m, kinds)]
        known = dict.fromkeys(name.rpartition(".")[2] for name in inner)
        raise RecipeError(
            f"{key}: the model has no layer {', '.join(unknown)}; it has {', '.join(known)}"
        )


def _unfrozen(model: nn.Module, patterns: list[str] | None) -> Any:
    """Train the parameters whose names begin like one of ``patterns``; None: all of them."""
    if patterns:
        _matched(model, patterns)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))
    return model


def _matched(model: nn.Module, patterns: list[str]) -> None:
    """See that every pattern is the beginning of some parameter's name."""
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
    """Let the gradient reach checkpointed blocks where only that of their inputs is looked at."""
    options = recipe.gradient_checkpointing_kwargs or {}
    if recipe.checkpointing() and options.get("use_reentrant"):
        model.enable_input_require_grads()


def parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are.

    Weights of 4 bits are two to an element of their tensor.
    """
    trained = total = 0
    for p in model.parameters():
        size = p.numel()
        shape = getattr(getattr(p, "quant_state", None), "shape", None)
        if shape is not None:
            size = shape.numel()
        total += size
        trained += size if p.requires_grad else 0
    return trained, total


# An adapter that is on disk: whether its files are whole, and whether it fits its base.


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
        said = shards_problem(folder)
        return f"{said}; copy the whole folder again" if said else None
    weights = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        return f"{folder} has no {WEIGHTS[0]}: saving or copying it was not completed"
    said = damaged(weights[:1])
    return f"{said}; copy it again" if said else None


def put_adapter(model: Any, folder: str, **options: Any) -> Any:
    """Put an adapter on its base; every tensor of its file must have found its place, and no other.

    Args:
        model: the base, with its vocabulary as the adapter wants it.
        folder: of the adapter, or its id on the hub.
        options: for ``PeftModel.from_pretrained``.

    Returns:
        The PEFT model.

    Raises:
        ModelError: it cannot be read, or was made for another base.
    """
    from peft import PeftModel

    if Path(folder).is_dir() and (said := adapter_problem(Path(folder))) is not None:
        raise ModelError(said)
    try:
        with adapter_folder(folder) as whole:
            made = PeftModel.from_pretrained(model, whole, **options)
        left, missing = _misplaced(made, adapter_weights(folder))
    except Exception as error:  # PEFT, torch and the hub raise whatever they meet
        raise ModelError(_explained(error, folder)) from error
    if left or missing:
        many = [f"{len(names)} {what}, such as {names[0]}" for names, what in (
            (left, "of its tensors do not exist in the base model"),
            (missing, "tensors are missing in it"),
        ) if names]  # fmt: skip
        raise ModelError(_other_base(folder, ", and ".join(many)))
    return made


def _misplaced(model: Any, weights: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Names in the file that the model has no place for, and of adapters that the file lacks."""
    from peft import LoraConfig, get_peft_model_state_dict

    if not all(isinstance(config, LoraConfig) for config in model.peft_config.values()):
        return [], []  # others save less than they have, or under other names
    own = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # embeddings that are adapted are saved with the adapter, under either name
    base = {_of_base(name) for name in model.state_dict()}
    left = [name for name in weights if name not in own and _of_base(name) not in base]
    return left, sorted(own - set(weights))


def _of_base(name: str) -> str:
    """The name that a tensor has without adapters around its layer."""
    return name.replace(".base_layer.", ".")


def _explained(error: Exception, folder: str) -> str:
    """Why an adapter could not be loaded, and what to do."""
    text = str(error).strip()
    found = [match.groupdict() for match in _MISMATCH.finditer(text)]
    if found:
        first, more = found[0], len(found) - 1
        return _other_base(
            folder,
            f"{first['name']} is {first['there']} in its file and {first['here']} here"
            + (f", and {more} more tensors differ" if more else ""),
        )
    if "not found in the base model" in text:
        return _other_base(folder, "the layers that it adapts do not exist in the base model")
    said = (text.splitlines() or [""])[0].rstrip(".") or type(error).__name__
    if isinstance(error, KeyError):
        said = f"its adapter_config.json says {said}, which this version of PEFT does not know"
    return f"{folder}: the adapter cannot be loaded: {said}"


def _other_base(folder: str, what: str) -> str:
    """What to say of an adapter that was made for another base."""
    base = None
    if (Path(folder) / "adapter_config.json").is_file():
        base = read_object(Path(folder) / "adapter_config.json").get("base_model_name_or_path")
    of = f" (it names {base})" if base else ""
    return (
        f"{folder}: the adapter does not match the base model: {what}; set base_model to the model "
        f"that it was trained on{of}"
    )
