"""The recipe of one way: the user's own, without all that writes, validates, draws or reports."""

from __future__ import annotations

from typing import Any

from ..recipe.recipe import Recipe
from .ways import Way

_OFF: dict[str, Any] = {
    # where results would go
    "hub_model_id": None, "overwrite_output_dir": False, "resume_from_checkpoint": None,
    "auto_resume_from_checkpoints": False, "save_strategy": "no", "save_steps": None,
    "saves_per_epoch": None, "save_first_step": False, "load_best_model_at_end": False,
    "dataset_prepared_path": None,
    # trackers
    "use_wandb": False, "use_mlflow": False, "use_comet": False, "use_tensorboard": False,
    "use_trackio": False, "wandb_name": None, "mlflow_run_name": None, "trackio_run_name": None,
    "trackio_project_name": None, "trackio_space_id": None, "comet_api_key": None,
    # validation, and what ends a run early
    "val_set_size": 0.0, "test_datasets": [], "eval_strategy": None, "eval_steps": None,
    "evals_per_epoch": None, "early_stopping_patience": None, "loss_watchdog_threshold": None,
    "metric_for_best_model": None,
    # the rows are prepared, and come in order
    "streaming": False, "pretraining_dataset": [], "curriculum_sampling": True,
    "group_by_length": False, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
    "dataloader_drop_last": False, "batch_size": None,
    # random masks, which no two layouts have alike
    "lora_dropout": 0.0, "neftune_noise_alpha": None,
    # every step moves the weights
    "lr_scheduler": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "warmup_ratio": None, "cosine_min_lr_ratio": None, "cosine_constant_lr_ratio": None,
    "lr_quadratic_warmup": False, "lr_div_factor": None,
    "logging_steps": 1, "logging_first_step": True,
}  # fmt: skip
"""Keys that no way has, with the values that turn them off."""

_ALONE: dict[str, Any] = {
    "fsdp": None, "fsdp_config": None, "deepspeed": None, "dp_shard_size": None,
    "dp_replicate_size": None, "tensor_parallel_size": 1, "context_parallel_size": 1,
    "context_parallel": None, "ddp": None,
}  # fmt: skip
"""The same for one process."""


def alone(recipe: Recipe) -> Recipe:
    """What the ways of one process have in common."""
    return recipe.model_copy(update={**_OFF, **_ALONE})


def recipe_of(recipe: Recipe, way: Way, steps: int, folder: str) -> Recipe:
    """What one way trains by.

    Args:
        recipe: the user's, checked.
        way: with a layout.
        steps: how many.
        folder: in place of ``output_dir``.
    """
    layout = way.layout
    assert layout is not None
    changed = {
        **_OFF,
        **(_ALONE if layout.processes == 1 else {}),
        "output_dir": folder,
        "optimize": way.optimize,
        "sample_packing": layout.packing,
        "micro_batch_size": layout.rows,
        "gradient_accumulation_steps": layout.passes,
        "max_steps": steps,
    }
    return recipe.model_copy(update=changed)
