"""What a recipe says about the images of its rows, as objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...recipe.recipe import Dataset, Recipe
from .expansion import Expander
from .features import Featurizer
from .picture import Gallery, Resizing


def tokenizer_and_processor(processing: Any) -> tuple[Any, Any]:
    """The tokenizer of a ``processing_class``, and itself, if it is a processor; else None."""
    inner = getattr(processing, "tokenizer", None)
    return (processing, None) if inner is None else (inner, processing)


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of one dataset's rows, and places them in texts.

    Attributes:
        settings: what the tokens depend on, as JSON.
    """

    gallery: Gallery
    expander: Expander
    settings: dict[str, Any]


def reader_of(
    recipe: Recipe, dataset: Dataset, processor: Any, copies: Path
) -> ImageReader | None:
    """The reader of a dataset; None without a processor. ``copies``: for bytes that rows hold."""
    if processor is None:
        return None
    path = Path(dataset.path)
    folder = Path(dataset.images_dir or (path if path.is_dir() else path.parent))
    resizing = resizing_of(recipe)
    gallery = Gallery(folder, copies, resizing, recipe.consent.allow_image_urls)
    settings = {
        "processor": processor.to_json_string(), "resizing": repr(resizing),
        "options": recipe.processor_kwargs, "folder": str(folder),
    }  # fmt: skip
    return ImageReader(gallery, Expander(processor, _options(recipe)), settings)


def featurizer_of(recipe: Recipe, processor: Any) -> Featurizer | None:
    """What makes features of a batch's images; None without a processor."""
    if processor is None:
        return None
    return Featurizer(processor, resizing_of(recipe), _options(recipe))


def resizing_of(recipe: Recipe) -> Resizing:
    """What the recipe does to the size of images."""
    size = recipe.image_size
    return Resizing(
        (size[0], size[-1]) if isinstance(size, list) else size,
        recipe.image_max_pixels,
        recipe.image_min_pixels,
        recipe.image_resize_algorithm,
    )


def _options(recipe: Recipe) -> dict[str, Any]:
    return {"images_kwargs": recipe.processor_kwargs} if recipe.processor_kwargs else {}
