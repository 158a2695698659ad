"""The sequences that prepared samples are trained in, and batches of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import DataError
from ..data import IGNORED, Packs, Samples, collate, count, pack
from ..data.images.features import Featurizer
from ..processes.context_parallel import divisible
from ..processes.world import World
from ..recipe.recipe import Recipe
from ..report.throughput import mean_context
from .evaluation import Batches


def training_sequences(prepared: Any, recipe: Recipe) -> Any:
    """The sequences to train on: packs of the samples, or the stream of packs as it is."""
    if recipe.streams():
        return prepared.train
    return _sequences(prepared.train, recipe, recipe.packs(), recipe.sequence_len)


def validation_batches(
    prepared: Any,
    recipe: Recipe,
    pad_id: int,
    world: World | None = None,
    featurizer: Featurizer | None = None,
) -> dict[str, Batches]:
    """The batches to validate on, by dataset; with several processes, the share of this one."""
    length = recipe.eval_sequence_len or recipe.sequence_len
    packing = recipe.packs_validation()
    size = recipe.eval_batch_size or recipe.micro_batch_size

    def make(packs: list[Any]) -> dict[str, Any]:
        batch = _collated(packs, pad_id, recipe, packing, length, featurizer=featurizer)
        return _with_second_row(batch, size) if recipe.optimize else batch

    return {
        name: Batches(_sequences(samples, recipe, packing, length), size, make, world)
        for name, samples in prepared.validation.items()
    }


def training_batch(
    packs: Sequence[Any], recipe: Recipe, pad_id: int, featurizer: Featurizer | None = None
) -> dict[str, Any]:
    """A batch of sequences, with its counts ``tokens`` and ``trained``.

    ``blank`` is in one whose only image is blank.

    A step with a form of its own would wait for the compiler. So a single sequence gets a copy with
    nothing to train, as graphs are compiled for any number of rows but one; and without packing a
    batch of equal lengths is padded, too, as transformers passes on no mask that hides nothing.
    """
    tokens, trained = count(packs)
    tokens = tokens if trained else 0  # of a sequence that only fills the batch of a process
    full = bool(recipe.pad_to_sequence_len)
    batch = _collated(packs, pad_id, recipe, recipe.packs(), recipe.sequence_len, full, featurizer)
    if recipe.optimize:
        batch = _with_second_row(batch, recipe.micro_batch_size)
    if (shared := recipe.strategy().context) > 1:
        batch = divisible(batch, shared, pad_id)
    blank = {"blank": True} if featurizer is not None and featurizer.lacks(packs) else {}
    return {**batch, "tokens": tokens, "trained": trained, **blank}


def _collated(
    packs: Sequence[Any],
    pad_id: int,
    recipe: Recipe,
    packing: bool,
    length: int,
    full: bool = False,
    featurizer: Featurizer | None = None,
) -> dict[str, Any]:
    """A batch with the features of the images in it."""
    hides = recipe.optimize and not packing
    if featurizer is None:
        return collate(packs, pad_id, packing, length, full, hides)
    packs = featurizer.completed(packs)
    batch = collate(packs, pad_id, packing, length, full, hides)
    return {**batch, **featurizer.features(packs, batch)}


def _with_second_row(batch: dict[str, Any], usual: int) -> dict[str, Any]:
    """The batch; a single row of it gets a copy without labels, where batches have more."""
    import torch

    if len(batch["input_ids"]) != 1 or usual == 1:
        return batch
    # where positions have several axes, rows are the second dimension
    twice = {
        k: torch.cat([v, v], dim=int(k == "position_ids" and v.ndim == 3)) for k, v in batch.items()
    }
    twice["labels"][1] = IGNORED
    return twice


@contextlib.contextmanager
def errors_as_raised() -> Iterator[None]:
    """Raise a DataError of a loader's worker as it was there: torch puts the traceback before."""
    try:
        yield
    except DataError as error:
        _, traceback, message = str(error).rpartition(f"\n{DataError.__module__}.DataError: ")
        if not traceback:
            raise
        raise DataError(message.strip()) from None


def typical_context(prepared: Any, recipe: Recipe) -> float:
    """Mean sample length per token; for a stream, the longest sample allowed."""
    if recipe.streams():
        return float(recipe.sequence_len)
    return mean_context(prepared.train.lengths)


def _sequences(samples: Samples, recipe: Recipe, packing: bool, length: int) -> Packs:
    if not packing:
        groups = [[i] for i in range(len(samples))]
    elif recipe.sample_packing_sequentially or recipe.curriculum_sampling:
        groups = _in_order(samples.lengths.tolist(), length, recipe.sample_packing_bin_size)
    else:
        groups = pack(
            samples.lengths, length,
            most=recipe.sample_packing_bin_size, window=recipe.sample_packing_group_size,
        )  # fmt: skip
    return Packs(samples, groups)


def _in_order(lengths: Sequence[int], limit: int, most: int) -> list[list[int]]:
    """Fill sequences of ``limit`` tokens with samples as they come."""
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(lengths):
        if size > room or len(groups[-1]) == most:
            groups.append([])
            room = limit
        groups[-1].append(index)
        room -= size
    return groups
