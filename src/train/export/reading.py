"""What is read back from an export: tensors beside the plain model's, and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..consent import Consent
from ..inference.load_run import load_tokenizer
from ..inference.run_folder import RunFolder, open_run
from ..inference.run_recipe import recipe_for
from ..model.from_pretrained import meta_model
from ..model.load import load_config


@dataclass(frozen=True)
class Compared:
    """A tensor that was written, and what it should be.

    Attributes:
        problem: how it differs from what it should be; None: it is right.
        kind: of the rounding that it has.
        error: its distance from the plain tensor, as a share of that one's norm; None: no distance.
        is_judged: whether more than its shape was compared.
    """

    name: str
    problem: str | None
    kind: str
    error: float | None
    is_judged: bool = True


def compared(
    name: str, plain: Tensor, rounded: Mapping[str, Tensor | None], read: Tensor | None,
    allowed: float | None = None,
) -> Compared:  # fmt: skip
    """Compare ``read`` with ``plain`` in each rounding that it may have, bit for bit.

    A rounding that no library here writes is None: then any tensor is right whose distance from
    ``plain`` is at most ``allowed``; if that is None, too, only the shape is compared.
    """
    if read is None:
        return Compared(name, "it is missing", "", None)
    if read.shape != plain.shape:
        sizes = [" x ".join(map(str, t.shape)) for t in (read, plain)]
        return Compared(name, f"it is {sizes[0]}, and should be {sizes[1]}", "", None)
    if problem := not_finite(read, plain):
        return Compared(name, problem, "", None)
    error = _distance(read, plain)
    for kind, value in rounded.items():
        if value is not None and torch.equal(value.float(), read.float()):
            return Compared(name, None, kind, error)
    unknown = [kind for kind, value in rounded.items() if value is None]
    if unknown and (allowed is None or error <= allowed):
        return Compared(name, None, unknown[0], error, allowed is not None)
    nearest = min((_distance(read, v) for v in rounded.values() if v is not None), default=error)
    problem = f"it differs from what it should be by {nearest:.2%} of its norm"
    if read.ndim == 2 and read.shape[0] == read.shape[1] and _distance(read.T, plain) < error / 2:
        problem += "; it is transposed"
    return Compared(name, problem, "", error)


def not_finite(read: Tensor, plain: Tensor) -> str:
    """How many numbers are inf or nan that should not be, as a clause; empty if there is none."""
    wrong = int((~torch.isfinite(read) & torch.isfinite(plain)).sum())
    return f"{wrong:,} of {read.numel():,} numbers are inf or nan" if wrong else ""


def _distance(one: Tensor, other: Tensor) -> float:
    other = other.float()
    size = float(other.norm())
    return float((one.float() - other).norm()) / size if size else float(one.float().norm())


def meta_model_of(run: RunFolder) -> Any:
    """The model of a folder on the meta device."""
    recipe = recipe_for(run)
    return meta_model(recipe, load_config(recipe))


@dataclass(frozen=True)
class TokenizerRead:
    """What an export says about texts.

    Attributes:
        encode: from a text to its tokens, without a beginning or an end.
        template: the chat template.
        end: the token that ends texts.
    """

    encode: Callable[[str], list[int]]
    template: str | None
    end: int | None


def folder_tokenizer(folder: Path, consent: Consent) -> TokenizerRead:
    """The tokenizer of a folder that transformers reads."""
    tokenizer = load_tokenizer(replace(open_run(folder, consent=consent), tokenizer=folder))

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    return TokenizerRead(encode, tokenizer.chat_template, tokenizer.eos_token_id)
