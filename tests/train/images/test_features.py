"""Features of a batch's images, and what is placed for them in the text."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from fusewright.errors import DataError, RecipeError
from fusewright.train.data import IGNORED, collate
from fusewright.train.data.images.expansion import Expanded, Expander
from fusewright.train.data.images.features import Featurizer
from fusewright.train.data.images.picture import Gallery, Resizing, opened
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.trainer.batches import training_batch

from .families import FAMILIES
from .rows import DataSide, draw, message, processor_of

SIZE = st.integers(8, 96)
IMAGES = st.lists(st.tuples(SIZE, SIZE), max_size=3)


def row_of(names: list[str]) -> dict[str, Any]:
    return {"messages": [message("user", *names, "How many?"), message("assistant", "Some.")]}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(IMAGES, min_size=1, max_size=3))
def test_any_sizes_and_numbers_of_images(
    family: str, tmp_path: Path, rows: list[list[tuple[int, int]]]
) -> None:
    """The processor makes the prepared tokens of all of them, each image as if it were alone."""
    names: list[list[str]] = []
    for i, sizes in enumerate(rows):
        names.append([f"{i}-{k}.png" for k in range(len(sizes))])
        for k, (name, size) in enumerate(zip(names[-1], sizes, strict=True)):
            Image.new("RGB", size, (50 * i, 90 * k, 99)).save(tmp_path / name)
    data = DataSide(family, tmp_path)
    samples = data.samples([row_of(of_row) for of_row in names])
    batch = collate([samples], data.tokenizer.pad_token_id, True, 100_000)
    features = data.featurizer.features([samples], batch)
    assert bool(features) == any(rows)
    if not features:
        return
    alone = [
        data.featurizer.features([[s]], {"input_ids": torch.tensor([s.input_ids])})
        for s in samples
        if s.extra
    ]
    for name, whole in features.items():
        if whole.shape[:2] == batch["input_ids"].shape:
            continue
        own = [one[name] for one in alone]
        assert len(whole) == sum(map(len, own))
        at = 0
        for part in own:
            place = (slice(at, at + len(part)), *(slice(0, n) for n in part.shape[1:]))
            assert torch.equal(whole[place], part)
            at += len(part)


def test_a_processor_that_changes_is_refused(tmp_path: Path) -> None:
    """One of another version, say: its tokens are not the prepared ones."""
    data = DataSide("gemma3", draw(tmp_path))
    (sample,) = data.samples([row_of(["a.png"])])
    data.processor.full_image_sequence, usual = (
        "<image_soft_token>",
        data.processor.full_image_sequence,
    )
    try:
        with pytest.raises(DataError, match="line 1: the processor makes other tokens of this row"):
            data.featurizer.features([[sample]], {"input_ids": torch.tensor([sample.input_ids])})
    finally:
        data.processor.full_image_sequence = usual


def test_a_row_with_another_token_is_refused(tmp_path: Path) -> None:
    data = DataSide("qwen2_5_vl", draw(tmp_path))
    (sample,) = data.samples([row_of(["a.png"])])
    odd = replace(sample, input_ids=[*sample.input_ids[:-1], sample.input_ids[0]])
    with pytest.raises(DataError, match="makes other tokens"):
        data.featurizer.features([[odd]], {"input_ids": torch.tensor([odd.input_ids])})


def test_an_image_that_changed_is_refused(tmp_path: Path) -> None:
    data = DataSide("qwen2_5_vl", draw(tmp_path))
    (sample,) = data.samples([row_of(["a.png"])])
    Image.new("RGB", (24, 32), "red").save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"line 1: .*a\.png: has changed since its row"):
        data.featurizer.features([[sample]], {"input_ids": torch.tensor([sample.input_ids])})


@pytest.mark.parametrize("axes", [0, 3])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "mistral3", "smolvlm"])
def test_the_copy_of_a_lone_row_is_not_prepared_again(
    family: str, axes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has what the processor makes of two such rows; ``axes``: positions of an image have."""
    data = DataSide(family, draw(tmp_path))
    rows = [["a.png"], [], ["b.png", "a.png"]]
    packs = [data.samples([row_of(names) for names in rows])]
    featurizer = data.featurizer
    if axes:
        positions = torch.arange(10_000).repeat(axes, 1)
        featurizer = replace(featurizer, positions=lambda ids, _: positions[:, : ids.shape[1]])
    keys = {"base_model": "x", "datasets": [{"path": "x"}], "micro_batch_size": 2}
    recipe = Recipe.model_validate({**keys, "sample_packing": True})
    two = training_batch(packs * 2, recipe, data.tokenizer.pad_token_id, featurizer)
    calls = []
    make = Featurizer._processed
    monkeypatch.setattr(Featurizer, "_processed", lambda *a: calls.append(a) or make(*a))
    one = training_batch(packs, recipe, data.tokenizer.pad_token_id, featurizer)
    assert len([call for call in calls if call[1][0].where != "a blank image"]) == 1
    assert not (two.pop("labels") == one["labels"]).all()
    assert (one.pop("labels")[1] == IGNORED).all()
    counts = ("tokens", "trained")
    assert [2 * one.pop(name) for name in counts] == [two.pop(name) for name in counts]
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_prepares_rows_can_be_pickled(family: str, tmp_path: Path) -> None:
    """It goes to other processes: of ``dataset_processes`` and of the data loader."""
    data = DataSide(family, draw(tmp_path))
    (sample,) = data.samples([row_of(["a.png"])])
    encoder, featurizer = pickle.loads(pickle.dumps((data.encoder, data.featurizer)))
    chat = data.conversation.read(row_of(["a.png"]), "rows.jsonl, line 1")
    assert encoder.encode([chat])[0].ids == sample.input_ids
    batch = {"input_ids": torch.tensor([sample.input_ids])}
    here, there = (
        data.featurizer.features([[sample]], batch),
        featurizer.features([[sample]], batch),
    )
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2_5_vl", {"size": {"shortest_edge": 64, "longest_edge": 16 * 16}}),
        ("qwen2_5_vl", {"min_pixels": 64, "max_pixels": 16 * 16}),
        ("mistral3", {"size": {"longest_edge": 16}}),
        ("smolvlm", {"do_image_splitting": False}),
        ("internvl", {"crop_to_patches": False}),
    ],
)
def test_arguments_of_the_image_processor(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    """They make fewer tokens, and the features are theirs."""
    data = DataSide(family, draw(tmp_path))
    (usual,) = data.samples([row_of(["b.png"])])
    options = {"images_kwargs": keys}
    data.encoder.expander = Expander(data.processor, options)
    (fewer,) = data.samples([row_of(["b.png"])])
    assert len(fewer.input_ids) < len(usual.input_ids)
    batch = {"input_ids": torch.tensor([fewer.input_ids])}
    with pytest.raises(DataError, match="makes other tokens"):
        data.featurizer.features([[fewer]], batch)
    assert replace(data.featurizer, options=options).features([[fewer]], batch)


def test_a_replacement_is_kept_once_for_all_its_sizes() -> None:
    """Rows of the web have tens of thousands of sizes, and it is long."""
    expander = Expander(processor_of("llava"))
    first, second = expander._replacement((24, 32)), expander._replacement((40, 48))
    assert len(first) > 100
    assert first is second


def test_places_in_an_expanded_text() -> None:
    """Text before, at, and behind placeholders."""
    text = "ab<i>cd<i>e"
    expanded = Expanded("abXXXXcdXe", [(2, 6), (8, 9)], [(5, 1), (10, -1)])
    assert [expanded.place(text.index(c)) for c in "abcde"] == [0, 1, 6, 7, 9]
    assert expanded.place(len(text)) == len(expanded.text)


def test_a_processor_without_a_placeholder_is_named() -> None:
    class Nameless:
        image_token = None

    with pytest.raises(RecipeError, match="Nameless names no placeholder for images"):
        Expander(Nameless())


def test_reserved_tokens_are_those_with_features() -> None:
    """Not the marks around them, which a text may have."""
    for family, tokens in {
        "qwen2_5_vl": {"<|image_pad|>", "<|video_pad|>"},
        "gemma3": {"<image_soft_token>", "<start_of_image>"},
        "internvl": {"<IMG_CONTEXT>", "<video>"},
        "mistral3": {"[IMG]"},
        "idefics3": {"<image>"},
    }.items():
        processor = processor_of(family)
        reserved = processor.tokenizer.convert_ids_to_tokens(sorted(Expander(processor).reserved))
        assert set(reserved) == tokens


@pytest.mark.parametrize("size", [0, -5, [], [0, 32], [8, 16, 32]])
def test_odd_sizes_are_refused(size: Any) -> None:
    with pytest.raises(ValidationError, match="image_size"):
        Recipe.model_validate({"base_model": "x", "output_dir": "y", "image_size": size})


def test_an_image_that_would_become_huge_is_refused(tmp_path: Path) -> None:
    """It is made when its tokens are counted."""
    Image.new("RGB", (24, 32)).save(tmp_path / "a.png")
    gallery = Gallery(tmp_path, tmp_path / "copies", Resizing(least=10**12))
    with pytest.raises(DataError, match=r"row: .*a\.png: becomes 866026 x 1154701 pixels"):
        gallery.picture("a.png", "row")


@pytest.mark.parametrize(
    ("resizing", "size", "expected"),
    [
        (Resizing(), (30, 50), (30, 50)),
        (Resizing(size=16), (30, 50), (16, 16)),
        (Resizing(size=(10, 20)), (30, 50), (10, 20)),
        (Resizing(most=400), (40, 40), (20, 20)),
        (Resizing(most=400), (10, 10), (10, 10)),
        (Resizing(least=400), (10, 10), (20, 20)),
        (Resizing(most=100, least=50), (1, 300), (1, 173)),
    ],
)
def test_sizes(resizing: Resizing, size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resizing.size_of(*size) == expected
    assert resizing.resized(Image.new("RGB", size)).size == expected


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 10**6), st.integers(1, 10**6))
def test_limits_of_pixels(width: int, height: int, most: int, least: int) -> None:
    least = min(least, most)
    new = Resizing(most=most, least=least).size_of(width, height)
    if width * height > most:
        assert new[0] * new[1] <= max(most, width, height)
    elif width * height < least:
        assert new[0] * new[1] >= least
    else:
        assert new == (width, height)


def test_an_image_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "x.jpg", exif=exif)
    assert opened((tmp_path / "x.jpg").read_bytes(), "x").size == (10, 20)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (20, 10)).save(tmp_path / "x.png")
    assert opened((tmp_path / "x.png").read_bytes(), "x").mode == "RGB"


def test_a_cameras_views_are_no_animation(tmp_path: Path) -> None:
    """MPO, in which phones keep a preview or a second view beside the image."""
    Image.new("RGB", (20, 10), "red").save(
        tmp_path / "x.mpo", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 4))]
    )
    assert opened((tmp_path / "x.mpo").read_bytes(), "x").size == (20, 10)
