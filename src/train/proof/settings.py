"""The recipe of one way: the user's own, without all that writes, validates, draws or reports."""

from __future__ import annotations

from typing import Any

from ..recipe.keys.base import Keys
from ..recipe.keys.output import OutputKeys
from ..recipe.keys.tracking import TrackingKeys
from ..recipe.recipe import Recipe
from .ways import Way


def _defaults(group: type[Keys]) -> dict[str, Any]:
    """The keys of a group, each as if it were unset."""
    fields = group.model_fields.items()
    return {name: field.get_default(call_default_factory=True) for name, field in fields}


_OFF: dict[str, Any] = {
    # trackers: each has a switch, without which other keys would imply it
    **{
        name: False if name.startswith("use_") else default
        for name, default in _defaults(TrackingKeys).items()
    },
    # where results would go, when they would be saved, validation, and what is logged
    **_defaults(OutputKeys), "save_strategy": "no", "dataset_prepared_path": None,
    "val_set_size": 0.0, "test_datasets": [],
    # what ends a run early
    "early_stopping_patience": None, "loss_watchdog_threshold": None,
    # the rows are prepared, and come in order
    "streaming": False, "pretraining_dataset": [], "curriculum_sampling": True,
    "group_by_length": False, "dataloader_num_workers": 0, "dataloader_prefetch_factor": None,
    "dataloader_drop_last": False, "batch_size": None,
    # random masks, which no two layouts have alike
    "lora_dropout": 0.0, "neftune_noise_alpha": None,
    # every step moves the weights
    "lr_scheduler": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0,
    "warmup_ratio": None, "cosine_min_lr_ratio": None, "cosine_constant_lr_ratio": None,
    "lr_quadratic_warmup": False, "lr_div_factor": None, "jagged_restart_steps": None,
    "jagged_restart_warmup_steps": None, "jagged_restart_anneal_steps": None,
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
