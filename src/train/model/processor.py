"""Loads what prepares images for a checkpoint: its processor, with the recipe's tokenizer in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..data.images.expansion import Expander
from ..data.images.features import Featurizer
from ..data.images.picture import Resizing
from ..recipe.recipe import Recipe
from .from_pretrained import class_by_name, pretrained
from .load import load_config
from .multimodal import is_multimodal

_INSTALL = 'pip install "fusewright[images]"'


def load_processor(recipe: Recipe, tokenizer: Any) -> Any:
    """The processor of ``base_model``; None where it reads text only, or has none.

    Raises a RecipeError if a package that it needs is missing, or it cannot be read.
    """
    config = load_config(recipe)
    if not is_multimodal(config) or recipe.language_model_only:
        return None
    options: dict[str, Any] = {"trust_remote_code": recipe.consent.trust_remote_code}
    if recipe.revision_of_model and not Path(recipe.base_model).exists():
        options["revision"] = recipe.revision_of_model
    factory = class_by_name(recipe.processor_type, "AutoProcessor", "ProcessorMixin", "processor_type")
    try:
        processor = pretrained(factory, recipe.base_model, kind="other", **options)
    except RecipeError as error:
        if isinstance(error.__cause__, ImportError):
            raise RecipeError(f"base_model: images need more packages: {_INSTALL}") from error
        if recipe.processor_type is None:  # a checkpoint of the language model alone
            return None
        raise
    if getattr(processor, "image_processor", None) is None:
        return None
    processor.tokenizer = tokenizer
    return processor


def resizing_of(recipe: Recipe) -> Resizing:
    """What the recipe does to the size of images."""
    size = recipe.image_size
    if isinstance(size, list):
        size = (size[0], size[-1])  # type: ignore[assignment]
    return Resizing(
        size, recipe.image_max_pixels, recipe.image_min_pixels, recipe.image_resize_algorithm  # type: ignore[arg-type]
    )


def expander_of(recipe: Recipe, processor: Any) -> Expander | None:
    """What places images in texts; None without a processor."""
    return None if processor is None else Expander(processor, _options(recipe))


def featurizer_of(recipe: Recipe, processor: Any) -> Featurizer | None:
    """What makes features of a batch's images; None without a processor."""
    if processor is None:
        return None
    return Featurizer(processor, resizing_of(recipe), _options(recipe))


def _options(recipe: Recipe) -> dict[str, Any]:
    return {"images_kwargs": recipe.processor_kwargs} if recipe.processor_kwargs else {}
