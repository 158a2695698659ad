"""Masks of rows with images, as text for people to read: eleven processors, plain and packed.

``pytest tests/train/images/test_masks.py --update-goldens`` writes the files anew. In them a run of
tokens is a line: ``>`` is trained, ``#`` stands for an image, other tokens are neither. Which ones
stand for an image is not taken from the code under test, but from transformers' processor.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from fusewright.errors import DataError
from fusewright.train.data import IGNORED
from fusewright.train.data.chat import encoder as chat_encoder
from fusewright.train.data.images.expansion import Expanded, Expander
from fusewright.train.data.images.features import Featurizer, Illustrated
from fusewright.train.data.images.picture import Resizing, load
from fusewright.train.data.sample import Sample
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.trainer.batches import training_batch

from .families import FAMILIES
from .rows import DataSide, draw, message

GOLDEN = Path(__file__).parent / "golden"

TURNS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Answer in short."},
            {"role": "user", "content": "Is <image> as large\nas <image>?"},
            {"role": "assistant", "content": "No, it is smaller."},
            {"role": "user", "content": "And this?<image>"},
            {"role": "assistant", "content": "It is é red."},
        ],
        "images": ["a.png", "b.png", "c.png"],
    },
    {
        "messages": [
            {"role": "user", "content": "What is 1 + 1?"},
            {"role": "assistant", "content": "Two."},
        ]
    },
    {
        "messages": [
            message("user", "b.png", "a.png", "Both?"),
            message("assistant", "One is blue."),
        ]
    },
]
"""Several images in a turn and in turns; text alone; images first."""

SHOWS: dict[str, Any] = {
    "messages": [
        message("user", "Show a square."),
        message("assistant", "Here: ", "c.png", " it is red."),
        message("user", "And this?", "a.png"),
        message("assistant", "Blue."),
    ]
}
"""The assistant shows an image, which it does not learn to write."""

WORDS = [["No, it is smaller.", "It is é red."], ["Two."], ["One is blue."]]
PLAIN_ANSWERS = {"mistral3"}
"""Families whose template writes one text as an answer."""

ENDS = {
    "qwen2_5_vl": "<|im_end|>", "qwen3_vl": "<|im_end|>", "qwen3_5": "<|im_end|>",
    "gemma3": "<end_of_turn>", "gemma4": "<turn|>", "mistral3": "<eos>", "llava": "<eos>",
    "internvl": "<|im_end|>", "smolvlm": "<end_of_utterance>", "idefics3": "<end_of_utterance>",
}  # fmt: skip


def rows_of(family: str) -> list[dict[str, Any]]:
    """The rows that a family's template can write; LLaVA's has no system turn."""
    rows = TURNS if family in PLAIN_ANSWERS else [*TURNS, SHOWS]
    if family != "llava":
        return rows
    return [
        {**row, "messages": [m for m in row["messages"] if m["role"] != "system"]} for row in rows
    ]


def trained_words(family: str) -> list[list[str]]:
    """What is trained in each row: the assistant's words, and what ends its turn."""
    words = WORDS if family in PLAIN_ANSWERS else [*WORDS, ["Here:", "it is red.", "Blue."]]
    if family == "glm4v":  # the next turn's header ends a turn
        return [[*(f"{w}<|user|>" for w in row[:-1]), f"{row[-1]}<eos>"] for row in words[:3]] + [
            ["Here:", "it is red.<|user|>", "Blue.<eos>"]
        ]
    end = ENDS[family]
    ended = [[f"{w}{end}" for w in row] for row in words]
    if family not in PLAIN_ANSWERS:
        ended[3][0] = "Here:"
    if family == "llava":  # which writes images first
        ended[3][:2] = ["Here:  it is red.<eos>"]
    if family == "qwen3_5":  # the last answer begins with its thoughts, which are empty
        for row in ended:
            row[-1] = "\n</think>\n\n" + row[-1]
    return ended


def images_in(data: DataSide, sample: Sample) -> list[bool]:
    """Of each token, whether it stands for an image: as transformers' processor replaces them."""
    illustrated = Illustrated.of(sample)
    if illustrated is None:
        return [False] * len(sample.input_ids)
    made = data.processor(
        text=[illustrated.text],
        images=[[load(p, Resizing(), "") for p in illustrated.pictures]],
        add_special_tokens=False, return_text_replacement_offsets=True,
    )  # fmt: skip
    assert list(made["input_ids"][0]) == sample.input_ids
    pieces: list[str] = []
    at = 0
    for one in made["text_replacement_offsets"][0]:
        pieces += [illustrated.text[at : one["span"][0]], one["replacement"]]
        at = one["span"][1]
    pieces.append(illustrated.text[at:])
    text = "".join(pieces)
    offsets = data.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    spans = [one["new_span"] for one in made["text_replacement_offsets"][0]]
    return [any(a < end and b > begin for begin, end in spans) for a, b in offsets]


def runs(data: DataSide, sample: Sample) -> list[tuple[str, list[int]]]:
    """The runs of tokens of one kind: trained, of an image, or others."""
    kinds = []
    pairs = zip(sample.input_ids, sample.labels, images_in(data, sample), strict=True)
    for token, label, of_image in pairs:
        assert label in (token, IGNORED)
        assert not (of_image and label != IGNORED), "an image is trained"
        kinds.append(("#" if of_image else ">" if label != IGNORED else " ", token))
    return [(kind, [t for _, t in group]) for kind, group in groupby(kinds, key=lambda k: k[0])]


