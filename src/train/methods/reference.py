"""The reference model that a model is compared with while it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.utils import add_fused_lm_head

from ...errors import RecipeError
from ..checkpoint.load import readable, without_zero3
from ..checkpoint.rng_state import same_draws
from ..model.load import fit_embeddings, load_model
from ..recipe.recipe import Recipe
from ..trainer.ready import optimize_model

_COPY = "ref"
"""The adapter in which TRL keeps the initial state of the trained one."""

_FILE = "reference.safetensors"
"""The weights of a reference model in a checkpoint."""

_IDLE = ("lora_A", "lora_embedding_A", "lora_magnitude_vector", "modules_to_save")
"""Weights of an adapter that change nothing as long as LoRA's B is zero."""


def reference_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The base model before training, without gradients; optimized if the recipe is.

    For a recipe without an adapter. The embeddings get rows for the tokens of ``tokenizer``.
    """
    with without_zero3():  # TRL's trainer shards it as a whole
        model = load_model(recipe)
    with same_draws(recipe.seed):  # as for the trained model
        fit_embeddings(model, tokenizer, recipe)
    model.requires_grad_(False)
    model.eval()
    optimize_model(model, recipe)
    return model


def write_reference(model: Any, folder: Path) -> None:
    """Write the weights of a reference model that moves, whole, into a checkpoint."""
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / _FILE)


def read_reference(model: Any, folder: Path) -> None:
    """Load the weights that a reference model had at a checkpoint.

    Raises:
        RecipeError: the checkpoint has none, or those of another model.
    """
    with readable(folder):
        weights = load_file(folder / _FILE)
        if weights.keys() != dict(model.named_parameters()).keys():
            raise RecipeError(
                f"{folder}: {_FILE} has the weights of another model than the reference; resume "
                "from another checkpoint"
            )
        model.load_state_dict(weights, strict=False)  # buffers are not kept


def drop_idle_copy(model: Any) -> None:
    """Remove TRL's copy of an adapter that changes nothing yet: the plain model is the same."""
    if _COPY not in getattr(model, "peft_config", {}):
        return
    if all(_is_idle(name, p) for name, p in model.named_parameters() if f".{_COPY}." in name):
        model.delete_adapter(_COPY)


def restore_reference(model: Any, recipe: Recipe) -> None:
    """Compare a trained adapter with its initial state, not with the copy that TRL makes of it."""
    if _COPY not in getattr(model, "peft_config", {}):
        return
    model.delete_adapter(_COPY)
    if recipe.lora_model_dir is not None:
        model.load_adapter(recipe.lora_model_dir, _COPY)


@torch.no_grad()
def _is_idle(name: str, weight: torch.Tensor) -> bool:
    if any(part in name for part in _IDLE):
        return True
    return ("lora_B" in name or "lora_embedding_B" in name) and not bool(weight.any())


def add_reference(trainer: Any, model: Any) -> None:
    """Set ``model`` as the reference of TRL's GRPO trainer, as if TRL had loaded it."""
    add_fused_lm_head(model, temperature=trainer.temperature)
    if trainer.is_deepspeed_enabled:
        trainer.ref_model = prepare_deepspeed(model, trainer.accelerator)
    elif trainer.is_fsdp_enabled:
        trainer.ref_model = prepare_fsdp(model, trainer.accelerator)
    else:
        trainer.ref_model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    if trainer.args.sync_ref_model:
        trainer.add_callback(SyncRefModelCallback(trainer.ref_model, trainer.accelerator))
