"""The images of a recipe's rows, and what towers hold and compute for those of a micro batch."""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ....errors import RecipeError
from ....kernels.cost import Living
from ...data.chat.date import today
from ...data.images.features import Illustrated
from ...data.images.picture import NoImages, Picture
from ...data.images.reading import ImageReader, reader_of
from ...data.preferences.limits import TokenizedRow
from ...data.prepare import encoder_for
from ...data.readers import sources
from ...data.sample import Sample
from ...model.load import quiet
from ...model.processor import load_processing
from ...processing import Processing
from ...recipe.keys.row_types import is_function_type
from ...recipe.preferences import rows_of
from ...recipe.recipe import Dataset, Recipe

_ROWS = 100
"""Rows of each dataset whose images are looked at."""

_SIDE = 1024
"""Width and height of an image that is assumed where no row is on this machine."""

Features = Mapping[str, Tensor]


@dataclass(frozen=True)
class RowImages:
    """The images of a recipe's rows.

    Attributes:
        rows: that were read; 0: one image for each row is assumed.
        images: of a row, on average.
        tokens: that stand for the images of a row, on average.
        length: the tokens of a row, on average; 0: not known.
        longest: the tokens of the longest row; 0: not known.
        largest: the most tokens that stand for the images of one row.
        features: what the processor makes of that row's images.
    """

    rows: int
    images: float
    tokens: float
    length: float
    longest: int
    largest: int
    features: Features = field(repr=False)

    def times(self, recipe: Recipe, sequences: int = 1) -> float:
        """How many times ``features`` are in a micro batch.

        Where rows are not packed, each may be as large as the largest one.
        """
        if not recipe.packs():
            return float(recipe.micro_batch_size * sequences)
        rows = (
            recipe.micro_batch_size * sequences * recipe.sequence_len / (self.length or self.tokens)
        )
        return max(1.0, rows * self.tokens / self.largest)


@dataclass(frozen=True)
class ImageUsage:
    """What the images of a micro batch take.

    Attributes:
        rows: that were read to know it; 0: it is assumed.
        images: of a row, on average.
        tokens: that stand for the images of a row, on average.
        longest: the tokens of the longest row; 0: not known.
        kept: bytes that towers keep for backward outside of their blocks; 0 if they are frozen.
        passing: the most bytes that towers hold at one time in forward.
        flops: of towers, but of trained blocks, which are blocks of the step.
        why_not: why what towers take could not be counted.
    """

    rows: int
    images: float
    tokens: float
    longest: int
    kept: int
    passing: int
    flops: int
    why_not: str = ""


# --- rows -----------------------------------------------------------------------------------------


def row_images(recipe: Recipe) -> RowImages | None:
    """The images of a recipe's rows; None: there are none, or they cannot be known here.

    A few rows are read where they are on this machine. Without rows here, a recipe with
    ``processor_type`` has an image in each. Raises a DataError if a row that is read is wrong.
    """
    kind = rows_of(recipe)
    local = [
        d for d in recipe.datasets if Path(d.path).exists()
        and not (kind and isinstance(d.type, str) and is_function_type(d.type, kind))
    ]  # fmt: skip
    if not (local or recipe.processor_type):
        return None
    try:
        with quiet():
            processing = load_processing(recipe)
    except RecipeError:  # there is no tokenizer: a run says so
        return None
    if processing.processor is None:
        return None
    with tempfile.TemporaryDirectory(prefix="fusewright-plan-") as folder:
        copies = Path(folder)
        readers = [reader_of(recipe, d, processing, copies) for d in local or recipe.datasets]
        reader = next((r for r in readers if isinstance(r, ImageReader)), None)
        if reader is None:
            return None
        if not local:
            return _assumed(recipe, reader)
        encoded = [
            (length, _sizes(extra))
            for dataset, images in zip(local, readers, strict=True)
            for length, extra in _encoded(recipe, dataset, processing, images)
            if length <= recipe.sequence_len
        ]
    if not any(sizes for _, sizes in encoded):
        return None
    tokens = [_tokens(reader, sizes) for _, sizes in encoded]
    largest = max(range(len(tokens)), key=tokens.__getitem__)
    count = len(encoded)
    return RowImages(
        count, sum(len(sizes) for _, sizes in encoded) / count, sum(tokens) / count,
        sum(length for length, _ in encoded) / count, max(length for length, _ in encoded),
        tokens[largest], _features(reader, encoded[largest][1]),
    )  # fmt: skip


