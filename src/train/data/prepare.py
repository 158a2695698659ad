"""From a recipe to prepared rows: find, read, tokenize, mask, truncate, store and split them."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...errors import DataError, RecipeError, first_line
from ..processes.world import World
from ..processing import Processing
from ..recipe.keys.row_types import is_function_type
from ..recipe.preferences import rows_of
from ..recipe.recipe import Dataset, Recipe
from ..terminal import say
from .cache import FORMAT, ArrowWriter, Cache, Lease, Samples
from .chat.date import today
from .formats.registry import Encoder
from .formats.teacher import encoder_of
from .images import unchanged
from .images.features import identity
from .images.picture import NoImages
from .images.reading import ImageReader, reader_of, sample_picture
from .packing import Pack, pack
from .preferences.encoder import PreferenceEncoder
from .readers import sources
from .readers.bad_rows import BadRows, BadRowsError, raise_any
from .readers.files import Row
from .readers.limits import Limits, Part, blank_tokens, nothing_left
from .readers.sources import DataSource
from .sample import Sample
from .workers import Work, batches, parts

if TYPE_CHECKING:
    from rich.console import Console


T = TypeVar("T")
Array = np.ndarray[Any, Any]

DEFAULT_CACHE = "last_run_prepared"
"""The folder of prepared rows where the recipe names none, if it exists: `preprocess` makes it.
Without it they are kept only as long as this process runs.
"""


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

    def has_extra(self) -> bool:
        """Whether samples have other data than tokens."""
        return any(s.has_extra() for s in (self.train, *self.validation.values()))


def prepare(
    recipe: Recipe,
    processing: Any,
    console: Console | None = None,
    keep: bool = False,
    limit: int | None = None,
    day: str | None = None,
    shared: bool = False,
) -> PreparedData:
    """Prepare the rows of a recipe, or take them from the cache.

    Rows that a function of the recipe makes depend on more than can be hashed: each run prepares
    them.

    Args:
        recipe: checked, with absolute paths.
        processing: a fast tokenizer, set up as the recipe says; or a processor with one, for rows
            with images.
        console: where to show progress, if it is a terminal; None: nowhere.
        keep: store the rows for later runs even if the recipe names no folder for that.
        limit: take only so many rows of each dataset; None: all.
        day: the date for chat templates that ask for it; None: today's.
        shared: ``dataset_prepared_path`` belongs to this run alone, so that all rows may be taken.

    Raises:
        RecipeError: a dataset cannot be read as the recipe says, or the tokenizer lacks something.
        DataError: a file or row is not right, or no row is left; the message has file and line.
    """
    streams = recipe.streams() and limit is None
    keys = ("test_datasets",) if streams else ("datasets", "test_datasets")
    inputs = {
        key: [
            sources.find(d, f"{key}.{i}", limit, allow_builders=recipe.consent.allow_builders)
            for i, d in enumerate(getattr(recipe, key))
        ]
        for key in keys
    }
    for line in filter(None, (source.left_out() for each in inputs.values() for source in each)):
        if console is not None:
            say(console, line)
    day = day or today()
    tokenizer = Processing.of(processing).tokenizer
    has_function = _has_function(recipe)
    root, temporary = _root(recipe, keep, fresh=has_function and not shared)
    lease = Lease(root) if temporary else None
    make = functools.partial(
        _work, recipe=recipe, processing=processing, day=day, copies=root / _IMAGES
    )
    work = {key: [make(s.dataset, key=key) for s in f] for key, f in inputs.items()}
    ready = None
    if any(inputs.values()):
        ready = _load(recipe, tokenizer, inputs, work, console, root, lease)
        assert isinstance(ready.train, Samples)
        content = unchanged.with_images(ready.fingerprint, ready.train.path.parent)
        if has_function:
            content = with_content(ready.fingerprint, root)
        ready = replace(ready, fingerprint=content)
    if not streams:
        assert ready is not None  # a recipe has datasets, or it streams
        return ready

    train = stream(recipe, functools.partial(make, key="datasets"), lease)
    if ready is None:
        return PreparedData(train)
    return replace(ready, train=train)


def require_encoders(recipe: Recipe, processing: Any) -> None:
    """Raise an error unless tokenizer, chat template and sample image suit; reads no row."""
    trained = recipe.pretraining_dataset or recipe.datasets
    for key, datasets in (("datasets", trained), ("test_datasets", recipe.test_datasets)):
        for dataset in datasets:
            _work(dataset, key, recipe, processing, today(), Path(_IMAGES))
    sample_picture(recipe, Processing.of(processing))


def _load(
    recipe: Recipe,
    tokenizer: Any,
    sources: dict[str, list[DataSource]],
    work: dict[str, list[Work]],
    console: Console | None,
    root: Path,
    lease: Lease | None,
) -> PreparedData:
    every = [pair for key in sources for pair in _pairs(sources, work, key)]
    fingerprint = fingerprint_of(recipe, tokenizer, every)
    try:
        cache = Cache(root, fingerprint)
        about = cache.load()
        if about is None or not unchanged.unchanged(cache.folder):
            about = _store(cache, recipe, sources, work, console)
    except BaseException as error:
        if lease is not None:
            shutil.rmtree(root, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise RecipeError(
                f"dataset_prepared_path: the rows cannot be cached in {root}: {reason}"
            ) from error
        raise
    return _split(cache.folder, about, recipe, fingerprint, lease)


_IMAGES = "images"
"""The folder of copies of images that rows hold, beside the prepared rows."""


def _has_function(recipe: Recipe) -> bool:
    """Whether functions of the recipe make rows."""
    rows = rows_of(recipe)
    each = (*recipe.datasets, *recipe.test_datasets)
    types = [dataset.type for dataset in each if isinstance(dataset.type, str)]
    return rows is not None and any(is_function_type(name, rows) for name in types)


def _work(
    dataset: Dataset, key: str, recipe: Recipe, processing: Any, day: str, copies: Path
) -> Work:
    processing = Processing.of(processing)
    tokenizer = processing.tokenizer
    longest = recipe.sequence_len
    if key == "test_datasets":
        longest = recipe.eval_sequence_len or longest
    images = reader_of(recipe, dataset, processing, copies)
    encoder = encoder_for(dataset, recipe, tokenizer, longest, day, images)
    shortest = recipe.min_sample_len or (1 if rows_of(recipe) == "prompts" else 2)
    # of preferences, empty answers are known by their text
    blank = blank_tokens(tokenizer) if rows_of(recipe) is None else frozenset[int]()
    limits = Limits(longest, shortest, recipe.excess_length_strategy, encoder.watched, blank)
    return Work(encoder, limits)


def encoder_for(
    dataset: Dataset, recipe: Recipe, tokenizer: Any, longest: int, day: str,
    images: ImageReader | NoImages,
) -> Encoder | PreferenceEncoder:  # fmt: skip
    """What makes tokens of a dataset's rows; ``longest`` is the length of a sample, in tokens."""
    if rows_of(recipe) is None:
        return encoder_of(dataset, recipe, tokenizer, longest, day, images)
    return PreferenceEncoder(dataset, recipe, tokenizer, day, images)


