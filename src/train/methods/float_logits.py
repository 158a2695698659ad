"""Logits in float32 for losses that would round in the model's dtype."""

from __future__ import annotations

from typing import Any


class FloatLogits:
    """A model whose logits are float32, as accelerate's mixed precision returns them.

    The sum of an answer's log-probabilities is of the order of its length: in bfloat16 it would be
    rounded by more than two answers differ.

    Args:
        model: what is called.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, with their logits cast."""
        outputs = self.model(*args, **kwargs)
        outputs.logits = outputs.logits.float()
        return outputs
