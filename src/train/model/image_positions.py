"""Positions of tokens in a model that counts rows and columns of an image (multimodal RoPE).

Such a model (Qwen2-VL, https://arxiv.org/abs/2409.12191) has several positions for each token, and
computes them itself where a sequence is one sample. Those of a pack are computed when the batch is
made, for each sample by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class ImagePositions:
    """Calls a model's method without the model; it can be pickled.

    Attributes:
        kind: the class of the module with the method ``get_rope_index``.
        config: of that module.
    """

    kind: type[Any]
    config: Any

    def __call__(self, ids: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """The positions (axes, T) of one sample's tokens (1, T) with their features."""
        module: Any = object.__new__(self.kind)
        nn.Module.__init__(module)
        module.config = self.config
        known = inspect.signature(self.kind.get_rope_index).parameters
        taken = {name: value for name, value in features.items() if name in known}
        positions: Tensor = module.get_rope_index(ids, **taken)[0]
        return positions[:, 0]


def positions_of_images(model: nn.Module) -> ImagePositions | None:
    """How a model has positions of images; None: one for each token."""
    for module in model.modules():
        if callable(getattr(type(module), "get_rope_index", None)):
            return ImagePositions(type(module), module.config)
    return None