def _root(recipe: Recipe, keep: bool, fresh: bool) -> tuple[Path, bool]:
    """The folder of caches, and whether it is temporary; ``fresh``: an empty one."""
    path = recipe.dataset_prepared_path or (
        DEFAULT_CACHE if keep or Path(DEFAULT_CACHE).is_dir() else None
    )
    if path and not fresh:
        return Path(path).expanduser().resolve(), False
    return Path(tempfile.mkdtemp(prefix="fusewright-data-")), True


# --- the cache -----------------------------------------------------------------------------------


def _store(
    cache: Cache,
    recipe: Recipe,
    sources: dict[str, list[DataSource]],
    work: dict[str, list[Work]],
    console: Console | None,
) -> dict[str, Any]:
    folder, bad = cache.begin(), [BadRows()]
    try:
        counts: Counter[str] = Counter()
        first: dict[str, str] = {}
        sizes: list[int] = []
        with_images = any(w.encoder.settings.get("images") for each in work.values() for w in each)
        extra = recipe.kd_trainer or rows_of(recipe) == "prompts" or with_images
        files = ["train.arrow"]
        record = unchanged.ImageRecord() if with_images else None
        with Progress(console) as progress:
            duplicates = None
            if recipe.dataset_exact_deduplication:
                duplicates = Duplicates(identity if with_images else str)
            with ArrowWriter(folder / "train.arrow", extra) as writer:
                for source, one in _pairs(sources, work, "datasets"):
                    before = writer.count
                    bad.append(bad[-1].following(source.dataset.path))
                    prepared = _write(
                        source, one, writer, recipe, progress, duplicates, record, bad[-1]
                    )
                    counts, first = counts + prepared.counts, {**prepared.first, **first}
                    sizes.append(writer.count - before)
            for i, (source, one) in enumerate(_pairs(sources, work, "test_datasets"), start=1):
                files.append(f"test_{i}.arrow")
                with ArrowWriter(folder / files[-1], extra) as writer:
                    bad.append(bad[-1].following(source.dataset.path))
                    _write(source, one, writer, recipe, progress, None, record, bad[-1])
        raise_any(bad)
        if record is not None:
            record.save(folder)
        if sizes:
            order(sizes, recipe)  # rows that cannot be split are not worth keeping
        about = {"counts": dict(counts), "first": first, "sizes": sizes}
        cache.finish(folder, files, about)
        return {**about, "files": dict.fromkeys(files)}
    except BaseException as error:
        cache.abandon(folder)
        if isinstance(error, Exception) and not isinstance(error, BadRowsError):
            raise_any(bad, first_line(error))
        raise


