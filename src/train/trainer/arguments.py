"""A recipe's number of optimizer steps, and the arguments of Trainer that its keys make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ...errors import RecipeError
from ..model.precision import computes_in, dtype_for_training
from ..processes.world import World
from ..processes.wrapping import check_deepspeed, deepspeed_config, deepspeed_state
from ..recipe.keys.optimization import OWN_OPTIMIZERS
from ..recipe.recipe import Recipe
from ..recipe.strategy import ddp_arguments, strategy_of
from ..report.result import Figure


@dataclass(frozen=True)
class Steps:
    """Optimizer steps, in the whole run and per epoch.

    A stream has no end: ``max_steps`` of it are taken to be ``num_epochs`` epochs.
    """

    total: int
    per_epoch: int

    def every(self, interval: float, key: str) -> int:
        """An interval in whole steps; below 1, a share of all; RecipeError if it is not whole."""
        if interval < 1:
            return max(1, math.ceil(self.total * interval))
        if interval != int(interval):
            raise RecipeError(
                f"{key}: {interval:g} is neither a number of steps nor a fraction below 1"
            )
        return int(interval)

    def times_per_epoch(self, times: int) -> int:
        """The interval, in steps, of what happens so many times in an epoch."""
        return max(1, math.ceil(self.per_epoch / times))


def steps(recipe: Recipe, sequences: int | None, processes: int = 1) -> Steps:
    """Count the optimizer steps that the recipe makes of ``sequences`` per epoch; None: a stream.

    Each process makes the recipe's forward passes in a step, with its own batches.

    Raises:
        RecipeError: a stream without ``max_steps``, or too few sequences for one batch.
    """
    if sequences is None:
        if recipe.max_steps is None:
            raise RecipeError("max_steps: streamed data has no end, so this must be set")
        return Steps(recipe.max_steps, math.ceil(recipe.max_steps / recipe.num_epochs))
    rounded = math.floor if recipe.dataloader_drop_last else math.ceil
    batches = rounded(sequences / recipe.micro_batch_size)
    if not batches:
        raise RecipeError(
            f"micro_batch_size: {sequences} sequences do not fill a batch of "
            f"{recipe.micro_batch_size}, and dataloader_drop_last drops incomplete batches"
        )
    per_process = math.ceil(batches / processes)
    per_epoch = math.ceil(per_process / recipe.accumulation())
    total = recipe.max_steps or math.ceil(per_epoch * recipe.num_epochs)
    return Steps(total, per_epoch)


def training_arguments(
    recipe: Recipe,
    count: Steps,
    several: bool = False,
    kind: type[TrainingArguments] = TrainingArguments,
    overrides: Mapping[str, Any] | None = None,
    figure: Figure = "loss",
) -> Any:
    """The arguments of transformers' Trainer.

    Intervals are given in whole steps: ends of epochs are steps, too, and so whatever happens
    at one also happens in a run that resumes from a checkpoint of that step. What the recipe does
    not say is as in ``TrainingArguments``, also where ``kind`` has another default.
    ``overrides`` are further arguments of ``kind``; ``figure`` is the default of
    ``metric_for_best_model``.

    Raises:
        RecipeError: keys that do not go together.
    """
    distributed = _processes(recipe) if several else {}
    kwargs = {
        **_plain_defaults(kind),
        **_steps(recipe, count),
        **_saving(recipe, count),
        **_validation(recipe, count, figure),
        **_hub(recipe),
        **_tracking(recipe),
        **_logging(recipe, count),
        **_loading(recipe, distributed.pop("accelerator_config", {})),
        **distributed,
        "output_dir": str(Path(recipe.output_dir)),
        "seed": recipe.seed,
        "torch_empty_cache_steps": recipe.torch_empty_cache_steps,
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "disable_tqdm": True,
        **(overrides or {}),
    }
    try:
        arguments: Any = kind(**kwargs)
    except (ValueError, ImportError) as error:
        raise RecipeError(f"the trainer refuses these settings: {error}") from error
    check_deepspeed(arguments)
    # of several, one process would train on all: nn.DataParallel
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _plain_defaults(kind: type[TrainingArguments]) -> dict[str, Any]:
    """The defaults of ``TrainingArguments`` where ``kind`` has others."""
    plain = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    defaults = {}
    for f in dataclasses.fields(kind):
        base = plain.get(f.name)
        if base is None or not f.init:
            continue
        if (f.default, f.default_factory) != (base.default, base.default_factory):
            factory: Any = base.default_factory
            defaults[f.name] = base.default if factory is dataclasses.MISSING else factory()
    return defaults


def _logging(recipe: Recipe, count: Steps) -> dict[str, Any]:
    return {
        "logging_steps": count.every(recipe.logging_steps, "logging_steps"),
        "logging_first_step": recipe.logging_first_step,
        "log_on_each_node": recipe.log_on_each_node,
        "logging_nan_inf_filter": recipe.logging_nan_inf_filter,
    }


def _loading(recipe: Recipe, among: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "dataloader_num_workers": recipe.dataloader_num_workers,
        "dataloader_prefetch_factor": recipe.dataloader_prefetch_factor,
        "dataloader_pin_memory": _pinned(recipe),
        "dataloader_drop_last": recipe.dataloader_drop_last,
        # a stream is read by whoever trains on it
        "accelerator_config": {
            "dispatch_batches": False,
            **(recipe.accelerator_config or {}),
            **among,
        },
    }


def arguments_for(
    recipe: Recipe,
    sequences: Any,
    world: World | None = None,
    kind: type[TrainingArguments] = TrainingArguments,
    overrides: Mapping[str, Any] | None = None,
    figure: Figure = "loss",
) -> Any:
    """As ``training_arguments``, with the steps counted from the sequences themselves."""
    world = world or World()
    number = len(sequences) if hasattr(sequences, "__len__") else None
    count = steps(recipe, number, world.batch_ranks)
    return training_arguments(recipe, count, world.several, kind, overrides, figure)


def _processes(recipe: Recipe) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        **ddp_arguments(recipe),
        "average_tokens_across_devices": True,  # a gradient weighs tokens, not processes
        "use_cpu": not torch.cuda.is_available(),  # else accelerate sees one process there
    }
    strategy = strategy_of(recipe)
    if strategy.engine == "ddp":
        # as Trainer decides for a model without PEFT: an expert that nothing is sent to has no
        # gradient, and a checkpoint's second forward must not be looked at
        arguments.setdefault("ddp_find_unused_parameters", not recipe.checkpointing())
    if strategy.deepspeed is not None:
        dtype = dtype_for_training(recipe.precision())
        wide = bool(recipe.adapter) and recipe.peft_autocast_adapter_dtype
        arguments["deepspeed"] = deepspeed_config(strategy.deepspeed, dtype, wide)
        arguments |= deepspeed_state()
    return arguments


def _pinned(recipe: Recipe) -> bool:
    pin = recipe.dataloader_pin_memory
    return torch.cuda.is_available() if pin is None else pin


def _steps(recipe: Recipe, count: Steps) -> dict[str, Any]:
    warmup = recipe.warmup_steps
    if warmup is None or warmup < 1:
        share = recipe.warmup_ratio if warmup is None else warmup
        warmup = math.ceil((share or 0.0) * count.total)  # as transformers does
    scheduler, options = recipe.lr_scheduler, dict(recipe.lr_scheduler_kwargs or {})
    if scheduler == "one_cycle":  # made by ``schedule``
        scheduler, options = "constant", {}
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": recipe.micro_batch_size,
        "gradient_accumulation_steps": recipe.accumulation(),
        "max_steps": count.total,
        # what transformers does not have is made by ``optimizer``
        "optim": "adamw_torch" if recipe.optimizer in OWN_OPTIMIZERS else recipe.optimizer,
        "optim_args": optimizer_arguments(recipe),
        "optim_target_modules": _target_modules(recipe),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": options,
        "warmup_steps": int(warmup),
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.adam_beta1,
        "adam_beta2": recipe.adam_beta2,
        "adam_epsilon": recipe.adam_epsilon,
        "max_grad_norm": recipe.max_grad_norm,
        "label_smoothing_factor": recipe.label_smoothing_factor,
        "neftune_noise_alpha": recipe.neftune_noise_alpha,
        "fp16": computes_in(recipe.precision()) == "float16",
    }
    if recipe.tf32 not in (None, "auto") and torch.cuda.is_available():
        arguments["tf32"] = recipe.tf32
    return arguments


def optimizer_arguments(recipe: Recipe) -> str | None:
    """``optim_args`` as the string that transformers expects."""
    options = recipe.optim_args
    if isinstance(options, dict):
        return ",".join(f"{name}={value}" for name, value in options.items())
    return options


def _target_modules(recipe: Recipe) -> list[str] | str | None:
    modules = recipe.optim_target_modules
    return "all-linear" if modules == "all_linear" else modules


def _saving(recipe: Recipe, count: Steps) -> dict[str, Any]:
    kind = recipe.saving()
    interval = 500
    if kind == "epoch" or recipe.saves_per_epoch:
        interval = count.times_per_epoch(recipe.saves_per_epoch or 1)
    elif recipe.save_steps:
        interval = count.every(recipe.save_steps, "save_steps")
    # old checkpoints are removed by ``files.rotate``, in one move each
    return {
        "save_strategy": "steps" if kind == "epoch" else kind,
        "save_steps": interval,
        "save_total_limit": None,
        "save_only_model": recipe.save_only_model,
    }


def _validation(recipe: Recipe, count: Steps, figure: Figure) -> dict[str, Any]:
    kind = recipe.evaluation()
    best = recipe.load_best_model_at_end or recipe.saving() == "best"
    judged = best or recipe.early_stopping_patience or recipe.lr_scheduler in _BY_RESULT
    if judged and kind == "no":
        name = next(k for k, on in _judging(recipe) if on)
        raise RecipeError(
            f"{name}: needs validation during training; set val_set_size (or test_datasets) and "
            "eval_steps or evals_per_epoch"
        )
    if kind == "no":
        return {"eval_strategy": "no"}
    if kind == "epoch" or recipe.evals_per_epoch:
        interval = count.times_per_epoch(recipe.evals_per_epoch or 1)
    elif recipe.eval_steps is None:
        raise RecipeError("eval_strategy: steps needs eval_steps or evals_per_epoch")
    else:
        interval = count.every(recipe.eval_steps, "eval_steps")
    delay = recipe.eval_delay or 0
    if kind == "epoch":
        delay *= count.per_epoch
    result: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": interval,
        "eval_delay": delay,
    }
    if judged:
        metric = recipe.metric_for_best_model or f"eval_{figure}"
        greater = recipe.greater_is_better
        if greater is None:
            greater = not metric.endswith(_BETTER_WHEN_LESS)
        if recipe.lr_scheduler in _BY_RESULT:
            mode = {"mode": "max" if greater else "min"}
            result["lr_scheduler_kwargs"] = mode | (recipe.lr_scheduler_kwargs or {})
        result |= {
            "load_best_model_at_end": recipe.load_best_model_at_end,
            "metric_for_best_model": metric,
            "greater_is_better": greater,
        }
    return result


_BY_RESULT = ("reduce_lr_on_plateau", "greedy")
_BETTER_WHEN_LESS = ("loss", "perplexity", "kl", "clipped_ratio", "frac_reward_zero_std")


def _judging(recipe: Recipe) -> list[tuple[str, Any]]:
    """The keys that need the result of a validation, and whether they are set."""
    return [
        ("load_best_model_at_end", recipe.load_best_model_at_end),
        ("save_strategy", recipe.saving() == "best"),
        ("early_stopping_patience", recipe.early_stopping_patience),
        ("lr_scheduler", recipe.lr_scheduler in _BY_RESULT),
    ]


def _hub(recipe: Recipe) -> dict[str, Any]:
    if recipe.hub_model_id is None:
        return {}
    return {
        "push_to_hub": True,
        "hub_model_id": recipe.hub_model_id,
        "hub_strategy": recipe.hub_strategy or "every_save",
        "hub_revision": recipe.hub_revision,
        "hub_private_repo": recipe.hub_private_repo,
        "hub_always_push": recipe.hub_always_push,
    }


def _tracking(recipe: Recipe) -> dict[str, Any]:
    names = (
        recipe.wandb_name, recipe.mlflow_run_name, recipe.trackio_run_name,
        recipe.swanlab_experiment_name,
    )  # fmt: skip
    arguments: dict[str, Any] = {"report_to": recipe.reporters() or "none"}
    if any(names):
        arguments["run_name"] = next(name for name in names if name)
    if recipe.trackio_project_name:
        arguments["project"] = recipe.trackio_project_name
    if recipe.trackio_space_id:
        arguments["trackio_space_id"] = recipe.trackio_space_id
    return arguments
