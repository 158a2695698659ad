"""Saving the trained model, and the check that the saved adapter can be used."""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import FusewrightError, first_line
from ..data.chat.stops import write_stops
from ..model.base_files import BaseFiles, base_files, copy_processor, save_with_base
from ..model.merge_aware import stop_rounding
from ..model.multimodal import is_multimodal, use_cache
from ..model.relora import relora_of
from ..output_files import let_others_read
from ..recipe.preferences import head_of
from ..recipe.recipe import Recipe
from ..report import model_card as card
from .files import CheckpointWriteError, write_error_reason
from .ownership import PART

_PROBE = 64
"""Tokens that the saved adapter is tested with."""


def save_whole(
    model: Any,
    tokenizer: Any,
    folder: Path,
    state: dict[str, Any] | None = None,
    recipe: Recipe | None = None,
) -> None:
    """As ``save``, but every file is complete or as before; CheckpointWriteError on a full disk."""
    part = folder / PART
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save(model, tokenizer, part, state, recipe)
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


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    state: dict[str, Any] | None = None,
    recipe: Recipe | None = None,
) -> None:
    """Write the adapter (or the whole model, if it has none) and the tokenizer.

    ``state`` has the weights by name, where the model has only a part of them. With ``recipe``, a
    whole model also gets what it does not train of its base.
    """
    if hasattr(model, "peft_config"):
        kwargs: dict[str, Any] = {} if state is None else {"state_dict": state}
        # only the trained adapter: a reference's may be there, too; "auto" would ask the hub
        # whether the vocabulary grew
        adapters = list(model.active_adapters)
        relora = relora_of(model)
        has_card = (folder / card.NAME).exists()
        with relora.whole() if relora is not None else contextlib.nullcontext():
            model.save_pretrained(
                folder, save_embedding_layers=False, selected_adapters=adapters, **kwargs
            )
        for name in adapters:
            _sort_sets(model.peft_config[name], folder / ("" if name == "default" else name))
        if not has_card:  # PEFT's, which says nothing; a finished run writes its own
            (folder / card.NAME).unlink(missing_ok=True)
    else:
        files = None if recipe is None else _base_files(recipe)
        with _with_cache(model):
            save_with_base(model, folder, files, state)
    let_others_read(folder)
    tokenizer.save_pretrained(folder)
    if recipe is not None:  # of a whole model: an adapter's folder has no such settings
        write_stops(folder, tokenizer, recipe.chat_template_kwargs or {})
    whole = recipe is not None and not hasattr(model, "peft_config")
    if recipe is not None and whole and is_multimodal(model.config):
        copy_processor(recipe.base_model, recipe.revision_of_model, folder)


def _sort_sets(config: Any, folder: Path) -> None:
    """Let equal adapters have equal files: PEFT writes sets in the order of Python's hashes."""
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in vars(config).items():
        if isinstance(value, set) and isinstance(content.get(key), list):
            content[key] = sorted(content[key])
    path.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


def _base_files(recipe: Recipe) -> BaseFiles | None:
    """The files of the base, if there are any; what was trained is saved in any case."""
    if head_of(recipe).classifies or recipe.base_model_config or recipe.overrides_of_model_config:
        return None  # what the model lacks of its base, it lacks on purpose
    try:
        return base_files(recipe.base_model, recipe.revision_of_model)
    except (FusewrightError, OSError) as error:
        warnings.warn(
            f"the files of {recipe.base_model} cannot be read any more ({first_line(error)}): what "
            "is saved has all that was loaded, and nothing of what was not (towers with "
            "language_model_only, mtp.*)",
            stacklevel=2,
        )
        return None


@contextlib.contextmanager
def _with_cache(model: Any) -> Iterator[None]:
    """Let the configuration ask for a cache, as generation wants; training has switched it off."""
    use_cache(model.config, True)
    try:
        yield
    finally:
        use_cache(model.config, False)


@dataclass(frozen=True)
class AdapterCheck:
    """How the saved adapter compares, in plain PEFT on the plain base model.

    Attributes:
        exact: its logits equal those of the trained adapter there, bit for bit.
        optimized_difference: largest difference from the optimized model's logits, over their
            largest size; what rounding in another order makes.
    """

    exact: bool
    optimized_difference: float


_OF_TOKENS = {"input_ids", "position_ids", "attention_mask"}
"""What a model of texts reads of a batch."""

LEAVE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initializations of LoRA (``init_lora_weights``) that leave the base weights alone."""


def uncheckable(model: Any) -> str | None:
    """Why the saved adapter of ``model`` cannot be tested on the base in memory, or None."""
    for config in model.peft_config.values():
        init = getattr(config, "init_lora_weights", None)
        if init not in LEAVE_BASE:
            return f"{init} has changed the base weights in memory"
        if getattr(config, "layer_replication", None):
            return "the base model has replicated layers"
    return None


@torch.no_grad()
def check_adapter(
    model: Any, recipe: Recipe, folder: Path, batch: dict[str, Any],
    autocast: contextlib.AbstractContextManager[Any],
) -> tuple[Any, AdapterCheck]:  # fmt: skip
    """Load the saved adapter from ``folder`` with plain PEFT, and compare.

    ``model`` is the trained PEFT model; it is restored, and stripped of its adapters. The recipe
    says whether it is optimized, and in which dtype adapters are loaded. Of ``batch``, which is one
    of the trainer's, only what the model reads is used. ``autocast`` is what the trainer computes
    in: accelerate has put it into ``model.forward``, which then returns float32.

    Returns:
        The plain base model with the adapter from ``folder``, and the comparison.
    """
    from peft import PeftModel

    read = inspect.signature(type(model.get_base_model()).forward).parameters.keys() - {"labels"}
    inputs = {k: v.to(model.device) for k, v in batch.items() if k in read | _OF_TOKENS}
    if not inputs.keys() - _OF_TOKENS:  # else what reads images is compared, too
        inputs = {k: v[..., :_PROBE] for k, v in inputs.items()}
    model.eval()
    before = trained = model(**inputs).logits
    if recipe.optimize:
        from ...compiler.pipeline import restore

        restore(model)
        trained = model(**inputs).logits
    if stop_rounding(model):  # what that makes is no difference between adapters
        rounded, trained = trained, model(**inputs).logits
        before = before - rounded + trained
    plain = PeftModel.from_pretrained(
        model.unload(), folder, autocast_adapter_dtype=recipe.peft_autocast_adapter_dtype
    ).eval()
    with autocast:
        saved = plain(**inputs).logits.to(trained.dtype)
    difference = (before.float() - saved.float()).abs().max() / saved.float().abs().max()
    return plain, AdapterCheck(torch.equal(trained, saved), float(difference))


def plot(history: Sequence[dict[str, float]], path: Path, name: str = "loss") -> None:
    """Draw training and validation loss (or the figure ``name``) over the steps as a PNG.

    Entries of ``history`` have ``step`` and ``loss`` or ``eval_loss``.
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
