"""Checkpoints in small that read images: with a processor, whose files a recipe's run loads."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusewright.errors import RecipeError

from ...train.images.families import FAMILIES
from .checkpoint import Kind
from .rows import image

Make = Callable[[], tuple[Any, Any]]


def make_image_checkpoint(kind: Kind, folder: Path) -> str:
    """Write a small model of ``kind`` and its processor into ``folder``; return the class's name.

    Weights are in bfloat16. Raises a RecipeError if there is none of this kind.
    """
    make = makers().get(str(kind).rstrip("?"))
    if make is None:
        raise RecipeError(f"no small processor of {kind} has been made")
    torch.manual_seed(0)
    model, processor = make()
    with torch.no_grad():  # zeros would hide what a part does
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return type(model).__name__


def makers() -> dict[str, Make]:
    """What makes a model with its processor, by the kind of a checkpoint."""
    return {name: family.make for name, family in FAMILIES.items()}


def inputs_with_image(folder: Path) -> dict[str, Tensor]:
    """The inputs of a question about an image, as the checkpoint's processor makes them."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    picture = Image.open(io.BytesIO(image(0)))
    return dict(processor(text=[text], images=[[picture]], return_tensors="pt"))
