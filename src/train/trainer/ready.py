"""The model at the first step: loaded, checked, seeded, with its adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import PackingError, RecipeError
from ..model.adapters import add_adapter
from ..model.load import fit_embeddings, load_model
from ..model.merge_aware import exported_layers, round_in_training
from ..model.qat import fake_quantize
from ..recipe.preferences import preference_settings
from ..recipe.recipe import Recipe


def ready_model(
    recipe: Recipe, tokenizer: Any, say: Callable[[str], None], on_cpu: bool = False
) -> Any:
    """Load and prepare the model that a checked recipe trains.

    The embeddings get rows for the tokens of ``tokenizer``. ``on_cpu`` leaves the model in CPU
    memory, to be sharded before it is used. ``say`` reports what the user may not expect.

    Raises:
        RecipeError: there is no such model, or it cannot be trained as the recipe says.
    """
    from transformers import set_seed

    say(f"loading {recipe.base_model}")
    model = load_model(recipe, torch.device("cpu") if on_cpu else None, say, True)
    # only rows of language models are packed: a recipe of any other is refused
    if _packs(recipe):
        require_packing(model, recipe)
    set_seed(recipe.seed)
    added = fit_embeddings(model, tokenizer, recipe)
    if added:
        say(f"embeddings: {added:+,} rows, for the tokens of the tokenizer")
    fake_quantize(model, recipe)
    paths = exported_layers(model, recipe)
    model = add_adapter(model, recipe, say)
    round_in_training(model, recipe, paths, say)
    return model


def _packs(recipe: Recipe) -> bool:
    return recipe.packs() or (recipe.validates() and recipe.packs_validation())


def require_packing(model: Any, recipe: Recipe) -> None:
    """Check, by the structure of ``model``, that samples in one sequence do not see each other.

    Raises:
        PackingError: they do, and would not if the recipe optimized the model.
        RecipeError: they do in any case.
    """
    from ...compiler.packs import unpackable

    what = "sample_packing: the samples of a pack would see each other"
    if reason := unpackable(model):
        raise RecipeError(f"{what}: {reason}; set sample_packing: false")
    if not recipe.optimize and (reason := unpackable(model, optimized=False)):
        raise PackingError(f"{what}: {reason}; set optimize: true, or sample_packing: false")


def require_packing_of_images(model: Any, recipe: Recipe) -> None:
    """Check the same of samples with images, where ``recipe`` packs.

    Raises:
        RecipeError: the model makes masks of images for rows of one sample.
    """
    from ...compiler.packs import unpackable_images

    if _packs(recipe) and (reason := unpackable_images(model)):
        raise RecipeError(
            f"sample_packing: the images of a pack would see each other: {reason}; "
            "set sample_packing: false"
        )


def optimize_model(model: Any, recipe: Recipe) -> None:
    """Optimize a trained model or its reference in place, if the recipe asks for it.

    Where a loss compares the model with a reference, passes without gradients are compiled as
    those with gradients are: else a difference of roundings is taken for one of models.
    """
    if not recipe.optimize:
        return
    from ...compiler.pipeline import optimize

    settings = preference_settings(recipe)
    compared = settings is not None and settings.reference and not settings.generates
    optimize(
        model, codegen=recipe.codegen, memory=recipe.memory, strict=recipe.strict,
        compile_no_grad=compared, packs=_packs(recipe), cuda_graphs=recipe.cuda_graphs,
    )  # fmt: skip
