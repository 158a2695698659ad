"""What a recipe says about the images of its rows, as objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....errors import RecipeError
from ...processing import Processing
from ...recipe.recipe import Dataset, Recipe
from .expansion import Expander
from .features import Featurizer
from .picture import TEXT_ONLY, Gallery, NoImages, Picture, Resizing


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of one dataset's rows, and places them in texts.

    Attributes:
        settings: what the tokens depend on, as JSON.
    """

    gallery: Gallery
    expander: Expander
    settings: dict[str, Any]


def no_images(processing: Processing) -> NoImages:
    """Why images are not read, where there is no processor."""
    return NoImages(processing.why_not) if processing.why_not else TEXT_ONLY


def reader_of(
    recipe: Recipe, dataset: Dataset, processing: Processing, copies: Path
) -> ImageReader | NoImages:
    """The reader of a dataset's images. ``copies``: the folder for bytes that rows hold."""
    processor = processing.processor
    if processor is None:
        return no_images(processing)
    path = Path(dataset.path)  # of the hub: no such folder is here
    folder = Path(dataset.images_dir or (path.parent if path.is_file() else path))
    resizing = resizing_of(recipe)
    gallery = Gallery(folder, copies, resizing, recipe.consent.allow_image_urls)
    settings = {
        "processor": processor.to_json_string(), "resizing": repr(resizing),
        "options": recipe.processor_kwargs, "folder": str(folder),
    }  # fmt: skip
    try:
        expander = Expander(processor, _options(recipe))
    except RecipeError as error:
        return NoImages(str(error))
    return ImageReader(gallery, expander, settings)


def featurizer_of(recipe: Recipe, processing: Processing) -> Featurizer | None:
    """What makes features of images; None: the model reads none."""
    if processing.processor is None:
        return None
    return Featurizer(processing.processor, resizing_of(recipe), _options(recipe))


def sample_picture(recipe: Recipe, processing: Processing) -> Picture | None:
    """The image that ``sample_prompt`` is about, opened; None: there is none.

    Raises:
        RecipeError: the model reads no images.
        DataError: it cannot be read.
    """
    if not recipe.sample_image or not recipe.sample_prompt:
        return None
    if processing.processor is None:
        raise RecipeError(f"sample_image: {no_images(processing).why}")
    return Gallery(None, Path(), resizing_of(recipe)).picture(
        Path(recipe.sample_image), "sample_image"
    )


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
