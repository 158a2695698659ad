"""Rows: reading, building, splitting, and the complaints, each with file and line."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from fusewright.errors import DataError
from fusewright.train.data.chat.template import Chat
from fusewright.train.data.formats.conversation import Conversation
from fusewright.train.data.prepare import split
from fusewright.train.data.readers import sources
from fusewright.train.recipe.recipe import Dataset

from ..conftest import chat

GOOD = json.dumps(chat("q", "a"))


def read(dataset: Dataset) -> list[Chat]:
    rows = list(sources.find(dataset, allow_builders=True).rows())
    return [Conversation(dataset).read(row, where) for where, row in rows]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{GOOD}\n{{oops\n", ", line 2: not valid JSON: Expecting property name"),
        (f"{GOOD}\n\n[]\n", ", line 3: must be an object with the field 'messages', not a list"),
        (
            '{"text": "a", "id": 1}\n',
            ", line 1: the field 'messages' is missing (the row has 'text', 'id')",
        ),
        ('{"messages": []}\n', ", line 1: the field 'messages' must be a list of messages"),
        (
            '{"messages": ["a"]}\n',
            ", line 1: message 1 must be an object with the fields",
        ),
        ('{"messages": [{"role": "user"}]}\n', ", line 1: message 1 needs the field 'content'"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            ", line 1: no message has the role 'assistant' (only user)",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read(Dataset(path=str(path)))
    assert str(caught.value).startswith(f"{path}{said}")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="line 1: cannot be read: it is not UTF-8"):
        read(Dataset(path=str(path)))


def test_json_lists_other_names_and_several_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.jsonl"
    first.write_text(json.dumps([{"turns": [{"from": "assistant", "value": "x\u2028y"}]}]))
    second.write_text(f"{GOOD}\r\n\n{GOOD}", encoding="utf-8")
    names = {"role": "from", "content": "value"}
    one = Dataset(path=str(first), field_messages="turns", message_property_mappings=names)
    chats = read(one) + read(Dataset(path=str(second)))
    assert [c.where.removeprefix(str(tmp_path)) for c in chats] == [
        "/a.json, row 1", "/b.jsonl, line 1", "/b.jsonl, line 3",
    ]  # fmt: skip
    assert chats[0].messages == [{"role": "assistant", "content": "x\u2028y"}]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"a": 'x, "y"', "b": "1"}, {"a": "zwei\nZeilen", "b": "é 😀"}]
    table = pa.Table.from_pylist(rows)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["a", "b"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=1)
    for name, new in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema) as out:
            out.write_table(table)
    for name in ("rows.jsonl.gz", "rows.csv", "rows.parquet", "file.arrow", "stream.arrow"):
        source = sources.find(Dataset(path=str(tmp_path / name)))
        places, found = zip(*source.rows(), strict=True)
        assert list(found) == rows, name
        word = "line" if "jsonl" in name else "row"
        assert places == tuple(f"{tmp_path / name}, {word} {i}" for i in (1, 2))


def test_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("one\n\ntwo\u2028\r\n", encoding="utf-8")
    assert list(sources.find(Dataset(path=str(path))).rows()) == [
        (f"{path}, line 1", {"text": "one"}),
        (f"{path}, line 3", {"text": "two\u2028"}),
    ]


@pytest.mark.parametrize(
    ("keys", "taken"),
    [
        ({"split": "train[:3]"}, [0, 1, 2]),
        ({"split": "train[7:]"}, [7, 8, 9]),
        ({"split": "train[-2:]"}, [8, 9]),
        ({"split": "train[20%:50%]"}, [2, 3, 4]),
        ({"skip": 8}, [8, 9]),
        ({"shards": 4, "shards_idx": 1}, [1, 5, 9]),
        ({"split": "train[:6]", "skip": 1, "shards": 2}, [1, 3, 5]),
    ],
)
def test_parts_of_a_dataset(tmp_path: Path, keys: dict[str, Any], taken: list[int]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{i}\n" for i in range(10)))
    source = sources.find(Dataset(path=str(path), **keys))
    assert [row for _, row in source.rows()] == taken


def test_a_folder_is_read_by_split_and_one_that_datasets_saved_too(tmp_path: Path) -> None:
    plain, saved = tmp_path / "plain", tmp_path / "saved"
    plain.mkdir()
    for name, text in (("train-1", "a"), ("train-2", "b"), ("test-1", "c")):
        (plain / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")

    def texts(path: Path, **keys: Any) -> list[str]:
        rows = sources.find(Dataset(path=str(path), **keys)).rows()
        return [row["text"] for _, row in rows]

    assert texts(plain) == ["a", "b"]
    assert sources.find(Dataset(path=str(plain))).left_out() is None
    (plain / "dataset_info.json").write_text("{}")
    for name in ("more.csv", "notes/other.txt", ".git/a.json", ".cache/b/c.json", ".d.csv",
                 "__MACOSX/e.csv"):  # fmt: skip
        (plain / name).parent.mkdir(parents=True, exist_ok=True)
        (plain / name).write_text("text\nd\n")
    assert sources.find(Dataset(path=str(plain))).left_out() == (
        f"warning: {plain}: 2 of its files are read (train-1.jsonl, train-2.jsonl), and 2 are not "
        "(more.csv, notes/other.txt): name those that you mean in data_files"
    )
    (tmp_path / "link").symlink_to(plain)
    for path in (tmp_path / "link", plain / "notes" / ".."):
        told = sources.find(Dataset(path=str(path))).left_out()
        assert told is not None
        assert "(train-1.jsonl, train-2.jsonl), and 2 are not (more.csv, notes/other.txt)" in told
    assert texts(plain, split="test") == ["c"]
    assert texts(plain, data_files=["test-*.jsonl", "train-1.jsonl"]) == ["c", "a"]
    with pytest.raises(DataError, match="there is no split 'dev', only"):
        texts(plain, split="dev")
    with pytest.raises(DataError, match=r"data_files: there is no x\.jsonl in this folder"):
        texts(plain, data_files="x.jsonl")
    both = {n: datasets.Dataset.from_list([{"text": n}]) for n in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(saved)
    assert texts(saved) == ["train"]
    assert texts(saved, split="test") == ["test"]
    with pytest.raises(DataError, match="no split 'dev', only train, test"):
        texts(saved, split="dev")


def test_a_json_file_that_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="must be a list of rows"):
        read(Dataset(path=str(path)))


def test_a_builder_runs_once_in_its_own_process(tmp_path: Path) -> None:
    builder, path = tmp_path / "make.py", tmp_path / "made" / "rows.jsonl"
    builder.write_text(
        "import pathlib, sys\n"
        "p = pathlib.Path(sys.argv[1]); p.parent.mkdir()\n"
        f"p.write_text({GOOD!r})\n"
    )
    dataset = Dataset(path=str(path), builder=str(builder))
    assert read(dataset) == read(dataset)  # a second mkdir would fail
    os.utime(builder, (path.stat().st_mtime + 9,) * 2)
    with pytest.raises(DataError, match="FileExistsError"):  # a newer builder does run again
        read(dataset)


def test_a_builder_that_fails_is_named(tmp_path: Path) -> None:
    builder = tmp_path / "make.py"
    builder.write_text("raise SystemExit('no disk')")
    with pytest.raises(DataError, match=r"make\.py: did not build .* \(exit code 1\): no disk"):
        read(Dataset(path=str(tmp_path / "rows.jsonl"), builder=str(builder)))


def test_split_is_a_repeatable_partition() -> None:
    train, held = split(range(100), 0.1, seed=3)
    assert len(held) == 10
    assert sorted(train + held) == list(range(100))
    assert (train, held) == split(range(100), 0.1, seed=3)
    assert held != split(range(100), 0.1, seed=4)[1]
    assert len(split(range(100), 7, seed=3)[1]) == 7
    assert split(range(3), 0, seed=3)[1] == []


@pytest.mark.parametrize("size", [100, 250, 0.001, 0.999])
def test_a_split_that_leaves_nothing(size: float) -> None:
    with pytest.raises(DataError, match="val_set_size"):
        split(range(100), size, seed=0)


def test_the_packages_own_rows_are_the_same_real_chats_every_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # neither the current folder nor PYTHONPATH can put another module in the way
    (tmp_path / "json.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = Dataset(path="fusewright:docstrings")
    found = [sources.find(own) for _ in range(2)]
    assert found[0].digest() == found[1].digest()
    some = sources.find(own.model_copy(update={"split": "train[:7]"}))
    assert len(list(some.rows())) == 7
    with pytest.raises(DataError, match="has only the split 'train'"):
        sources.find(own.model_copy(update={"split": "test"}))
    chats = read(own)
    assert len(chats) > 2000
    answers = {c.messages[0]["content"]: c.messages[1]["content"] for c in chats}
    answer = answers["What does `json.dumps` do?"]
    assert answer.startswith("Help on function dumps in json:\n\ndumps(obj, *, skipkeys=False,")
    assert "\n    Serialize ``obj`` to a JSON formatted ``str``.\n" in answer
    assert len(set(answers.values())) == len(chats)  # none is in both halves of a split


def _questions(path: str) -> dict[str, dict[str, Any]]:
    """The package's own rows of a name, by their questions."""
    found = [row for _, row in sources.find(Dataset(path=path)).rows()]
    first = "messages" if "messages" in found[0] else "prompt"
    return {row[first][0]["content"]: row for row in found}