def lines(data: DataSide, sample: Sample) -> list[str]:
    """One line for each run; equal special tokens that follow each other are counted."""
    result = []
    for kind, ids in runs(data, sample):
        pieces: list[str] = []
        text: list[int] = []
        for token, group in groupby(ids):
            count = len(list(group))
            if count > 1 and token in data.tokenizer.all_special_ids:
                pieces += [data.tokenizer.decode(text)] if text else []
                pieces.append(f"{data.tokenizer.decode([token])} * {count}")
                text = []
            else:
                text += [token] * count
        pieces += [data.tokenizer.decode(text)] if text else []
        result.append(f"{kind} {json.dumps(pieces, ensure_ascii=False)[1:-1]}")
    return result


def check(family: str, folder: Path, update: bool = False) -> None:
    """See that the masks of a family are as they were read by people, plain and packed."""
    data = DataSide(family, draw(folder))
    samples = data.samples(rows_of(family))
    table: list[str] = []
    for k, sample in enumerate(samples, start=1):
        trained = [data.tokenizer.decode(ids) for kind, ids in runs(data, sample) if kind == ">"]
        assert [t.strip(" ") for t in trained] == trained_words(family)[k - 1]
        table += [f"row {k}", *lines(data, sample)]
    table.append("packed")
    table += packed(data, samples)
    path = GOLDEN / f"{family}.txt"
    if update:
        path.write_text("\n".join(table) + "\n", encoding="utf-8")
    assert "\n".join(table) + "\n" == path.read_text(encoding="utf-8")


def by_transformers(data: DataSide, sample: Sample) -> dict[str, Any]:
    """What the processor makes of a row by itself."""
    illustrated = Illustrated.of(sample)
    assert illustrated is not None
    images = [[load(p, Resizing(), "") for p in illustrated.pictures]]
    made: dict[str, Any] = data.processor(
        text=[illustrated.text], images=images, add_special_tokens=False, return_tensors="pt"
    )
    return made


def packed(data: DataSide, samples: list[Sample]) -> list[str]:
    """The shapes of a batch of two packs; it must have what its samples have by themselves."""
    recipe = Recipe(base_model="x", datasets=[{"path": "x"}], sample_packing=True, optimize=False)
    packs = [samples[1:], samples[:1]]
    batch = training_batch(packs, recipe, data.tokenizer.pad_token_id, data.featurizer)
    alone = [by_transformers(data, sample) for pack in packs for sample in pack if sample.extra]
    for b, pack in enumerate(packs):
        at = 0
        for sample in pack:
            end = at + len(sample.input_ids)
            assert batch["input_ids"][b, at:end].tolist() == sample.input_ids
            assert batch["labels"][b, at:end].tolist() == sample.labels
            assert batch["position_ids"][b, at:end].tolist() == list(range(end - at))
            at = end
        assert (batch["labels"][b, at:] == IGNORED).all()
    shown = []
    for name in sorted(batch.keys() - {"input_ids", "labels", "position_ids", "tokens", "trained"}):
        own = [one[name] for one in alone]
        assert_joined(name, batch[name], own, packs)
        shown.append(f"  {name} {tuple(batch[name].shape)}")
    return shown


def assert_joined(
    name: str, whole: torch.Tensor, own: list[torch.Tensor], packs: list[list[Sample]]
) -> None:
    """A feature of a batch is that of its samples, in the order of the placeholders."""
    by_token = own[0].shape[:1] == (1,) and own[0].shape[1] == next(
        len(s.input_ids) for pack in packs for s in pack if s.extra
    )
    if by_token:
        rest = iter(own)
        for b, pack in enumerate(packs):
            at = 0
            for sample in pack:
                end = at + len(sample.input_ids)
                expected = next(rest)[0] if sample.extra else torch.zeros(end - at)
                assert whole[b, at:end].tolist() == expected.tolist(), name
                at = end
            assert not whole[b, at:].any()
        return
    at = 0
    for part in own:  # images are padded to the largest of a batch
        place = tuple(slice(0, n) for n in part.shape[1:])
        assert torch.equal(whole[at : at + len(part)][(slice(None), *place)], part), name
        at += len(part)
    assert at == len(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_golden(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check(family, tmp_path, request.config.getoption("--update-goldens"))


def later_spans(*arguments: Any) -> list[tuple[int, int]]:
    return [(begin + 1, end + 1) for begin, end in STANDING_FOR(*arguments)]


STANDING_FOR = chat_encoder.standing_for
EXPAND = Expander.expand


def earlier_spans(self: Expander, *arguments: Any) -> Expanded:
    expanded = EXPAND(self, *arguments)
    return replace(expanded, spans=[(begin - 1, end - 1) for begin, end in expanded.spans])


def in_another_order(self: Featurizer, illustrated: Any) -> Any:
    return PROCESSED(self, [replace(i, pictures=i.pictures[::-1]) for i in illustrated])


PROCESSED = Featurizer._processed


@pytest.mark.parametrize(
    ("owner", "name", "wrong"),
    [
        (Expanded, "place", lambda self, at, right=Expanded.place: right(self, at) + 1),
        (Expanded, "place", lambda self, at, right=Expanded.place: right(self, at) - 1),
        (chat_encoder, "standing_for", later_spans),
        (Expander, "expand", earlier_spans),
        (Featurizer, "_processed", in_another_order),
    ],
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_off_by_one_is_caught(
    family: str, owner: Any, name: str, wrong: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, DataError)):
        check(family, tmp_path)