def _encoded(
    recipe: Recipe, dataset: Dataset, processing: Processing, images: ImageReader | NoImages
) -> Iterator[tuple[int, str]]:
    """The length of each row, and what it has beside its tokens."""
    longest = recipe.sequence_len
    encoder = encoder_for(dataset, recipe, processing.tokenizer, longest, today(), images)
    for row in encoder.encode(list(islice(sources.find(dataset, "datasets").rows(), _ROWS))):
        yield row.length if isinstance(row, TokenizedRow) else len(row.ids), row.extra


def _sizes(extra: str) -> list[tuple[int, int]]:
    illustrated = Illustrated.of(Sample([], [], extra))
    return [picture.size for picture in illustrated.pictures] if illustrated else []


def _tokens(reader: ImageReader, sizes: Sequence[tuple[int, int]]) -> int:
    """The tokens that stand for images of these sizes."""
    expander = reader.expander
    text = expander.expand(
        expander.token * len(sizes), [Picture("", "", size) for size in sizes], "an image"
    ).text
    return len(expander.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _features(reader: ImageReader, sizes: Sequence[tuple[int, int]]) -> Features:
    """What the processor makes of images of these sizes for the towers."""
    from PIL import Image

    expander = reader.expander
    made = expander.processor(
        text=[expander.token * len(sizes)], images=[[Image.new("RGB", size) for size in sizes]],
        return_tensors="pt", **expander.options,
    )  # fmt: skip
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _assumed(recipe: Recipe, reader: ImageReader) -> RowImages:
    side = round((recipe.image_max_pixels or _SIDE**2) ** 0.5)
    sizes = [reader.gallery.resizing.size_of(side, side)]
    tokens = _tokens(reader, sizes)
    return RowImages(0, 1.0, tokens, 0.0, 0, tokens, _features(reader, sizes))


# --- towers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerRun:
    """What towers hold after forward, and at most, in bytes; and forward's FLOPs.

    ``trains``: their outputs need gradients.
    """

    held: int
    most: int
    flops: int
    trains: bool


def run_towers(model: Any, blocks: Mapping[str, nn.Module], features: Features) -> TowerRun:
    """Run the towers, whose ``blocks`` are named by path, on features; under a fake mode.

    Raises what a model's code raises that reads the contents of weights.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    method = base.get_image_features
    known = inspect.signature(method).parameters
    taken = {name: value for name, value in features.items() if name in known}
    living = Living()
    living.exclude([*model.parameters(), *model.buffers(), *taken.values()])
    with _true_depths(model, blocks), KnownNumbers(), living:
        outputs = method(**taken)
    trains = any(isinstance(t, Tensor) and t.requires_grad for t in tree_iter(outputs))
    run = TowerRun(living.bytes, living.most, living.flops, trains)
    del outputs  # which are held until here, as in a step
    return run


@contextlib.contextmanager
def _true_depths(model: Any, blocks: Iterable[str]) -> Iterator[None]:
    """Let configurations of towers say how many blocks are left: some are counted from behind."""
    before: dict[int, tuple[Any, int]] = {}
    for path in blocks:
        stack = path.rpartition(".")[0]
        config = _config_of(model, stack)
        if config is not None:
            before.setdefault(id(config), (config, config.num_hidden_layers))
            config.num_hidden_layers = len(model.get_submodule(stack))
    try:
        yield
    finally:
        for config, depth in before.values():
            config.num_hidden_layers = depth


def _config_of(model: Any, path: str) -> Any:
    """The configuration that says how many layers a list has; None: there is none."""
    while path:
        config = getattr(model.get_submodule(path), "config", None)
        if hasattr(config, "num_hidden_layers"):
            return config
        path = path.rpartition(".")[0]
    return None


class KnownNumbers(TorchDispatchMode):
    """Computes for real, under a fake mode, what does not depend on fake tensors.

    Towers read sizes of images from tensors, and make positions and the borders of windows of them:
    shapes of other tensors depend on their contents.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # 2026-12-01: torch is not typed here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation of known tensors outside of the fake mode."""
        kwargs = kwargs or {}
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if any(isinstance(t, FakeTensor) for t in tensors):
            if func is torch.ops.aten.index.Tensor:  # a mask's rows are known, if it is
                args = (args[0], [n for i in args[1] for n in _places(i)])
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _places(index: Any) -> Sequence[Any]:
    """What selects as ``index`` does, a known mask as numbers."""
    if not isinstance(index, Tensor) or isinstance(index, FakeTensor):
        return [index]
    if index.dtype is not torch.bool:
        return [index]
    with unset_fake_temporarily():
        return index.nonzero(as_tuple=True)
