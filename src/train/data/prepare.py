"""From a recipe to prepared rows: found, read, tokenized, masked, cut, stored, split."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...errors import DataError, RecipeError
from ..recipe.preferences import rows_of
from ..recipe.recipe import Dataset, Recipe
from .cache import ArrowWriter, Cache, Lease, Samples
from .chat.date import today
from .fingerprint import fingerprint_of, with_content
from .formats.teacher import encoder_of
from .preferences.encoder import PreferenceEncoder
from .progress import Progress
from .readers import sources
from .readers.duplicates import Duplicates
from .readers.limits import Limits, nothing_left
from .readers.sources import DataSource
from .split import order
from .workers import RowEncoder, Work, parts

if TYPE_CHECKING:
    from rich.console import Console

    from .stream import StreamedPacks

DEFAULT_CACHE = "last_run_prepared"
"""Where rows are kept when the recipe does not say, if this folder is there: `preprocess` makes it.
Without it they are kept only as long as this process runs."""


@dataclass(frozen=True)
class PreparedData:
    """What a run trains and validates on.

    Attributes:
        train: the samples, in the order of the recipe, or a stream of packs.
        validation: samples by name: ``validation`` for ``val_set_size``, ``test_1`` and so on for
            ``test_datasets``.
        counts: ``rows`` that were read, ``too_long`` (also those that were ``truncated``),
            ``too_short``, ``nothing_to_train``, ``duplicates``; and ``_samples``, ``_tokens`` and
            ``_trained_tokens`` of ``train`` and of ``validation`` (all of it).
        fingerprint: a hash of everything that the samples depend on.
        first: file and line of the first row of some of the counts.
    """

    train: Samples | StreamedPacks
    validation: dict[str, Samples] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    first: dict[str, str] = field(default_factory=dict)


def prepare(
    recipe: Recipe,
    tokenizer: Any,
    console: Console | None = None,
    keep: bool = False,
    limit: int | None = None,
    day: str | None = None,
    shared: bool = False,
) -> PreparedData:
    """Prepare the rows of a recipe, or take them from the cache.

    What a function of the recipe makes of rows depends on more than can be hashed: such rows are
    prepared by each run.

    Args:
        recipe: checked, with absolute paths.
        tokenizer: a fast tokenizer, set up as the recipe says.
        console: where to show progress, if it is a terminal; None: nowhere.
        keep: store the rows for later runs even if the recipe names no folder for that.
        limit: take only so many rows of each dataset; None: all.
        day: the date that chat templates write where they ask for it; None: today's.
        shared: ``dataset_prepared_path`` is of this run alone, so that all rows may be taken.

    Raises:
        RecipeError: a dataset cannot be read as the recipe says, or the tokenizer lacks something.
        DataError: a file or row is not right, or no row is left; the message has file and line.
    """
    streams = recipe.streams() and limit is None
    keys = ("test_datasets",) if streams else ("datasets", "test_datasets")
    found = {
        key: [
            sources.find(d, f"{key}.{i}", limit, allow_builders=recipe.consent.allow_builders)
            for i, d in enumerate(getattr(recipe, key))
        ]
        for key in keys
    }
    day = day or today()
    work = {
        key: [_work(s.dataset, recipe, tokenizer, key, day) for s in f] for key, f in found.items()
    }
    own = any(one.encoder.settings.get("function") for w in work.values() for one in w)
    root = _root(recipe, keep, fresh=own and not shared)
    ready = _load(recipe, tokenizer, found, work, console, root) if any(found.values()) else None
    if own and ready is not None:
        assert isinstance(ready.train, Samples)
        content = with_content(ready.fingerprint, ready.train.path.parent.parent)
        ready = replace(ready, fingerprint=content)
    if not streams:
        assert ready is not None  # a recipe has datasets, or it streams
        return ready
    from .stream import stream

    train = stream(recipe, lambda dataset: _work(dataset, recipe, tokenizer, "datasets", day))
    if ready is None:
        return PreparedData(train)
    return replace(ready, train=train)


def require_encoders(recipe: Recipe, tokenizer: Any) -> None:
    """See that the tokenizer and its chat template suit each dataset, without reading a row.

    Raises:
        RecipeError: they do not.
    """
    trained = recipe.pretraining_dataset or recipe.datasets
    for key, datasets in (("datasets", trained), ("test_datasets", recipe.test_datasets)):
        for dataset in datasets:
            _work(dataset, recipe, tokenizer, key, today())


def _load(
    recipe: Recipe,
    tokenizer: Any,
    found: dict[str, list[DataSource]],
    work: dict[str, list[Work]],
    console: Console | None,
    place: tuple[Path, bool],
) -> PreparedData:
    """Take the rows from the cache, after putting them there if need be."""
    every = [pair for key in found for pair in _pairs(found, work, key)]
    fingerprint = fingerprint_of(recipe, tokenizer, every)
    root, temporary = place
    try:
        cache = Cache(root, fingerprint)
        about = cache.load()
        if about is None:
            about = _store(cache, recipe, found, work, console)
    except BaseException as error:
        if temporary:
            shutil.rmtree(root, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise RecipeError(
                f"dataset_prepared_path: the rows cannot be cached in {root}: {reason}"
            ) from error
        raise
    lease = Lease(root) if temporary else None
    return _split(cache.folder, about, recipe, fingerprint, lease)


def _work(dataset: Dataset, recipe: Recipe, tokenizer: Any, key: str, day: str) -> Work:
    longest = recipe.sequence_len
    if key == "test_datasets":
        longest = recipe.eval_sequence_len or longest
    encoder: RowEncoder
    rows = rows_of(recipe)
    if rows is None:
        encoder = encoder_of(dataset, recipe, tokenizer, longest, day)
    else:
        encoder = PreferenceEncoder(dataset, recipe, tokenizer, day)
    shortest = recipe.min_sample_len or (1 if rows == "prompts" else 2)
    limits = Limits(longest, shortest, recipe.excess_length_strategy, encoder.watched)
    return Work(encoder, limits)


def _root(recipe: Recipe, keep: bool, fresh: bool) -> tuple[Path, bool]:
    """The folder of caches, and whether it goes with this process; ``fresh``: an empty one."""
    named = recipe.dataset_prepared_path or (
        DEFAULT_CACHE if keep or Path(DEFAULT_CACHE).is_dir() else None
    )
    if named and not fresh:
        return Path(named).expanduser().resolve(), False
    return Path(tempfile.mkdtemp(prefix="fusewright-data-")), True


# --- the cache -----------------------------------------------------------------------------------


def _store(
    cache: Cache,
    recipe: Recipe,
    found: dict[str, list[DataSource]],
    work: dict[str, list[Work]],
    console: Console | None,
) -> dict[str, Any]:
    """Prepare everything and put it into the cache."""
    made = cache.begin()
    try:
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        sizes: list[int] = []
        files, extra = ["train.arrow"], recipe.kd_trainer or rows_of(recipe) == "prompts"
        with Progress(console) as progress:
            duplicates = Duplicates() if recipe.dataset_exact_deduplication else None
            with ArrowWriter(made / "train.arrow", extra) as writer:
                for source, one in _pairs(found, work, "datasets"):
                    before = writer.count
                    own = _write(source, one, writer, recipe, progress, duplicates)
                    counts, first = counts + own.counts, {**own.first, **first}
                    sizes.append(writer.count - before)
            for i, (source, one) in enumerate(_pairs(found, work, "test_datasets"), start=1):
                files.append(f"test_{i}.arrow")
                with ArrowWriter(made / files[-1], extra) as writer:
                    _write(source, one, writer, recipe, progress, None)
        if sizes:
            order(sizes, recipe)  # rows that cannot be split are not worth keeping
        about = {"counts": dict(counts), "first": first, "sizes": sizes}
        cache.finish(made, files, about)
        return {**about, "files": dict.fromkeys(files)}
    except BaseException:
        cache.abandon(made)
        raise


def _pairs(
    found: dict[str, list[DataSource]], work: dict[str, list[Work]], key: str
) -> list[tuple[DataSource, Work]]:
    return list(zip(found.get(key, ()), work.get(key, ()), strict=True))


class PreparedRows(NamedTuple):
    """How many rows of a dataset there were of each kind, and where the first of some kinds is."""

    counts: Counter[str]
    first: dict[str, str]


def _write(
    source: DataSource,
    work: Work,
    writer: ArrowWriter,
    recipe: Recipe,
    progress: Progress,
    duplicates: Duplicates | None,
) -> PreparedRows:
    """Prepare one dataset.

    Raises:
        DataError: it is empty, nothing of it is left, or no end of a turn is ever trained.
    """
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    ends: set[int] = set()
    trained: set[int] = set()
    before = writer.count
    path = source.dataset.path
    rows = source.rows(progress.dataset(path))
    for part in parts(work, rows, recipe.dataset_processes or 1):
        counts, first = counts + part.counts, {**part.first, **first}
        ends |= part.ends
        trained |= part.trained
        if duplicates is not None:
            part = duplicates.without(part)
            counts["duplicates"] += part.counts["duplicates"]
        writer.add(part.ids, part.labels, part.lengths, part.extra)
    if not counts["rows"]:
        raise DataError(f"{path}: the dataset is empty")
    if writer.count == before and not counts["duplicates"]:
        raise DataError(f"{path}: {nothing_left(counts, work.limits)}")
    work.encoder.check_ends(path, ends, trained)
    return PreparedRows(counts, first)


# --- what the run gets ---------------------------------------------------------------------------


def _split(
    folder: Path, about: dict[str, Any], recipe: Recipe, fingerprint: str, lease: Lease | None
) -> PreparedData:
    samples = Samples(folder / "train.arrow", lease=lease)
    rows, held = samples.rows, samples.rows[:0]
    if about["sizes"]:
        rows, held = order(about["sizes"], recipe)
    counts: Counter[str] = Counter(about["counts"])
    train, validation = samples.select(rows), {}
    if len(held):
        part = samples.select(held)
        limit = recipe.eval_sequence_len
        if limit is not None and (part.lengths > limit).any():
            short = np.flatnonzero(part.lengths <= limit)
            counts["validation_too_long"] = len(part) - len(short)
            part = part.select(short)
            if not len(part):
                raise DataError(
                    f"eval_sequence_len: all {len(held)} rows that were held out are longer than "
                    f"{limit} tokens"
                )
        validation["validation"] = part
    for name in about["files"]:
        if name != "train.arrow":
            validation[Path(name).stem] = Samples(folder / name, lease=lease)
    for key in ("rows", "too_long", "truncated", "too_short", "nothing_to_train"):
        counts[key] += 0
    for name, several in (("train", [train]), ("validation", list(validation.values()))):
        counts[f"{name}_samples"] = sum(map(len, several))
        counts[f"{name}_tokens"] = sum(int(s.lengths.sum(dtype=np.int64)) for s in several)
        counts[f"{name}_trained_tokens"] = sum(int(s.trained.sum(dtype=np.int64)) for s in several)
    return PreparedData(train, validation, dict(counts), fingerprint, about.get("first", {}))
