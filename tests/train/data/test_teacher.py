"""Rows with a teacher's log-probabilities: what is kept of them, and what is wrong with others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from fusewright.errors import DataError, RecipeError
from fusewright.train.data import IGNORED, Sample, Samples, collate, prepare
from fusewright.train.data.teacher import TopTokens, take_teacher, with_teacher
from fusewright.train.recipe.conflicts import without_effect
from fusewright.train.recipe.load import check, load_recipe

from ..conftest import make_tokenizer, write_rows
from ..methods.teacher import TYPE, taught_rows

NAMES = [[("token_id:5", -0.5), ("token_id:7", -1.5)]] * 3
"""What a teacher says of the answer 'ab' and its end."""


def entries(said: Any = NAMES) -> list[Any]:
    return [[{"token": t, "logprob": value} for t, value in entry] for entry in said]


def row(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "ab"}]
    return {"messages": messages, "logprobs": entries(), **fields}


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_rows(folder / "rows.jsonl", rows)


def prepared(path: Path, dataset: dict[str, Any] | None = None, **keys: Any) -> Samples:
    recipe = load_recipe({
        "base_model": "a/b", "kd_trainer": True, "sequence_len": 512, "val_set_size": 0,
        "datasets": [{"path": str(path), "type": TYPE, **(dataset or {})}], **keys,
    })  # fmt: skip
    train = prepare(recipe, make_tokenizer()).train
    assert isinstance(train, Samples)
    return train


def of(sample: Sample) -> tuple[list[list[int]], list[list[float]]]:
    top = TopTokens.read(sample.extra)
    return top.ids.tolist(), top.logprobs.tolist()


def test_each_trained_token_has_what_the_teacher_says_of_it(tmp_path: Path) -> None:
    said = [[("token_id:5", -0.5)], [("token_id:6", -0.25), ("token_id:7", -2)], NAMES[0]]
    sample = prepared(write(tmp_path, [row(logprobs=entries(said))]))[0]
    assert sample.trained == 3
    ids, values = of(sample)
    assert ids == [[5, 0], [6, 7], [5, 7]]
    assert values == [[-0.5, -math.inf], [-0.25, -2.0], [-0.5, -1.5]]


def test_a_list_for_all_tokens_is_read_at_the_trained_ones(tmp_path: Path) -> None:
    plain = prepared(write(tmp_path, [row()]))[0]
    places = [i for i, label in enumerate(plain.labels) if label != IGNORED]
    length = len(plain.input_ids)
    every: list[Any] = [None] * length
    for n, place in enumerate(places):
        every[place] = [{"token": f"token_id:{20 + n}", "logprob": -1.0}]
    for listed in (every, every[1:]):
        sample = prepared(write(tmp_path, [row(logprobs=listed)]))[0]
        assert of(sample)[0] == [[20], [21], [22]]


@pytest.mark.parametrize("kind", ["", ".load", ".load_v2", ".load_legacy"])
def test_the_forms_of_rows_are_recognized(kind: str, tmp_path: Path) -> None:
    """Tokens with log-probabilities, two columns, and vLLM's own objects."""
    columns = {"logprobs": [[-0.5, -1.5]] * 3, "target_token_ids": [[5, 7]] * 3}
    objects = {"logprobs": [{"5": {"logprob": -0.5, "rank": 1}, "7": {"logprob": -1.5}}] * 3}
    named = {"type": TYPE + kind, "logprobs_field": "logprobs"}
    found = [
        of(prepared(write(tmp_path, [row(**fields)]), named)[0])
        for fields in ({}, columns, objects)
    ]
    assert found == [([[5, 7]] * 3, [[-0.5, -1.5]] * 3)] * 3


