"""What makes a model's inputs of rows: its tokenizer, and the processor of its images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Processing:
    """A checkpoint's tokenizer, and its processor if it reads images.

    Attributes:
        tokenizer: a fast tokenizer, set up as the recipe says.
        processor: of transformers, with this tokenizer; None: images are not read.
        why_not: what keeps a checkpoint that reads images from doing so here, and what to do.
    """

    tokenizer: Any
    processor: Any = None
    why_not: str = ""

    @classmethod
    def of(cls, processing: Any) -> Processing:
        """The same of transformers' ``processing_class``: a tokenizer, or a processor with one."""
        if isinstance(processing, cls):
            return processing
        inner = getattr(processing, "tokenizer", None)
        return cls(processing) if inner is None else cls(inner, processing)
