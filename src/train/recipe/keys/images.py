"""The keys of rows with images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .base import Int, Keys, PositiveInt, key, subsumed

_ONE_SIZE = "image_size gives each image the same size: set one of them"

_SIZES = Annotated[list[PositiveInt], Field(min_length=1, max_length=2)]


class ImageKeys(Keys):
    """What is done with images before the model has them, and whether its towers are trained."""

    is_multimodal: bool | None = subsumed("whether base_model reads images is seen in its files")
    """Whether the model also takes images. Unset: as its files say."""

    processor_type: str | None = None
    """The class of transformers that prepares images. Unset: ``AutoProcessor``."""

    processor_kwargs: dict[str, Any] | None = None
    """Arguments for its image processor, e.g. ``{max_pixels: 1003520}``. Unset: as in the
    checkpoint's files."""

    image_size: PositiveInt | _SIZES | None = key(
        excludes={"image_max_pixels or image_min_pixels": _ONE_SIZE}
    )
    """The size that each image is resized to, before the processor has it: one number, a square
    with black bars; or width and height. Unset: as it is."""

    image_max_pixels: Int | None = key(gt=0)
    """Larger images are reduced to so many pixels, in proportion: fewer tokens stand for them.
    Unset: as the processor does it."""

    image_min_pixels: Int | None = key(gt=0)
    """Smaller images are enlarged to so many pixels. Unset: as the processor does it."""

    image_resize_algorithm: Literal[
        "nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"
    ] = "bilinear"
    """How ``image_size`` and the limits of pixels resize."""

    freeze_mm_modules: bool = True
    """Leave the towers and what projects their outputs as they are. False: they are trained, or get
    adapters, as the language model does."""