def _pairs(
    sources: dict[str, list[DataSource]], work: dict[str, list[Work]], key: str
) -> list[tuple[DataSource, Work]]:
    return list(zip(sources.get(key, ()), work.get(key, ()), strict=True))


class PreparedRows(NamedTuple):
    """The counts of a dataset's rows, and where the first of some kinds is."""

    counts: Counter[str]
    first: dict[str, str]


def _write(
    source: DataSource,
    work: Work,
    writer: ArrowWriter,
    recipe: Recipe,
    progress: Progress,
    duplicates: Duplicates | None,
    record: unchanged.ImageRecord | None,
    bad: BadRows,
) -> PreparedRows:
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    ends: set[int] = set()
    trained: set[int] = set()
    before = writer.count
    path = source.dataset.path
    rows = source.rows_and_faults(progress.dataset(path))
    for part in parts(work, rows, recipe.dataset_processes or 1, bad):
        counts, first = counts + part.counts, {**part.first, **first}
        ends |= part.ends
        trained |= part.trained
        if duplicates is not None:
            part = duplicates.without(part)
            counts["duplicates"] += part.counts["duplicates"]
        if record is not None:
            record.add(part.extra)
        writer.add(part.ids, part.labels, part.lengths, part.extra)
    if bad.searching:  # all that is told in the end is which
        return PreparedRows(counts, first)
    if not counts["rows"]:
        raise DataError(f"{path}: the dataset is empty")
    if writer.count == before and not counts["duplicates"]:
        raise DataError(f"{path}: {nothing_left(counts, work.limits)}")
    work.encoder.check_ends(path, ends, trained)
    return PreparedRows(counts, first)


# --- prepared data -------------------------------------------------------------------------------


