"""Loads what prepares a checkpoint's inputs: its tokenizer, and the processor of its images."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...errors import RecipeError, first_line
from ...packages import install_extra
from ..processing import Processing
from ..recipe.recipe import Recipe
from .base_files import processor_files
from .from_pretrained import class_by_name, pretrained
from .load import load_config
from .multimodal import is_multimodal
from .tokenizer import load_tokenizer

_ABSENT = (
    "base_model has no processor of images: copy processor_config.json or preprocessor_config.json "
    "there from the checkpoint it was made of"
)
_PACKAGES = ("PIL", "torchvision")
"""Those that all processors of images need; without them, they raise this and that."""


def load_processing(recipe: Recipe) -> Processing:
    """What makes inputs of a recipe's rows; raises a RecipeError if there is no usable tokenizer.

    A processor that is missing, or cannot be loaded, is no error before a row has an image.
    """
    return with_processor(recipe, load_tokenizer(recipe))


def with_processor(recipe: Recipe, tokenizer: Any) -> Processing:
    """The same with a tokenizer that has been loaded; the processor gets it, with its template."""
    if recipe.language_model_only:
        return Processing(tokenizer, None, "language_model_only leaves out what reads images")
    if not is_multimodal(load_config(recipe)):
        return Processing(tokenizer)
    try:
        processor = _processor(recipe)
    except RecipeError as error:
        if recipe.processor_type is not None:
            raise
        why = f"the processor of base_model cannot be loaded: {first_line(error)}"
        if not processor_files(recipe.base_model, recipe.revision_of_model):
            why = _ABSENT
        if isinstance(error.__cause__, ImportError) or not all(map(find_spec, _PACKAGES)):
            why = f"packages that read images are missing: {install_extra('images')}"
        return Processing(tokenizer, None, why)
    if getattr(processor, "image_processor", None) is None:
        return Processing(tokenizer, None, _ABSENT)
    if getattr(tokenizer, "chat_template", None) is None:
        tokenizer.chat_template = getattr(processor, "chat_template", None)
    processor.tokenizer = tokenizer
    processor.chat_template = tokenizer.chat_template
    return Processing(tokenizer, processor)


def _processor(recipe: Recipe) -> Any:
    options: dict[str, Any] = {"trust_remote_code": recipe.consent.trust_remote_code}
    if recipe.revision_of_model and not Path(recipe.base_model).exists():
        options["revision"] = recipe.revision_of_model
    factory = class_by_name(
        recipe.processor_type, "AutoProcessor", "ProcessorMixin", "processor_type"
    )
    return pretrained(factory, recipe.base_model, kind="other", **options)