def test_the_packages_own_pairs_are_the_right_answer_and_another_ones() -> None:
    own = Dataset(path="fusewright:docstring_pairs")
    assert sources.find(own).digest() == sources.find(own).digest()
    chats, pairs = _questions("fusewright:docstrings"), _questions(own.path)
    assert list(pairs) == list(chats)
    for question, row in pairs.items():
        assert row["messages"] == chats[question]["messages"][:1]
        assert row["chosen"] == chats[question]["messages"][1]
        assert row["rejected"]["role"] == "assistant"
        assert row["rejected"]["content"] != row["chosen"]["content"]
    wrong = {question: row["rejected"]["content"] for question, row in pairs.items()}
    # of the same kind in the same module; alone of its kind, of the same module
    assert wrong["What does `json.dumps` do?"].startswith("Help on function load in json:\n")
    assert wrong["What is the module `abc` for?"].startswith("Help on class ABC in abc:\n")
    # an answer is not wrong by itself: nearly each one is right once and wrong once
    right = {row["chosen"]["content"] for row in pairs.values()}
    assert set(wrong.values()) <= right
    assert len(set(wrong.values())) > 0.9 * len(right)


def test_the_packages_own_prompts_are_short_and_have_an_answer() -> None:
    own = Dataset(path="fusewright:docstring_prompts")
    assert sources.find(own).digest() == sources.find(own).digest()
    chats, prompts = _questions("fusewright:docstrings"), _questions(own.path)
    assert list(prompts) == list(chats)
    assert max(map(len, prompts)) < 100
    assert prompts["What does `json.dumps` do?"] == {
        "prompt": [{"role": "user", "content": "What does `json.dumps` do?"}],
        "answer": "Serialize ``obj`` to a JSON formatted ``str``.",
    }
    for question, row in prompts.items():
        assert row["answer"]
        told = " ".join(chats[question]["messages"][1]["content"].split())
        assert row["answer"] in told
