"""Keys of a recipe that nothing reads beside the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..distributed.conflicts import distributed_without_effect
from .distillation import distillation_without_effect
from .preferences import preferences_without_effect

Values = Mapping[str, Any]


def without_effect(values: Values) -> Iterator[tuple[str, str]]:
    """Yield the keys that nothing reads beside the others, each with the reason.

    Args:
        values: the recipe as written; unset keys may be None.
    """
    validates = values.get("val_set_size") or values.get("test_datasets")
    idle: list[tuple[Sequence[str], str]] = []
    keys: Sequence[str]
    longest, length = (values.get(k) for k in ("eval_sequence_len", "sequence_len"))
    if not validates:
        keys = ("evals_per_epoch", "eval_batch_size", "eval_sample_packing", "eval_sequence_len",
                "early_stopping_patience", "load_best_model_at_end", "eval_on_start")  # fmt: skip
        idle.append((keys, "there are no rows to validate on: val_set_size is 0"))
    elif (
        values.get("val_set_size") and longest and longest > (length or longest)
        and not _first_set(values, "eval_sample_packing", "sample_packing")
    ):  # fmt: skip
        keys = ("eval_sequence_len",)
        idle.append((keys, "held-out rows are never longer than sequence_len"))
    if not str(values.get("optimizer")).startswith(("galore", "apollo")):
        idle.append((("optim_target_modules",), "only the galore and apollo optimizers use it"))
    if values.get("adapter") is None:
        keys = [k for k in values if k.startswith(("lora_", "peft_", "loraplus_"))]
        idle.append((keys, "adapter is unset: every weight is trained"))
    elif values.get("unfrozen_parameters"):
        idle.append((("unfrozen_parameters",), "with an adapter, only the adapter is trained"))
    if values.get("sample_packing"):
        idle.append((("group_by_length",), "sample_packing leaves no padding to save"))
    if values.get("max_steps") is not None:
        idle.append((("num_epochs",), "max_steps takes precedence"))
    idle += _rates_without_effect(values)
    if values.get("adapter") is not None and values.get("lora_model_dir") is not None:
        idle.append((_OF_NEW_ADAPTERS, "the adapter in lora_model_dir has settings of its own"))
    if values.get("streaming") or values.get("pretraining_dataset"):
        idle.append((_OF_ALL_ROWS, "streamed rows cannot be sorted or counted in advance"))
        if not values.get("test_datasets"):
            idle.append((("dataset_prepared_path",), "streamed rows are not cached"))
    if not values.get("lisa_n_layers"):
        idle.append(
            (("lisa_step_interval", "lisa_layers_attribute"), "only lisa_n_layers reads it")
        )
    if not values.get("jagged_restart_steps"):
        keys = ("jagged_restart_warmup_steps", "jagged_restart_anneal_steps")
        idle.append((keys, "only jagged_restart_steps reads it"))
    if not values.get("fp32_norms"):
        idle.append((("fp32_norm_classes",), "only fp32_norms reads it"))
    if not values.get("use_eaft"):
        idle.append((("eaft_alpha", "eaft_k"), "only use_eaft reads it"))
    if not values.get("do_causal_lm_eval"):
        idle.append((("eval_causal_lm_metrics",), "only do_causal_lm_eval reads it"))
    if values.get("loss_watchdog_threshold") is None:
        idle.append((("loss_watchdog_patience",), "only loss_watchdog_threshold reads it"))
    idle += distributed_without_effect(values)
    idle += preferences_without_effect(values)
    idle += distillation_without_effect(values)
    for keys, reason in idle:
        yield from ((key, reason) for key in keys if key.partition(".")[0] in values)


def _first_set(values: Values, *keys: str) -> Any:
    """The value of the first of the keys that has one."""
    return next((values[k] for k in keys if values.get(k) is not None), None)


_OF_NEW_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_rank_pattern", "lora_alpha_pattern", "lora_dropout",
    "lora_target_modules", "lora_target_linear", "lora_modules_to_save", "lora_fan_in_fan_out",
    "lora_exclude_modules", "peft_use_dora", "peft_use_rslora", "peft_layers_to_transform",
    "peft_layers_pattern", "peft_init_lora_weights",
)  # fmt: skip
_OF_ALL_ROWS = ("group_by_length", "sample_packing_sequentially", "sample_packing_group_size")


def _rates_without_effect(values: Values) -> Iterator[tuple[Sequence[str], str]]:
    """Keys of learning rates that another key leaves without a reader."""
    scheduler = str(values.get("lr_scheduler") or "cosine")
    ours = ("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup")
    if scheduler != "cosine":
        yield ours, "only lr_scheduler: cosine reads it"
    elif any(values.get(k) for k in ours):
        yield ("lr_scheduler_kwargs",), "the cosine keys say what the schedule is"
    if scheduler != "one_cycle":
        yield ("lr_div_factor",), "only lr_scheduler: one_cycle reads it"
    if values.get("loraplus_lr_ratio") is None:
        yield ("loraplus_lr_embedding",), "only loraplus_lr_ratio reads it"
    else:
        keys = ("embedding_lr", "embedding_lr_scale", "lr_groups")
        yield keys, "loraplus_lr_ratio sets all rates: use loraplus_lr_embedding"
