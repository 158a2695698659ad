"""The formats of an export: the records that lists, commands and keys are derived from."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from ...errors import RecipeError, did_you_mean

Writer = Literal["merged", "gguf", "compressed-tensors"]


@dataclass(frozen=True)
class Format:
    """A way to store weights; ``model/rounding.py`` says what becomes of them.

    Attributes:
        writer: who writes it: the value of ``--format``.
        about: what it is, for a list of formats.
        scheme: the preset of ``compressed-tensors`` that it is.
        group: values of a row that share a scale, where that is not the preset's.
        type: the type of ``gguf`` in which matrices are stored; empty: llama.cpp mixes several.
    """

    name: str
    writer: Writer
    about: str
    scheme: str = ""
    group: int | None = None
    type: str = ""

    @property
    def with_ends(self) -> bool:
        """Whether embeddings and the head are stored in few bits, too."""
        return self.writer == "gguf"

    @property
    def rounds(self) -> bool:
        """Whether it stores weights in few bits, in one way that training can follow."""
        return self.writer == "compressed-tensors" or self.type == "Q8_0"


_GGUF = functools.partial(Format, writer="gguf")
_CT = functools.partial(Format, writer="compressed-tensors")

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("float32", "merged", "the merged model in 32 bits"),
        Format("bfloat16", "merged", "the merged model in bfloat16"),
        Format("float16", "merged", "the merged model in float16"),
        _GGUF("f32", about="32 bits", type="F32"),
        _GGUF("f16", about="float16", type="F16"),
        _GGUF("bf16", about="bfloat16", type="BF16"),
        _GGUF("q8_0", about="8 bits, blocks of 32", type="Q8_0"),
        *(
            _GGUF(name, about=f"{name[1]} bits, mixed by llama.cpp")
            for name in ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m",
                         "q3_k_s", "q2_k")
        ),
        _CT("fp8", about="FP8, a scale for each row; activations in FP8", scheme="FP8_DYNAMIC"),
        _CT("fp8-block", about="FP8, blocks of 128 x 128; activations in FP8", scheme="FP8_BLOCK"),
        _CT("int8", about="INT8, groups of 128", scheme="W8A16"),
        _CT("int4", about="INT4, groups of 128", scheme="W4A16"),
        _CT("int4-g64", about="INT4, groups of 64", scheme="W4A16", group=64),
        _CT("int4-g32", about="INT4, groups of 32", scheme="W4A16", group=32),
        _CT("nvfp4", about="FP4, groups of 16 with scales in FP8", scheme="NVFP4A16"),
        _CT("mxfp4", about="FP4, groups of 32 with powers of two as scales", scheme="MXFP4A16"),
        _CT("mxfp8", about="FP8, groups of 32 with powers of two as scales", scheme="MXFP8A16"),
    )
}  # fmt: skip
"""All formats by name. Those of engines that read GGUF, such as Ollama, are the writer ``gguf``."""


def format_named(name: str, writer: str | None = None) -> Format:
    """The format ``name``, of a writer if one is given; raises a RecipeError if there is none."""
    names = [f.name for f in FORMATS.values() if writer in (None, f.writer)]
    if name.lower() not in names:
        of = f" of {writer}" if writer else ""
        raise RecipeError(
            f"{name}: no such format{of}{did_you_mean(name, names)}; there are {', '.join(names)}"
        )
    return FORMATS[name.lower()]
