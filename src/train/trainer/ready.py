"""The model at the first step: loaded, checked, seeded, with its adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...errors import RecipeError
from ..data import leaks
from ..model.adapters import add_adapter
from ..model.load import fit_embeddings, load_model
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
    model = load_model(recipe, torch.device("cpu") if on_cpu else None, say)
    # only rows of language models are packed: a recipe of any other is refused
    packs = recipe.packs() or (recipe.validates() and recipe.packs_validation())
    if packs and leaks(model, model.config.get_text_config().vocab_size, model.device):
        raise RecipeError(
            f"sample_packing: {type(model).__name__} lets the samples of a pack see each other; "
            "set it to false"
        )
    set_seed(recipe.seed)
    added = fit_embeddings(model, tokenizer, recipe)
    if added:
        say(f"embeddings: {added:+,} rows, for the tokens of the tokenizer")
    return add_adapter(model, recipe)


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
        compile_no_grad=compared,
    )  # fmt: skip
