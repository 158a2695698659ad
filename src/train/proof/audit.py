"""``fusewright audit``: judge a recipe's first step, a run's model, or what a script builds."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...auditing.audit import audit
from ...auditing.findings import Audit
from ...errors import DataError, FusewrightError, ModelError, RecipeError, first_line
from ..consent import Consent
from ..data import PreparedData, prepare
from ..inference.load_run import load_model_of
from ..inference.load_run import load_processing as processing_of
from ..inference.run_folder import open_run
from ..inference.run_recipe import recipe_with
from ..methods.task import task_of
from ..model.load import quiet
from ..model.precision import computes_in
from ..model.processor import load_processing
from ..processing import Processing
from ..recipe.preferences import method_of
from ..recipe.recipe import Recipe
from ..terminal import Terminal, announce, say
from ..trainer.build import featurizer_for
from ..trainer.ready import optimize_model, ready_model
from ..user_functions import load_function, located

_ROWS = 64
"""So many rows of each dataset are prepared: the first batch is made of them."""


def of_recipe(recipe: Recipe, tokens: int) -> Audit:
    """Audit the model that a checked recipe trains, as it trains it, on its first rows.

    Raises:
        RecipeError: it trains by another loss than the model's own.
        DataError: a dataset cannot be used.
    """
    _require_supervised(recipe)
    with quiet():
        processing = load_processing(recipe)
        prepared = _prepared(recipe, processing)
        model = ready_model(recipe, processing.tokenizer, announce)
        batch = _batch(model, recipe, processing, prepared)
        optimize_model(model, recipe)
        model.train()
        return _audit(model, batch, recipe, processing.tokenizer, tokens)


def of_run(folder: Path, consent: Consent, tokens: int) -> Audit:
    """Audit the model that a run has saved, with its adapter, on the run's own rows.

    Raises:
        ModelError: there is nothing usable, or it says nothing about the rows.
    """
    run = open_run(folder, consent=consent)
    if not run.recipe:
        raise ModelError(
            f"{folder} has no run.json with the recipe, so that there are no rows to audit it on: "
            "audit a script's function that returns model and batches"
        )
    recipe = recipe_with(run, {})
    _require_supervised(recipe)
    with quiet():
        processing = processing_of(run)
        prepared = _prepared(recipe, processing)
        model = load_model_of(run)
        batch = _batch(model, recipe, processing, prepared)
        if run.adapter:
            model.base_model.set_adapter(model.active_adapters)  # which makes them trainable
        model.train()
        return _audit(model, batch, recipe, processing.tokenizer, tokens)


def of_function(name: str, tokens: int) -> Audit:
    """Audit what a function of a script returns: a model, and a batch or several.

    The caller has named the script, so that it is run.

    Raises:
        RecipeError: there is no such function, or it fails.
        DataError: it returns something else.
    """
    function = load_function(located(name, [Path.cwd()]), "audit", Consent(allow_code=True))
    try:
        result = function()
    except FusewrightError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeError(
            f"{name} failed: {type(error).__name__}: {first_line(error)} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error
    if not (isinstance(result, Sequence) and len(result) in (2, 3)):
        raise DataError(
            f"{name} returns {type(result).__name__}: a model and its batches, and if you like a "
            "tokenizer, are what is audited"
        )
    model, batches, *rest = result
    if not isinstance(model, torch.nn.Module):
        raise DataError(f"{name} returns {type(model).__name__} as its model")
    return audit(model, batches, tokenizer=rest[0] if rest else None, tokens=tokens)


def show(result: Audit, as_json: bool) -> int:
    """Print an audit; returns the exit code."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2, default=str))
    else:
        console = Terminal(highlight=False)
        for line in str(result).splitlines():
            say(console, line)
    return int(not result.passed)


def _require_supervised(recipe: Recipe) -> None:
    if recipe.kd_trainer or method_of(recipe) is not None:
        raise RecipeError(
            "audit compares losses of supervised training, and this recipe trains by another one: "
            "train audits that at its first step"
        )


def _prepared(recipe: Recipe, processing: Processing) -> PreparedData:
    """The first rows; raises a DataError if none of them can be trained."""
    prepared = prepare(recipe, processing, Terminal(stderr=True), limit=_ROWS)
    if not len(task_of(recipe).sequences(prepared)):
        raise DataError("audit: the datasets have no row that can be trained")
    return prepared


def _batch(
    model: Any, recipe: Recipe, processing: Processing, prepared: PreparedData
) -> Mapping[str, Any]:
    """The first batch, in the order of the dataset."""
    task = task_of(recipe)
    sequences = task.sequences(prepared)
    featurizer = featurizer_for(model, recipe, processing, prepared.has_extra())
    collate = task.collate(processing.tokenizer, featurizer)
    number = min(len(sequences), recipe.micro_batch_size)
    return collate([sequences[at] for at in range(number)])


def _audit(
    model: Any, batch: Mapping[str, Any], recipe: Recipe, tokenizer: Any, tokens: int
) -> Audit:
    device = next(p.device for p in model.parameters())
    there = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    half = computes_in(recipe.precision()) == "float16"
    return audit(
        model, there, tokenizer=tokenizer, autocast=torch.float16 if half else None,
        checkpointing=recipe.checkpointing() or None, tokens=tokens,
    )  # fmt: skip
