"""What a run leaves behind, and the check that it can be used."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..recipe.recipe import Recipe
from ..report import model_card as card
from .files import CheckpointWriteError, write_error_reason
from .ownership import PART

_PROBE = 64
"""Tokens that the saved adapter is tried on."""


def save_whole(
    model: Any, tokenizer: Any, folder: Path, state: dict[str, Any] | None = None
) -> None:
    """As ``save``, but every file is there whole or as it was before.

    Raises:
        CheckpointWriteError: the disk is full, or cannot be written to.
    """
    part = folder / PART
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save(model, tokenizer, part, state)
        for path in sorted(part.iterdir()):
            target = folder / path.name
            if path.name == card.NAME and target.exists() and not card.is_generated(target):
                continue  # a person's own; PEFT always writes its form
            if path.is_dir():  # of chat templates
                shutil.rmtree(target, ignore_errors=True)
            path.replace(target)
    except Exception as error:
        reason = write_error_reason(error)
        if reason is None:
            raise
        raise CheckpointWriteError(reason) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save(model: Any, tokenizer: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write the adapter (or the whole model, if it has none) and the tokenizer.

    Args:
        model: which the weights are of.
        tokenizer: of the run.
        folder: where to.
        state: the weights by their names, where the model has only a part of them.
    """
    given: dict[str, Any] = {} if state is None else {"state_dict": state}
    if hasattr(model, "peft_config"):
        # of adapters, that which is trained: a reference's may be there, too; "auto" would ask the
        # hub whether the vocabulary grew
        chosen = list(model.active_adapters)
        model.save_pretrained(
            folder, save_embedding_layers=False, selected_adapters=chosen, **given
        )
    else:
        with _with_cache(model):
            model.save_pretrained(folder, **given)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _with_cache(model: Any) -> Iterator[None]:
    """Let the configuration ask for a cache, as generation wants; training has switched it off."""
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = False


@dataclass(frozen=True)
class AdapterCheck:
    """How the saved adapter compares, on plain PEFT over the plain base model.

    Attributes:
        exact: its logits equal those of the trained adapter there, bit for bit.
        optimized_difference: largest difference from the optimized model's logits, over their
            largest size; what rounding in another order makes.
    """

    exact: bool
    optimized_difference: float


_LEAVE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin LoRA's weights (``init_lora_weights``) that leave the base weights alone."""


def uncheckable(model: Any) -> str | None:
    """Why the saved adapter of ``model`` cannot be tried on the base that is in memory, or None."""
    for config in model.peft_config.values():
        begun = getattr(config, "init_lora_weights", None)
        if begun not in _LEAVE_BASE:
            return f"{begun} has changed the base weights in memory"
        if getattr(config, "layer_replication", None):
            return "the base model has replicated layers"
    return None


@torch.no_grad()
def check_adapter(
    model: Any, recipe: Recipe, folder: Path, batch: dict[str, Any]
) -> tuple[Any, AdapterCheck]:
    """Load the saved adapter as anybody would, and compare.

    Args:
        model: the trained PEFT model; restored, and stripped of its adapters.
        recipe: says whether it is optimized, and in which dtype adapters are loaded.
        folder: where the adapter is.
        batch: a batch, as the trainer takes them; only what the model reads is used.

    Returns:
        The plain base model with the adapter from ``folder``, and the comparison.
    """
    from peft import PeftModel

    inputs = {
        k: v[:, :_PROBE].to(model.device)
        for k, v in batch.items()
        if k in ("input_ids", "position_ids", "attention_mask")
    }
    model.eval()
    before = trained = model(**inputs).logits
    if recipe.optimize:
        from ...compiler.pipeline import restore

        restore(model)
        trained = model(**inputs).logits
    plain = PeftModel.from_pretrained(
        model.unload(), folder, autocast_adapter_dtype=recipe.peft_autocast_adapter_dtype
    ).eval()
    saved = plain(**inputs).logits
    difference = (before.float() - saved.float()).abs().max() / saved.float().abs().max()
    return plain, AdapterCheck(torch.equal(trained, saved), float(difference))


def plot(history: Sequence[dict[str, float]], path: Path, name: str = "loss") -> None:
    """Draw training and validation loss over the steps as a PNG.

    Args:
        history: entries with ``step`` and ``loss`` or ``eval_loss``.
        path: the file.
        name: another figure to draw in place of the loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, style, label in ((name, "-", "training"), (f"eval_{name}", "o--", "validation")):
        points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token" if name == "loss" else name)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
    figure.savefig(path)