def test_the_field_of_axolotls_example_is_found(tmp_path: Path) -> None:
    taught = row(logprobs=entries([[("token_id:9", -1.0)]] * 3))
    taught["llm_text_generation_vllm_logprobs"] = taught.pop("logprobs")
    assert of(prepared(write(tmp_path, [taught]))[0])[0] == [[9]] * 3
    both = {**taught, **row()}
    named = {"logprobs_field": "llm_text_generation_vllm_logprobs"}
    assert of(prepared(write(tmp_path, [both]), named)[0])[0] == [[9]] * 3
    assert of(prepared(write(tmp_path, [both]))[0])[0] == [[5, 7]] * 3


def test_rows_of_parquet_are_read_as_those_of_json(tmp_path: Path) -> None:
    rows = taught_rows(6)
    path = tmp_path / "rows.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    samples = prepared(write(tmp_path, rows))
    assert list(prepared(path)) == list(samples)
    assert all(sample.extra for sample in samples)
    assert list(prepared(write(tmp_path, taught_rows(6, "columns")))) == list(samples)


def test_the_temperature_of_the_teacher_is_taken_out(tmp_path: Path) -> None:
    sample = prepared(write(tmp_path, [row()]), {"temperature": 2.0})[0]
    assert of(sample)[1] == [[-1.0, -3.0]] * 3


def test_a_row_that_is_cut_keeps_the_beginning(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]
    short = row(messages=messages, logprobs=entries(NAMES[:2]))  # whose end is trained
    path = write(tmp_path, [row(), short])
    whole = max(prepared(path), key=lambda sample: sample.trained)
    last = max(i for i, label in enumerate(whole.labels) if label != IGNORED)
    keys = {"sequence_len": last, "excess_length_strategy": "truncate"}
    sample = next(s for s in prepared(path, **keys) if s.input_ids == whole.input_ids[:last])
    assert sample.trained == 2
    batch = with_teacher(collate([[sample]], 0, False, 64), [[sample]])
    ids, values = take_teacher(batch)
    assert (ids[0] != 0).any(-1).nonzero()[:, 0].tolist() == [last - 2, last - 1]
    assert torch.isfinite(values).sum() == 4


def test_a_batch_has_each_part_where_its_label_is(tmp_path: Path) -> None:
    """In packs, and beside a row that is there only to fill the batch."""
    samples = list(prepared(write(tmp_path, taught_rows(5))))
    filler = Sample(samples[0].input_ids[:8], [IGNORED] * 8)
    packs = [samples[:2], samples[2:], [filler]]
    batch = with_teacher(collate(packs, 0, True, 512), packs)
    labels = batch["labels"]
    ids, values = take_teacher(batch)
    assert ids.shape == values.shape == (*labels.shape, 4)
    there = torch.isfinite(values)
    assert torch.equal(there.any(-1), labels != IGNORED)
    assert torch.equal(ids[..., 0][labels != IGNORED], labels[labels != IGNORED])
    probabilities = values.exp().sum(-1)[labels != IGNORED]
    torch.testing.assert_close(probabilities, torch.full_like(probabilities, 0.99))


