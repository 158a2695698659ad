"""Loads what prepares a checkpoint's inputs: its processor, with the recipe's tokenizer in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..recipe.recipe import Recipe
from .from_pretrained import class_by_name, pretrained
from .load import load_config
from .multimodal import is_multimodal
from .tokenizer import load_tokenizer

_INSTALL = 'pip install "fusewright[images]"'


def load_processing(recipe: Recipe) -> Any:
    """The processor of ``base_model``, with its tokenizer; where it reads text only, the tokenizer.

    Transformers calls either a ``processing_class``. Raises a RecipeError if it cannot be read, or
    a package that it needs is missing.
    """
    tokenizer = load_tokenizer(recipe)
    return load_processor(recipe, tokenizer) or tokenizer


def load_processor(recipe: Recipe, tokenizer: Any) -> Any:
    """The processor of ``base_model``; None where it reads text only, or has none.

    Raises a RecipeError as ``load_processing`` does.
    """
    if recipe.language_model_only or not is_multimodal(load_config(recipe)):
        return None
    options: dict[str, Any] = {"trust_remote_code": recipe.consent.trust_remote_code}
    if recipe.revision_of_model and not Path(recipe.base_model).exists():
        options["revision"] = recipe.revision_of_model
    factory = class_by_name(
        recipe.processor_type, "AutoProcessor", "ProcessorMixin", "processor_type"
    )
    try:
        processor = pretrained(factory, recipe.base_model, kind="other", **options)
    except RecipeError as error:
        if isinstance(error.__cause__, ImportError):
            raise RecipeError(f"base_model: images need more packages: {_INSTALL}") from error
        if recipe.processor_type is None:  # a checkpoint that has been trained on text alone
            return None
        raise
    if getattr(processor, "image_processor", None) is None:
        return None
    processor.tokenizer = tokenizer
    return processor
