"""Whether a recipe fits into memory: the one place that ``init`` asks.

``judge`` is all that the rest of this room knows of it. It estimates from the sizes of the model,
with what ``memory.predict`` assumes of optimizers and of the head. The run itself plans more
exactly, at its first step, and is refused there if nothing fits: ``memory`` is the same budget.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from ...errors import RecipeError
from ...memory.budget import GB, gigabytes
from ...memory.meter import Meter
from ..model.from_pretrained import meta_model
from ..model.load import load_config, quiet
from ..model.positions import positions
from ..model.precision import device_for_training, dtype_for_training
from ..recipe.recipe import Recipe

_SPARE = 0.9
"""The part of a budget that is planned with."""

_PROCESS = {"cpu": 800 << 20, "cuda": 300 << 20}
"""Bytes of a process before the model is loaded: libraries, and what compilation leaves."""

_PACKED = 0.53
"""Bytes of a weight in NF4 with quantized scales."""

_LORA = 4 + 4 + 8
"""Bytes for each weight of an adapter in fp32: itself, its gradient, and two states of AdamW."""


@dataclass(frozen=True)
class MemoryVerdict:
    """Whether a recipe fits.

    Attributes:
        fits: None: it cannot be said.
        needs: bytes that it needs at least, if that is known.
        note: the same in words.
    """

    fits: bool | None
    needs: int | None
    note: str


class Fits(Protocol):
    """Judges a recipe."""

    def __call__(self, recipe: Recipe, memory: int | None) -> MemoryVerdict:
        """Whether ``recipe`` trains in ``memory`` bytes; None: in what this machine has."""
        ...


@dataclass(frozen=True)
class ModelSizes:
    """What is known of a model without its weights.

    Attributes:
        weights: its parameters.
        linear: those of the linear layers that are quantized: all but the head.
        shapes: (out, in) of these layers.
        hidden: features of a token between blocks.
        widest: the most features inside of a block.
        blocks: how many there are.
        vocabulary: rows of the head.
        positions: how long a text it can read; None: it does not say.
    """

    weights: int
    linear: int
    shapes: tuple[tuple[int, int], ...]
    hidden: int
    widest: int
    blocks: int
    vocabulary: int
    positions: int | None


def sizes_of(recipe: Recipe) -> ModelSizes | None:
    """The sizes of the recipe's model; None where its configuration is not to be had."""
    return _sizes(recipe.base_model)


@functools.lru_cache(maxsize=4)
def _sizes(name: str) -> ModelSizes | None:
    recipe = Recipe(base_model=name)
    with quiet():
        try:
            config = load_config(recipe)
        except RecipeError:  # it is on the hub, which cannot be reached
            return None
        model = meta_model(recipe, config)
    decoder: Any = config.get_text_config(decoder=True)
    head: Any = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    shapes = tuple((m.out_features, m.in_features) for m in layers)
    weights = {id(p): p.numel() for p in model.parameters()}  # tied ones once
    return ModelSizes(
        weights=sum(weights.values()),
        linear=sum(out * into for out, into in shapes),
        shapes=shapes,
        hidden=int(decoder.hidden_size),
        widest=max((out for out, _ in shapes), default=int(decoder.hidden_size)),
        blocks=int(decoder.num_hidden_layers),
        vocabulary=int(decoder.vocab_size),
        positions=positions(config),
    )


def judge(recipe: Recipe, memory: int | None) -> MemoryVerdict:
    """Whether a recipe fits, estimated from the sizes of its model."""
    device = device_for_training()
    budget = memory if memory is not None else Meter(device).capacity()
    sizes = sizes_of(recipe)
    if sizes is None or budget is None:
        what = "the model's configuration" if sizes is None else "the memory of this machine"
        return MemoryVerdict(None, None, f"not checked: {what} is not known here")
    needs = _PROCESS[device.type] + _of_weights(sizes, recipe) + _of_step(sizes, recipe)
    said = f"about {gigabytes(needs)} of {gigabytes(budget)}, by an estimate"
    return MemoryVerdict(needs <= _SPARE * budget, needs, said)


def _of_weights(sizes: ModelSizes, recipe: Recipe) -> int:
    """Bytes of the weights, and of all that training keeps for each that is trained."""
    each = dtype_for_training(recipe.precision(), recipe.adapter is not None).itemsize
    if recipe.adapter is None:
        return sizes.weights * each * 4
    rank = recipe.lora_r
    adapter = sum(rank * (out + into) for out, into in sizes.shapes) * _LORA
    if recipe.load_in_4bit:
        return int((sizes.weights - sizes.linear) * each + sizes.linear * _PACKED) + adapter
    return sizes.weights * each + adapter


def _of_step(sizes: ModelSizes, recipe: Recipe) -> int:
    """Bytes of a step that keeps only the inputs of blocks: the least that ``memory`` can plan."""
    each = dtype_for_training(recipe.precision(), recipe.adapter is not None).itemsize
    tokens = recipe.micro_batch_size * recipe.sequence_len
    kept = sizes.blocks * sizes.hidden
    block = 12 * sizes.hidden + 5 * sizes.widest
    head = 12 * sizes.hidden + min(tokens, 1024) * sizes.vocabulary * 8 // tokens
    packed = sizes.widest * sizes.hidden * each if recipe.load_in_4bit else 0
    return tokens * ((kept + block) * each + head) + packed


def smallest(budget: int | None) -> str:
    """A budget in words, for a message."""
    return "the memory of this machine" if budget is None else f"{budget / GB:g} GB"