def test_rows_are_cached_with_what_the_teacher_says(tmp_path: Path) -> None:
    """And prepared anew where that is read otherwise."""
    path, cache = write(tmp_path, [row(), row(other=entries())]), str(tmp_path / "cache")
    first = prepared(path, dataset_prepared_path=cache)
    again = prepared(path, dataset_prepared_path=cache, kd_temperature=2.0)
    assert list(first) == list(again)
    assert first.path == again.path
    other = prepared(path, {"temperature": 2.0}, dataset_prepared_path=cache)
    assert other.path != first.path
    once = prepared(path, dataset_exact_deduplication=True)
    assert len(once) == 1
    assert np.array_equal(once.trained, [3])


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no field": (
        {"logprobs": ...}, "is missing (the row has 'messages'); name the field with the teacher's",
    ),
    "text": ({"logprobs": "none"}, 'must be a list of {"token": "token_id:NUMBER", "logprob": '),
    "null": ({"logprobs": None}, "for each token, as vLLM writes it with return_tokens_as_token_ids"
                                 ", not null"),
    "an empty list": ({"logprobs": []}, "is an empty list: leave the row out"),
    "too few": (
        {"logprobs": entries(NAMES[:2])},
        "has 2 entries, and the row has 3 trained tokens of 25: there must be one for each trained",
    ),
    "an entry that is text": (
        {"logprobs": [*entries()[:2], "x"]}, ", entry 3 must be a list of tokens with log-prob",
    ),
    "an entry that is empty": (
        {"logprobs": [[], *entries()[1:]]}, ", entry 1 is empty, and its token is trained",
    ),
    "a token alone": ({"logprobs": [[5], [6], [7]]}, ", entry 1 must be a list of {\"token\""),
    "no log-probability": (
        {"logprobs": [[{"token": "token_id:5"}]] * 3}, ", entry 1 must be a list of {\"token\"",
    ),
    "text for a token": (
        {"logprobs": entries([[("Hello", -1.0)]] * 3)}, "entry 1: 'Hello' is not the number of a",
    ),
    "a token outside of the vocabulary": (
        {"logprobs": entries([*NAMES[:2], [("token_id:260", -1.0)]])},
        ", entry 3: token 260, and the tokenizer has those from 0 to 259: the teacher must have",
    ),
    "above 0": (
        {"logprobs": entries([[("token_id:5", 0.5)]] * 3)},
        ", entry 1: the log-probability of token 5 is 0.5, which must be a finite number of at",
    ),
    "null for a log-probability": (
        {"logprobs": entries([[("token_id:5", None)]] * 3)}, "of token 5 is None, which must be",
    ),
    "a token twice": (
        {"logprobs": entries([[("token_id:5", -1.0)] * 2] * 3)}, "entry 1 names a token twice",
    ),
    "columns of other lengths": (
        {"logprobs": [[-1.0]] * 3, "target_token_ids": [[5]] * 2},
        "has 3 entries, and 'target_token_ids' must be a list with as many",
    ),
    "entries of other lengths": (
        {"logprobs": [[-1.0]] * 3, "target_token_ids": [[5, 6]] * 3},
        ", entry 1 has 1 log-probabilities, and 'target_token_ids' must have as many tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_message_with_the_row_and_the_field(name: str, tmp_path: Path) -> None:
    fields, said = MISTAKES[name]
    bad = {key: value for key, value in row(**fields).items() if value is not ...}
    path = write(tmp_path, [row(), bad])
    with pytest.raises(DataError) as caught:
        prepared(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 2: the field 'logprobs'")
    assert said in message
    assert "\n" not in message


def test_a_log_probability_that_is_infinite_is_refused(tmp_path: Path) -> None:
    """JSON has none, but other files do."""
    path = tmp_path / "rows.parquet"
    bad = row(logprobs=entries([[("token_id:5", -math.inf)]] * 3))
    pa.parquet.write_table(pa.Table.from_pylist([bad]), path)
    with pytest.raises(DataError, match="of token 5 is -inf, which must be a finite number"):
        prepared(path)


KD: dict[str, Any] = {"kd_trainer": True, "datasets": [{"path": "a/b", "type": TYPE}]}


def test_limits_and_keys_that_are_not_honoured() -> None:
    base = {"base_model": "a/b", **KD}
    for wrong in ({"kd_alpha": 1.5}, {"kd_beta": -1}, {"kd_temperature": 0}, {"kd_ce_alpha": -1}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            load_recipe({**base, **wrong})
    with pytest.raises(RecipeError, match=r"kd_online_server_base_url.*no teacher is asked"):
        load_recipe({**base, "kd_online_server_base_url": "http://localhost"})
    assert check({**base, "plugins": ["axolotl.integrations.kd.KDPlugin"]}).recipe.kd_trainer
    idle = dict(without_effect({"kd_alpha": 0.5, "datasets": [{"path": "a", "temperature": 1}]}))
    assert idle == dict.fromkeys(("kd_alpha", "datasets.0.temperature"), "only kd_trainer: true "
                                 "reads it")  # fmt: skip
