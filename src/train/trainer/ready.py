"""The model at the first step: loaded, checked, seeded, with its adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...compiler.packs import LONG, SHORT, leaks, leaks_between
from ...errors import PackingError, RecipeError
from ..data import Sample, collate
from ..data.images.features import Featurizer
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
    """Check that samples in one sequence do not see each other.

    Raises:
        PackingError: they do, and would not if the recipe optimized the model.
        RecipeError: they do in any case.
    """
    vocabulary = model.config.get_text_config().vocab_size

    def leaks_of(sizes: tuple[int, int]) -> str:
        return leaks(model, vocabulary, model.device, sizes)

    _require_apart(model, recipe, "samples of a pack", leaks_of)


def require_packing_of_images(
    model: Any, recipe: Recipe, featurizer: Featurizer, pad_id: int
) -> None:
    """Check the same of samples with images, where ``recipe`` packs; errors as ``require_packing``.

    Some models compute positions or masks of images for a row as a whole.
    """
    if not _packs(recipe):
        return
    token = featurizer.processor.image_token
    sample = featurizer.sample(f"One {token} two.")
    size = len(sample.input_ids)
    text = Sample(sample.input_ids[:1] * size, sample.labels)

    def batch(packs: list[list[Sample]], packing: bool) -> dict[str, Any]:
        made = collate(packs, pad_id, packing, sum(len(s.input_ids) for s in packs[0]))
        del made["labels"]
        made |= featurizer.features(packs, made)
        return {name: value.to(model.device) for name, value in made.items()}

    packs = batch([[sample, sample], [text, sample]], packing=True)
    alone = batch([[sample]], packing=False)
    _require_apart(model, recipe, "images of a pack", lambda _: leaks_between(model, packs, alone))


def _require_apart(
    model: Any, recipe: Recipe, what: str, leaks_of: Callable[[tuple[int, int]], str]
) -> None:
    from ...compiler.pipeline import optimize, restore

    leak = leaks_of(SHORT)
    if not leak:
        return
    # what is recurrent keeps samples apart when it is optimized, as it is once it has its adapter
    optimize(model, codegen="eager", packs=True)
    try:
        rest = leaks_of(LONG)
    finally:
        restore(model)
    if rest or not recipe.optimize:
        remedy = "set it to false" if rest else "set optimize: true, or sample_packing: false"
        raise (RecipeError if rest else PackingError)(
            f"sample_packing: {type(model).__name__} lets the {what} see each other, in "
            f"{rest or leak}, which cannot be told where samples begin; {remedy}"
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
