"""Rows: files that are not there, damaged, of another kind; rows that are none."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ..conftest import chat
from .box import ROW, Bad, Box, Make, check, keys

HALF = (
    '{"messages": [{"role": "user", "content": "a \\ud83d"}, {"role": "assistant", "content": ""}]}'
)


def rows(content: str | bytes, name: str = "rows.jsonl", **dataset: Any) -> Make:
    """Training on a file with this content."""

    def make(box: Box) -> list[str]:
        path = box.rows(content, name)
        return box.recipe(datasets=[{"path": str(path), **dataset}], val_set_size=0)

    return make


def second(row: Any, **dataset: Any) -> Make:
    """Training on a good row and then this one."""
    return rows(f"{ROW}\n{json.dumps(row)}\n", **dataset)


def damaged_gzip() -> bytes:
    whole = gzip.compress((ROW * 50 + "\n").encode())
    return whole[:40] + b"\xff" * 20 + whole[60:]


def missing(path: str) -> Make:
    return lambda box: box.recipe(datasets=[{"path": path}])


def a_folder(box: Box) -> list[str]:
    (box.folder / "data").mkdir()
    return box.recipe(datasets=[{"path": str(box.folder / "data")}])


def a_script(box: Box) -> list[str]:
    """A folder of the kind that the datasets library once ran."""
    folder = box.folder / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text("raise SystemExit('it was run')\n")
    return box.recipe(datasets=[{"path": str(folder), "type": "chat_template"}])


def a_pipe(box: Box) -> list[str]:
    os.mkfifo(box.folder / "rows.fifo")
    return box.recipe(datasets=[{"path": str(box.folder / "rows.fifo"), "ds_type": "json"}])


def a_table(box: Box) -> list[str]:
    import pyarrow as pa
    from pyarrow import parquet

    odd = pa.Array.from_buffers(
        pa.utf8(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    parquet.write_table(pa.table({"text": odd}), box.folder / "rows.parquet")
    named = {"path": str(box.folder / "rows.parquet"), "type": "completion"}
    return box.recipe(datasets=[named], val_set_size=0)


def calls(arguments: str) -> dict[str, Any]:
    row = chat("q", "a")
    call = {"function": {"name": "f", "arguments": arguments}}
    row["messages"][1] |= {"content": "", "tool_calls": [call]}
    return row


CASES = {
    "no file": Bad(missing("no.jsonl"), "datasets.0.path", "there is no no.jsonl in"),
    "no id": Bad(missing("my rows"), "datasets.0.path", "nor a Hugging Face id"),
    "an empty file": Bad(rows(""), "rows.jsonl", "the dataset is empty"),
    "a folder without rows": Bad(a_folder, "data", "no data files are in this folder"),
    "a folder with a script": Bad(a_script, "rows", "Nothing of this folder is run"),
    "a pipe": Bad(a_pipe, "rows.fifo", "save its rows in a file first"),
    "an unknown kind": Bad(rows(ROW, "rows.dat"), "rows.dat", "Its name must end in one of .jsonl"),
    "no JSON": Bad(rows(f"{ROW}\n{{oops\n"), "rows.jsonl, line 2", "not valid JSON: Expecting"),
    "no JSON in a list": Bad(rows(f"[{ROW},\n{{]", "rows.json"), "rows.json, line 2", "not valid"),
    "nested too deep": Bad(rows("[" * 99999), "rows.jsonl, line 1", "nested too deep"),
    "a list that is nested too deep": Bad(
        rows("[" * 99999, "rows.json"), "rows.json", "nested too deep"
    ),
    "a number of 5000 digits": Bad(
        rows(f'{ROW}\n{{"n": {"1" * 5000}}}\n'), "rows.jsonl, line 2", "has too many digits"
    ),
    "half a character": Bad(
        rows(f"{ROW}\n{HALF}\n"),
        "rows.jsonl, line 2: messages.0.content is not text: character 3 is a lone surrogate",
        "(\\ud83d); replace it, or leave it out",
    ),
    "half a character in a list": Bad(
        rows(f"[{ROW}, {HALF}]", "rows.json"), "rows.json: 1.messages.0.content", "replace it"
    ),
    "half a character in an argument": Bad(
        second(calls('{"x": "\\udc00"}')),
        "rows.jsonl, line 2: message 2: the arguments of a call cannot be read: x is not text",
        "replace it",
    ),
    "a NUL in a row": Bad(
        second(chat("a\0", "b")), "line 2: messages.0.content", "character 2 is a NUL; replace it"
    ),
    "not UTF-8": Bad(rows(ROW.encode() + b"\n\xff\n"), "line 2", "it is not UTF-8 (byte 1 of the"),
    "a table that is not UTF-8": Bad(a_table, "rows.parquet", "rows 1 to 1 is not UTF-8: write"),
    "gzip with a hole": Bad(rows(damaged_gzip(), "rows.jsonl.gz"), "jsonl.gz", "copy it again"),
    "gzip without an end": Bad(
        rows(gzip.compress(ROW.encode())[:-12], "rows.jsonl.gz"), "rows.jsonl.gz", "copy it again"
    ),
    "another field": Bad(
        second({"text": "a"}), "line 2: the field 'messages'", "is the dataset's type completion?"
    ),
    "a list for a row": Bad(second([]), "line 2", "must be an object with the field 'messages'"),
    "an unknown role": Bad(
        second({"messages": [{"role": "asistant", "content": "a"}]}), "line 2: message 1", "role"
    ),
    "no such type": Bad(rows(ROW, type="alpaka"), "datasets.0.type", "did you mean alpaca"),
    "no such split": Bad(rows(ROW, split="test"), "rows.jsonl: split", "only the split 'train'"),
    "tokens that the model has not": Bad(
        lambda box: [*rows('{"input_ids": [5, 99999], "labels": [5, 99999]}\n')(box),
                     "--skip_prepare_dataset"],
        "rows.jsonl, line 1: token 2 is 99999", "prepare the rows with the tokenizer of",
    ),
    "rows that are all too long": Bad(
        lambda box: [*keys(sequence_len=4)(box)], "longer than 4 tokens", "(sequence_len)"
    ),
    "no row left": Bad(keys(val_set_size=12), "val_set_size: 12 of 12", "leaves 0 to train"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_rows_are_refused(name: str, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    check(CASES[name], box, monkeypatch)


def test_whole_characters_are_rows(box: Box) -> None:
    from ..commands import fusewright

    line = json.dumps(chat("😀 é \\ud83d", "a"))  # a backslash is a character, too
    box.rows(f"{line}\n" * 12)
    assert "\\ud83d\\ude00" in Path("rows.jsonl").read_text()
    result = fusewright(*keys(max_steps=1)(box))
    assert result.exit_code == 0, result.output


def test_a_dry_run_says_that_it_reads_no_rows(box: Box) -> None:
    """What only rows show, such as a template that leaves calls out, is for ``preprocess``."""
    from ..commands import fusewright

    _, recipe = second(calls('{"x": 1}'))(box)
    result = fusewright("train", recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    said = f"  rows were not checked: fusewright preprocess {recipe} checks them"
    assert said in result.stdout.splitlines()
    checked = fusewright("preprocess", recipe)
    assert checked.exit_code == 2
    assert "tool_calls" in checked.stderr
