"""Rows: reading, building, splitting, and the complaints, each with file and line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusewright.errors import DataError
from fusewright.train.data import read_chats, split
from fusewright.train.recipe import Dataset

from .conftest import chat

GOOD = json.dumps(chat("q", "a"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ": the dataset is empty"),
        ("\n \n", ": the dataset is empty"),
        (f"{GOOD}\n{{oops\n", ", line 2: not valid JSON: Expecting property name"),
        (f"{GOOD}\n\n[]\n", ", line 3: must be an object with the field 'messages', not a list"),
        (
            '{"text": "a", "id": 1}\n',
            ", line 1: the field 'messages' is missing (the row has 'text', 'id')",
        ),
        ('{"messages": []}\n', ", line 1: the field 'messages' must be a list of messages"),
        ('{"messages": ["a"]}\n', ", line 1: message 1 needs the field 'role', with text in it"),
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
        read_chats([Dataset(path=str(path))])
    assert str(caught.value).startswith(f"{path}{said}")


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        read_chats([Dataset(path=str(path))])


def test_json_lists_other_names_and_several_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.jsonl"
    first.write_text(json.dumps([{"turns": [{"from": "assistant", "value": "x\u2028y"}]}]))
    second.write_text(f"{GOOD}\r\n\n{GOOD}", encoding="utf-8")
    names = {"role": "from", "content": "value"}
    chats = read_chats(
        [
            Dataset(path=str(first), field_messages="turns", message_property_mappings=names),
            Dataset(path=str(second)),
        ]
    )
    assert [c.where.removeprefix(str(tmp_path)) for c in chats] == [
        "/a.json, row 1", "/b.jsonl, line 1", "/b.jsonl, line 3",
    ]  # fmt: skip
    assert chats[0].messages == [{"role": "assistant", "content": "x\u2028y"}]


def test_a_json_file_that_is_no_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}')
    with pytest.raises(DataError, match="must be a list of rows"):
        read_chats([Dataset(path=str(path))])


def test_a_builder_runs_once_in_its_own_process(tmp_path: Path) -> None:
    builder, path = tmp_path / "make.py", tmp_path / "made" / "rows.jsonl"
    builder.write_text(
        "import pathlib, sys\n"
        "p = pathlib.Path(sys.argv[1]); p.parent.mkdir()\n"
        f"p.write_text({GOOD!r})\n"
    )
    dataset = Dataset(path=str(path), builder=str(builder))
    assert read_chats([dataset]) == read_chats([dataset])  # a second mkdir would fail
    os.utime(builder, (path.stat().st_mtime + 9,) * 2)
    with pytest.raises(DataError, match="FileExistsError"):  # a newer builder does run again
        read_chats([dataset])


def test_a_builder_that_fails_is_named(tmp_path: Path) -> None:
    builder = tmp_path / "make.py"
    builder.write_text("raise SystemExit('no disk')")
    with pytest.raises(DataError, match=r"make\.py: did not build .* \(exit code 1\): no disk"):
        read_chats([Dataset(path=str(tmp_path / "rows.jsonl"), builder=str(builder))])


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


def test_the_docstring_builder_writes_the_same_real_chats_every_time(tmp_path: Path) -> None:
    builder = Path(__file__).resolve().parents[2] / "examples" / "docstrings.py"
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        subprocess.run([sys.executable, str(builder), str(path)], check=True, capture_output=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    chats = read_chats([Dataset(path=str(paths[0]))])
    assert len(chats) > 2000
    answers = {c.messages[0]["content"]: c.messages[1]["content"] for c in chats}
    answer = answers["What does `json.dumps` do?"]
    assert answer.startswith("Help on function dumps in json:\n\ndumps(obj, *, skipkeys=False,")
    assert "\n    Serialize ``obj`` to a JSON formatted ``str``.\n" in answer
    assert len(set(answers.values())) == len(chats)  # none is in both halves of a split