def _split(
    folder: Path, about: dict[str, Any], recipe: Recipe, fingerprint: str, lease: Lease | None
) -> PreparedData:
    samples = Samples(folder / "train.arrow", lease=lease)
    rows, valid = samples.rows, samples.rows[:0]
    if about["sizes"]:
        rows, valid = order(about["sizes"], recipe)
    counts: Counter[str] = Counter(about["counts"])
    train, validation = samples.select(rows), {}
    if len(valid):
        part = samples.select(valid)
        limit = recipe.eval_sequence_len
        if limit is not None and (part.lengths > limit).any():
            short = np.flatnonzero(part.lengths <= limit)
            counts["validation_too_long"] = len(part) - len(short)
            part = part.select(short)
            if not len(part):
                raise DataError(
                    f"eval_sequence_len: all {len(valid)} rows that were held out are longer than "
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


# --- splitting and ordering ----------------------------------------------------------------------


def split(items: Sequence[T], size: float, seed: int) -> tuple[list[T], list[T]]:
    """Shuffle ``items`` and hold some out; ``size`` is a share below 1, or a number of items.

    Returns the items to train on, and those held out. Raises a DataError if either were empty.
    """
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    count = round(len(shuffled) * size) if size < 1 else round(size)
    if count >= len(shuffled) or (size > 0 and count == 0):
        left = max(0, len(shuffled) - count)
        raise DataError(
            f"val_set_size: {size:g} of {len(shuffled)} rows leaves {left} to train on and "
            f"{len(shuffled) - left} to validate on; {_remedy(len(shuffled), size)}"
        )
    return shuffled[count:], shuffled[:count]


def _remedy(rows: int, size: float) -> str:
    if rows < 2:
        return "add rows, or set val_set_size: 0"
    if round(size * rows if size < 1 else size) == 0:
        return f"set val_set_size: 0 to validate on none, or a number of rows from 1 to {rows - 1}"
    return f"set val_set_size to a number of rows from 1 to {rows - 1}, to a share below 1, or to 0"


def order(sizes: Sequence[int], recipe: Recipe) -> tuple[Array, Array]:
    """The rows to train on and those to validate on.

    ``sizes`` has the number of rows of each dataset; rows are numbered one dataset after the other.
    The result is int64 (N,) and (M,): a row may be trained on several times; it is never in both.
    Raises a DataError if nothing would be left on one side.
    """
    train, validation = split(range(sum(sizes)), recipe.val_set_size, recipe.seed)
    rest = np.array(train, np.int64)
    mixed = recipe.shuffle_merged_datasets and not recipe.curriculum_sampling
    if not mixed and (recipe.curriculum_sampling or not recipe.shuffle_before_merging_datasets):
        rest.sort()
    weights = [dataset.weight or 1.0 for dataset in recipe.datasets]
    ends = np.cumsum(sizes)
    if any(w != 1.0 for w in weights) or not mixed:
        owners = np.searchsorted(ends, rest, side="right")
        weighed = [
            _weighed(rest[owners == i], w) for i, w in zip(range(len(sizes)), weights, strict=True)
        ]
        rest = np.concatenate(weighed)
        if mixed:
            rest = np.random.default_rng(recipe.seed).permutation(rest)
    if recipe.dataset_shard_num:
        rest = rest[recipe.dataset_shard_idx :: recipe.dataset_shard_num]
    return rest, np.array(validation, np.int64)


def _weighed(rows: Array, weight: float) -> Array:
    """Repeat each row ``weight`` times; the fraction repeats the first ones once more."""
    whole, part = divmod(weight, 1.0)
    return np.concatenate([*[rows] * int(whole), rows[: round(part * len(rows))]])


# --- streams -------------------------------------------------------------------------------------


class StreamedPacks(IterableDataset[Pack]):
    """An endless stream of packs, for data that is larger than memory; the same for the same seed.

    Rows are read in batches, from all datasets in turn, and from the beginning again when they end.
    ``streaming_multipack_buffer_size`` samples are collected, shuffled, packed and handed out; no
    more than that, and the batch that is being read, is ever in memory.

    Attributes:
        counts: of the rows that this process read so far, as in ``PreparedData.counts``; a row that
            is read again counts again.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        work: Sequence[Work],
        recipe: Recipe,
        lease: Lease | None = None,
    ) -> None:
        self.sources, self.work, self.recipe = sources, work, recipe
        self._lease = lease  # of the folder with copies of images
        self.counts: Counter[str] = Counter()

    def has_extra(self) -> bool:
        """Whether samples may have other data."""
        return any(bool(one.encoder.settings.get("images")) for one in self.work)

    def __iter__(self) -> Iterator[Pack]:
        size = self.recipe.streaming_multipack_buffer_size
        draw = np.random.default_rng(self.recipe.seed)
        while True:
            samples, count = self._samples(), 0
            while buffer := list(islice(samples, size)):
                count += len(buffer)
                if self.recipe.shuffle_merged_datasets and not self.recipe.curriculum_sampling:
                    buffer = [buffer[i] for i in draw.permutation(len(buffer))]
                for group in self._groups([len(ids) for ids, _, _ in buffer], draw):
                    members = [buffer[i] for i in group]
                    yield [Sample(a.tolist(), b.tolist(), extra) for a, b, extra in members]
            if not count:
                paths = ", ".join(source.dataset.path for source in self.sources)
                raise DataError(f"{paths}: no row of the stream can be trained on")

    def _groups(self, lengths: Sequence[int], draw: np.random.Generator) -> Iterable[Sequence[int]]:
        """Packs of the buffer's samples, in any order: best fit would put the long ones first."""
        if not self.recipe.packs():
            return ([i] for i in range(len(lengths)))
        groups = pack(
            np.array(lengths), self.recipe.sequence_len, self.recipe.sample_packing_bin_size
        )
        return (groups[i] for i in draw.permutation(len(groups)))

    def _samples(self) -> Iterator[tuple[Array, Array, str]]:
        readers = [
            _Reader(source, work, batches(self._share(source.rows())))
            for source, work in zip(self.sources, self.work, strict=True)
        ]
        enough = -(-self.recipe.streaming_multipack_buffer_size // len(readers))
        while readers:
            for reader in list(readers):
                part = reader.part(enough)
                if part is None:
                    readers.remove(reader)
                    continue
                self.counts += part.counts
                if len(part.lengths):
                    cuts = np.cumsum(part.lengths)[:-1]
                    extra = part.extra or [""] * len(part.lengths)
                    yield from zip(
                        np.split(part.ids, cuts), np.split(part.labels, cuts), extra, strict=True
                    )

    def _share(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows of this process, where a data loader has several."""
        worker = get_worker_info()
        return rows if worker is None else islice(rows, worker.id, None, worker.num_workers)


class _Reader:
    def __init__(self, source: DataSource, work: Work, rows: Iterator[list[Row]]) -> None:
        self.source, self.work, self.rows = source, work, rows
        self.read = self.samples = 0
        self.ends: set[int] = set()
        self.trained: set[int] = set()

    def part(self, enough: int) -> Part | None:
        """The next samples, or None at the end.

        After ``enough`` rows some end of a turn must have been trained: a stream may have no end at
        which all errors are known. Raises a DataError if none is, or if a row is not right.
        """
        batch = next(self.rows, None)
        encoder, path = self.work.encoder, self.source.dataset.path
        if batch is None:
            is_whole = get_worker_info() is None or not self.trained  # a worker has a share only
            if self.samples and is_whole:
                encoder.check_ends(path, self.ends, self.trained)
            return None
        part = self.work.part(batch)
        before, self.read = self.read, self.read + len(batch)
        self.samples += len(part.lengths)
        self.ends |= part.ends
        self.trained |= part.trained
        if before < enough <= self.read and self.samples and not self.trained:
            encoder.check_ends(path, self.ends, self.trained)
        return part


def stream(
    recipe: Recipe, make_work: Callable[[Dataset], Work], lease: Lease | None = None
) -> StreamedPacks:
    """The stream of a recipe's ``pretraining_dataset``, or of its ``datasets``.

    Raises a DataError if a dataset is not there, or its first row is not right.
    """
    datasets = recipe.pretraining_dataset or recipe.datasets
    key = "pretraining_dataset" if recipe.pretraining_dataset else "datasets"
    may_build = recipe.consent.allow_builders
    inputs = [
        sources.find(d, f"{key}.{i}", streaming=True, allow_builders=may_build)
        for i, d in enumerate(datasets)
    ]
    work = [make_work(source.dataset) for source in inputs]
    for source, one in zip(inputs, work, strict=True):  # errors are raised now
        first = list(islice(source.rows(), 1))
        if not first:
            raise DataError(f"{source.dataset.path}: the dataset is empty")
        one.part(first)
    return StreamedPacks(inputs, work, recipe, lease)


# --- progress ------------------------------------------------------------------------------------


class Progress:
    """A bar per dataset, while entered; shown only on a ``console`` that is a terminal."""

    def __init__(self, console: Console | None) -> None:
        self._bars: Any = None
        if console is not None and console.is_terminal and not console.quiet:
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("preparing {task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )

    def dataset(self, path: str) -> Callable[[float], None]:
        """Add a bar; the result is called with the share that is done."""
        if self._bars is None:
            return lambda share: None
        task = self._bars.add_task(Path(path).name, total=1.0)
        bars = self._bars
        return lambda share: bars.update(task, completed=share)

    def __enter__(self) -> Progress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bars is not None:
            self._bars.stop()


# --- fingerprints --------------------------------------------------------------------------------


def fingerprint_of(recipe: Recipe, tokenizer: Any, every: Sequence[tuple[DataSource, Work]]) -> str:
    """A hash of everything that tokens and labels depend on.

    Of a file only the content counts, not its path. How rows are split, weighed and shuffled does
    not count either: that is done with the rows in the cache. Raises a DataError if a file cannot
    be read.
    """
    import tokenizers
    import transformers

    about = {
        "format": FORMAT,
        "versions": [tokenizers.__version__, transformers.__version__],
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer),
        "special": tokenizer.special_tokens_map,
        "duplicates": recipe.dataset_exact_deduplication,
        "datasets": [
            {
                "content": source.digest(),
                "keys": source.dataset.model_dump(
                    mode="json", exclude={"path", "builder", "weight", "revision", "name"}
                ),
                "limit": source.limit,
                "encoder": one.encoder.settings,
                "limits": [one.limits.longest, one.limits.shortest, one.limits.excess],
            }
            for source, one in every
        ],
    }
    text = json.dumps(about, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def with_content(fingerprint: str, root: Path) -> str:
    """A hash that also depends on the prepared rows themselves, in the caches of ``root``."""
    about = Cache(root, fingerprint).load() or {}
    text = f"{fingerprint} {json.dumps(about.get('files'), sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- duplicates ----------------------------------------------------------------------------------


class Duplicates:
    """Remembers samples by a hash of their tokens, labels and ``extra``: 16 bytes each.

    ``identity`` is what counts of ``extra``.
    """

    def __init__(self, identity: Callable[[str], str] = str) -> None:
        self._seen: set[bytes] = set()
        self._identity = identity

    def without(self, part: Part) -> Part:
        """The new samples, with ``duplicates`` counted."""
        ends = np.cumsum(part.lengths, dtype=np.int64)
        new = np.zeros(len(part.lengths), bool)
        for i, (end, length) in enumerate(zip(ends.tolist(), part.lengths.tolist(), strict=True)):
            begin = end - length
            key = hashlib.blake2b(part.ids[begin:end].tobytes(), digest_size=16)
            key.update(part.labels[begin:end].tobytes())
            key.update(self._identity(part.extra[i]).encode() if part.extra else b"")
            new[i] = key.digest() not in self._seen
            self._seen.add(key.digest())
        counts = part.counts.copy()
        counts["duplicates"] = int((~new).sum())
        tokens = np.repeat(new, part.lengths)
        return replace(
            part,
            ids=part.ids[tokens],
            labels=part.labels[tokens],
            lengths=part.lengths[new],
            extra=[text for text, is_new in zip(part.extra, new, strict=False) if is_new],
            counts=counts,
        )


# Prepares rows once, whatever the number of processes.


def prepare_once(
    recipe: Recipe, processing: Any, console: Console | None, day: str, world: World
) -> PreparedData:
    """Let rank 0 prepare the rows of a recipe, and the other processes read them from its cache.

    On another machine that does not see the cache, the first process prepares them again. None of
    them waits at a collective, so preparation may take as long as it does. Arguments and errors are
    those of ``prepare``.
    """
    mine: list[PreparedData] = []

    def first() -> str:
        mine.append(prepare(recipe, processing, console, day=day))
        return str(_cache(mine[0]) or "")

    root = world.share(first)
    if not world.main:
        overrides = {"dataset_prepared_path": root} if root else {}
        same = recipe.model_copy(update=overrides)
        shared = bool(root)
        world.one_per_machine(
            lambda: mine.append(prepare(same, processing, None, day=day, shared=shared))
        )
    return mine[0]


def _cache(prepared: PreparedData) -> Path | None:
    for samples in (prepared.train, *prepared.validation.values()):
        if isinstance(samples, Samples):
            return samples.path.parent.parent
    return None
