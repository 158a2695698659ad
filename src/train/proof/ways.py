"""The ways in which the same samples are trained, and their batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...errors import RecipeError
from ..data import IGNORED, Sample, pack
from ..data.ranks import filler
from ..recipe.recipe import Recipe

FILLER = -1
"""In a layout, a sequence that trains nothing and only fills a batch."""

Step = Sequence[Sequence[int]]
"""The sequences of an optimizer step, each as the numbers of its samples."""


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of each step become batches.

    Attributes:
        rows: sequences in a batch.
        passes: batches of a step, in each process.
        processes: how many processes share a step.
        sequences: the numbers of each sequence's samples, batch by batch; ``FILLER`` alone in one.
    """

    packing: bool
    rows: int
    passes: int
    processes: int
    sequences: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, steps: Iterable[Step], packing: bool, rows: int, processes: int = 1) -> BatchLayout:
        """Lay out steps in batches of ``rows``, all steps with the same number of batches."""
        sequences = [[tuple(sequence) for sequence in step] for step in steps]
        each = rows * processes
        passes = max(-(-len(step) // each) for step in sequences)
        filled = [[*step, *[(FILLER,)] * (passes * each - len(step))] for step in sequences]
        return cls(packing, rows, passes, processes, tuple(s for step in filled for s in step))

    def text(self) -> str:
        """Rows of a batch, and batches of a step, e.g. ``2 x 1 packs``."""
        return f"{self.rows} x {self.passes * self.processes} {_ROWS[self.packing]}"


_ROWS = {True: "packs", False: "rows"}


@dataclass(frozen=True)
class Way:
    """One run of the comparison.

    Attributes:
        name: short and unique.
        layout: of its batches; None: it is not run.
        exact: whether it computes in a higher precision than the recipe's.
        skipped: why it is not run; empty: it is.
        optional: whether a refusal of its settings is a reason to leave it out.
        merges: whether its adapter is merged afterwards, and compared.
        fixed_weights: whether no step changes the weights, so that all gradients are compared.
    """

    name: str
    optimize: bool
    layout: BatchLayout | None = None
    exact: bool = False
    skipped: str = ""
    optional: bool = False
    merges: bool = False
    fixed_weights: bool = False


@dataclass(frozen=True)
class Selection:
    """The samples that every way trains, and in which step.

    Attributes:
        samples: all of them, and last the one that only fills batches.
        steps: the sequences of each step, as the recipe makes them.
    """

    samples: list[Sample]
    steps: list[Step]

    @property
    def tokens(self) -> int:
        """Tokens of all steps, without padding."""
        return sum(self.tokens_of(step) for step in range(len(self.steps)))

    def tokens_of(self, step: int) -> int:
        """Tokens of one step, counted from 0."""
        sequences = self.steps[step]
        return sum(len(self.samples[i].input_ids) for sequence in sequences for i in sequence)

    @property
    def trained(self) -> int:
        """Tokens of all steps that have a label."""
        return sum(map(self.trained_in, range(len(self.steps))))

    def trained_in(self, step: int) -> int:
        """Tokens of one step, counted from 0, that have a label."""
        return sum(self.samples[i].trained for sequence in self.steps[step] for i in sequence)


def select(sequences: Iterable[Sequence[Sample]], steps: int, size: int) -> Selection:
    """Take the first ``steps`` of ``size`` sequences each.

    The sequences are packs or single samples, in the order in which the recipe trains them; they
    are taken again from the first one when they end.
    """
    groups: list[list[Sample]] = []
    for sequence in sequences:
        groups.append(list(sequence))
        if len(groups) == steps * size:
            break
    flat = [sample for sequence in groups for sample in sequence]
    numbers, at = [], 0
    for sequence in groups:
        numbers.append(tuple(range(at, at + len(sequence))))
        at += len(sequence)
    these = [numbers[i % len(numbers)] for i in range(steps * size)]
    return Selection(
        [*flat, *filler(flat[:1])], [these[i : i + size] for i in range(0, len(these), size)]
    )


def sequences_per_step(recipe: Recipe) -> int:
    """Sequences in a compared step: a batch of the recipe, and at least two."""
    return max(2, recipe.micro_batch_size)


def ways_of(
    recipe: Recipe, chosen: Selection, processes: int, gpus: int | None, mixes: bool = False
) -> list[Way]:
    """All ways in which a recipe is compared, including skipped ones.

    The last way has ``processes``. ``gpus`` is None where training is on the CPU. ``mixes`` says
    that the plain model cannot pack: it trains the samples of packs one by one.
    """
    packs, rows = recipe.packs(), recipe.micro_batch_size
    layout = BatchLayout.of(chosen.steps, packs, rows)
    exact = Way("exact", optimize=False, layout=layout, exact=True)
    if packs and mixes:
        exact = unpacked(exact, chosen)
    return [
        exact,
        replace(exact, name="eager", exact=False),
        Way("optimized", optimize=True, layout=layout, merges=recipe.adapter is not None),
        _repacked(recipe, chosen),
        _accumulated(chosen, packs, rows),
        _shared(recipe, chosen, processes, gpus),
    ]


def unpacked(way: Way, chosen: Selection) -> Way:
    """A way that trains the samples of packs one by one."""
    assert way.layout is not None
    return replace(way, layout=BatchLayout.of(_one_by_one(chosen), False, way.layout.rows))


def second_eager(way: Way, chosen: Selection) -> Way:
    """Eager mode with its sums in another order, where no higher precision can be had."""
    assert way.layout is not None
    size = len(chosen.steps[0])
    rows = 1 if way.layout.rows > 1 else size
    packing = way.layout.packing
    layout = BatchLayout.of(chosen.steps if packing else _one_by_one(chosen), packing, rows)
    return replace(way, name="eager again", layout=layout, exact=False)


DRAWS = 16
"""So many steps at least judge a way that failed by the gradients of one."""


def draws_of(chosen: Selection) -> Selection:
    """``DRAWS`` steps or more: those of ``chosen``, and these with their tokens moved on."""
    *samples, last = chosen.samples
    rounds = range(_rounds(chosen))
    moved = [_moved_on(sample, by / len(rounds)) for by in rounds for sample in samples]
    steps: list[Step] = [
        [tuple(i + by * len(samples) for i in sequence) for sequence in step]
        for by in rounds
        for step in chosen.steps
    ]
    return Selection([*moved, last], steps)


def in_draws(way: Way, chosen: Selection) -> Way:
    """``way``, with the batches that it has of the samples, for ``draws_of`` them."""
    assert way.layout is not None
    sequences = tuple(
        tuple(i if i == FILLER else i + by * (len(chosen.samples) - 1) for i in sequence)
        for by in range(_rounds(chosen))
        for sequence in way.layout.sequences
    )
    layout = replace(way.layout, sequences=sequences)
    return replace(way, layout=layout, merges=False, fixed_weights=True)


def _rounds(chosen: Selection) -> int:
    return -(-DRAWS // len(chosen.steps))


def _moved_on(sample: Sample, share: float) -> Sample:
    """The sample with its tokens moved on by ``share`` of its length.

    With images, whose places in the text must be as they were, other tokens of it are trained.
    """
    ids, size = sample.input_ids, len(sample.input_ids)
    trained = [label != IGNORED for label in sample.labels]
    by = round(share * size)
    if not sample.extra:
        ids = [ids[(i - by) % size] for i in range(size)]
    elif by:
        trained[1:] = [trained[1 + (i - by) % (size - 1)] for i in range(size - 1)]
    pairs = zip(ids, trained, strict=True)
    return replace(sample, input_ids=ids, labels=[i if does else IGNORED for i, does in pairs])


def _repacked(recipe: Recipe, chosen: Selection) -> Way:
    """The same samples packed if the recipe does not pack, and one by one if it does."""
    rows = recipe.micro_batch_size
    if recipe.packs():
        name = "unpacked"
        steps: list[Any] = _one_by_one(chosen)
        skip = all(len(sequence) == 1 for step in chosen.steps for sequence in step)
        reason = "each of these packs holds a single sample; a larger --steps has others"
    else:
        name = "packed"
        steps = [_packed(step, chosen.samples, recipe) for step in chosen.steps]
        skip = all(len(new) == len(old) for new, old in zip(steps, chosen.steps, strict=True))
        reason = f"no two samples of a step fit into sequence_len: {recipe.sequence_len}"
    if skip:
        return Way(name, optimize=True, skipped=reason)
    return Way(
        name, optimize=True, layout=BatchLayout.of(steps, name == "packed", rows), optional=True
    )


def _one_by_one(chosen: Selection) -> list[list[tuple[int]]]:
    return [[(i,) for sequence in step for i in sequence] for step in chosen.steps]


def _packed(step: Step, samples: Sequence[Sample], recipe: Recipe) -> list[tuple[int, ...]]:
    numbers = [i for sequence in step for i in sequence]
    lengths = [len(samples[i].input_ids) for i in numbers]
    groups = pack(lengths, recipe.sequence_len, most=recipe.sample_packing_bin_size)
    return [tuple(numbers[i] for i in group) for group in groups]


def _accumulated(chosen: Selection, packing: bool, rows: int) -> Way:
    """Each step in batches of one sequence; or in one batch, where the recipe has such batches."""
    size = len(chosen.steps[0])
    other = 1 if rows > 1 else size
    layout = BatchLayout.of(chosen.steps, packing, other)
    return Way(f"{other} x {size // other}", optimize=True, layout=layout, optional=True)


def _shared(recipe: Recipe, chosen: Selection, processes: int, gpus: int | None) -> Way:
    """Each step shared by several processes, as the recipe shares it."""
    name = f"{processes} processes"
    if (reason := _why_alone(recipe, processes, gpus)) is not None:
        return Way(name, optimize=True, skipped=reason)
    rows = -(-len(chosen.steps[0]) // processes)
    layout = BatchLayout.of(chosen.steps, recipe.packs(), rows, processes)
    return Way(name, optimize=True, layout=layout, optional=True)


def _why_alone(recipe: Recipe, processes: int, gpus: int | None) -> str | None:
    if processes == 1:
        return "--processes 1 asks for one process only"
    if gpus is not None and gpus < processes:
        return f"{processes} processes need as many GPUs, and there {_are(gpus)} here"
    strategy = recipe.strategy()
    try:
        strategy.require_world(processes)
    except RecipeError as error:
        return str(error)
    if strategy.group > 1:
        return (
            "tensor_parallel_size and context_parallel_size: their processes train one batch "
            "together, and only processes with batches of their own are compared"
        )
    if strategy.engine == "deepspeed":
        return (
            "deepspeed: it keeps gradients in buffers of its own, where they cannot be compared; "
            "compare the loss curves of fusewright train with --nproc 1 and --nproc 2"
        )
    return None


def _are(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"
