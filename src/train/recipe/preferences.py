"""The settings of training on preferences, from several keys in one record for the trainers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ...errors import RecipeError
from .keys.preferences import TrlKeys
from .methods_table import HEADS, LANGUAGE_HEAD, METHODS, ROWS, Head, Method, RowKind
from .recipe import Recipe

__all__ = [
    "HEADS", "LANGUAGE_HEAD", "ROWS", "GenerationSizes", "Head", "Method", "PreferenceSettings",
    "RowKind", "generation_sizes", "head_of", "method_of", "preference_settings", "rows_of",
]  # fmt: skip


@dataclass(frozen=True)
class PreferenceSettings:
    """How a recipe trains on preferences or rewards.

    Attributes:
        reference: it compares the model with a reference model: with an adapter, the same model
            without it.
        num_labels: outputs of a reward model; 0 for others, which keep their language head.
        reward_functions: the names of the rewards of completions.
        arguments: what the recipe says of the method, by the names in the configuration of TRL's
            trainer. What the recipe does not say is not there, so that TRL's default holds.
        no_images: why rows may have no images, and what to do; empty: they may.
    """

    method: Method
    rows: RowKind
    reference: bool = False
    num_labels: int = 0
    reward_functions: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    no_images: str = ""

    @property
    def sequences(self) -> int:
        """Sequences that a row puts into a training step."""
        return 2 if self.rows == "pairs" else 1

    @property
    def generates(self) -> bool:
        """Whether the model generates what it is trained on."""
        return self.rows == "prompts"

    @property
    def extra_forward_passes(self) -> int:
        """Forward passes without gradients, besides that of each trained sequence."""
        other = METHODS[self.method].other_passes
        models = int(self.reference and not self.arguments.get("precompute_ref_log_probs"))
        return models * (1 + other) + other


def method_of(recipe: Recipe) -> Method | None:
    """The method of a recipe; None: supervised training."""
    if recipe.reward_model:
        return "reward"
    if recipe.process_reward_model:
        return "process_reward"
    return None if recipe.rl is None or recipe.rl == "ebft" else recipe.rl


def rows_of(recipe: Recipe) -> RowKind | None:
    """The kind of rows of a recipe; None: those of supervised training."""
    method = method_of(recipe)
    return None if method is None else ROWS[method]


def head_of(recipe: Recipe) -> Head:
    """The head of the model that a checked recipe trains.

    ``num_labels`` alone asks for none, because recipes of supervised training keep it without
    effect; with a ``model_type`` that classifies it does.
    """
    method, labels = method_of(recipe), recipe.num_labels or None
    if method in HEADS:
        return replace(HEADS[method], labels=labels or HEADS[method].labels)
    for head in HEADS.values():
        if method is None and head.belongs_to(recipe.model_type or ""):
            return replace(head, labels=labels, key="model_type")
    return LANGUAGE_HEAD


def preference_settings(recipe: Recipe) -> PreferenceSettings | None:
    """The settings of a checked recipe; None for supervised training."""
    method = method_of(recipe)
    if method is None:
        return None
    trl = recipe.trl or TrlKeys()
    known = METHODS[method]
    arguments, no_images = known.arguments(recipe, trl), known.no_images(recipe)
    return PreferenceSettings(
        method,
        known.rows,
        reference=known.has_reference(recipe, trl),
        num_labels=head_of(recipe).labels or 0,
        reward_functions=tuple(trl.reward_funcs or ()) if known.rows == "prompts" else (),
        arguments={name: value for name, value in arguments.items() if value is not None},
        no_images=f"{known.head.key or f'rl: {method}'} {no_images}" if no_images else "",
    )


_COMPLETIONS = 8
"""The default number of completions of each prompt."""


@dataclass(frozen=True)
class GenerationSizes:
    """How many completions are generated at a time.

    Attributes:
        each: completions of each prompt.
        batch: completions at a time, of all processes together.
        iterations: how often they are trained on.
    """

    each: int
    batch: int
    iterations: int

    @property
    def prompts(self) -> int:
        """Prompts at a time."""
        return self.batch // self.each

    def passes(self, rows: int) -> int:
        """Completions trained in an epoch, of prompts that fill a batch; RecipeError if none do."""
        if rows < self.prompts:
            raise RecipeError(
                f"micro_batch_size: completions of {self.prompts} prompts are generated at a time "
                f"({self.batch} completions, {self.each} of each prompt), and there are only "
                f"{rows} rows; lower micro_batch_size, gradient_accumulation_steps or "
                "trl.generation_batch_size, or add rows"
            )
        return rows // self.prompts * self.batch * self.iterations


def generation_sizes(recipe: Recipe, processes: int) -> GenerationSizes:
    """How many completions a recipe that generates has at a time, in ``processes``.

    Raises:
        RecipeError: they are no whole groups of completions of one prompt.
    """
    trl = recipe.trl or TrlKeys()
    each = trl.num_generations or _COMPLETIONS
    micro, passes = recipe.micro_batch_size, recipe.accumulation()
    requested = trl.generation_batch_size
    batch = requested or micro * passes * processes
    if batch % (micro * processes):
        raise RecipeError(
            f"trl.generation_batch_size: must be a multiple of micro_batch_size ({micro}) times "
            f"the processes ({processes}), and {batch} is not"
        )
    if batch % each:
        note = "" if trl.num_generations else ", its default"
        product = (
            "trl.generation_batch_size"
            if requested
            else f"micro_batch_size ({micro}) x gradient_accumulation_steps ({passes}) x "
            f"processes ({processes})"
        )
        raise RecipeError(
            f"trl.num_generations: {batch} completions are generated at a time, which is {product}"
            f", and that must be a multiple of trl.num_generations ({each}{note}); change one of "
            "them"
        )
    return GenerationSizes(each, batch, trl.num_iterations or 1)
