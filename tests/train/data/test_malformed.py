"""Datasets with one mistake each: one clear message with its place, exit 2, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..commands import complaint, fusewright, snapshot
from ..conftest import CHATML, chat, make_tokenizer

GOOD = json.dumps(chat("q", "a"))


def text(content: str, name: str = "rows.jsonl", **keys: Any) -> Callable[[Path], dict[str, Any]]:
    """A recipe whose dataset is a file with this content."""

    def write(folder: Path) -> dict[str, Any]:
        (folder / name).write_text(content, encoding="utf-8")
        return {"datasets": [{"path": str(folder / name), **keys}]}

    return write


def row(value: Any, **keys: Any) -> Callable[[Path], dict[str, Any]]:
    """A good row, and then this one."""
    return text(f"{GOOD}\n{json.dumps(value)}\n", **keys)


def only(value: Any, **keys: Any) -> Callable[[Path], dict[str, Any]]:
    """This row alone."""
    return text(json.dumps(value) + "\n", **keys)


def binary(name: str, content: bytes, **keys: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / name).write_bytes(content)
        return {"datasets": [{"path": str(folder / name), **keys}]}

    return write


def turn(**changes: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": "a", **changes}
    return {"messages": [{"role": "user", "content": "q"}, message]}


def recipe(**keys: Any) -> Callable[[Path], dict[str, Any]]:
    """Good rows, and these keys of the recipe."""
    return lambda folder: {**text(f"{GOOD}\n" * 5)(folder), **keys}


def base(change: Callable[[Any], None]) -> Callable[[Path], dict[str, Any]]:
    """Good rows, and a tokenizer that has been changed."""

    def write(folder: Path) -> dict[str, Any]:
        tokenizer = make_tokenizer()
        change(tokenizer)
        tokenizer.save_pretrained(folder / "base")
        (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
        return {**text(GOOD)(folder), "base_model": str(folder / "base")}

    return write


def folder_with(*names: str, **keys: Any) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "data").mkdir()
        for name in names:
            (folder / "data" / name).write_text("nothing")
        return {"datasets": [{"path": str(folder / "data"), **keys}]}

    return write


def builder(code: str) -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "make.py").write_text(code)
        made = {"path": str(folder / "made.jsonl"), "builder": str(folder / "make.py")}
        return {"datasets": [made]}

    return write


def _no_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None


def _late_end(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '\n###\n<|im_end|>' }}"
        "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    )


def _no_end(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "# ")


def _refusing(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"


def _broken(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content }"


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    # --- files ---
    "not JSON": (text(f"{GOOD}\n{{oops\n"), "rows.jsonl, line 2: not valid JSON: Expecting prop"),
    "a list that is cut": (text(f"[{GOOD},"), "that is one JSON array is to be named .json"),
    "not JSON, as one list": (text("[{]", "rows.json"), "rows.json, line 1: not valid JSON"),
    "JSON that is no list": (text('{"a": 1}', "rows.json"), "rows.json: must be a list of rows"),
    "no rows": (text(""), "rows.jsonl: the dataset is empty"),
    "only blank lines": (text(" \n\n"), "rows.jsonl: the dataset is empty"),
    "wrong encoding": (
        binary("rows.jsonl", GOOD.encode() + b"\n\xff\xfe\n"),
        "rows.jsonl, line 2: cannot be read: it is not UTF-8 (byte 1 of the line",
    ),
    "unknown suffix": (text(GOOD, "rows.dat"), "what kind of file is this? Its name must end in"),
    "damaged Parquet": (binary("rows.parquet", b"PAR1 no"), "rows.parquet: not a Parquet file, or"),
    "damaged Arrow": (binary("rows.arrow", b"ARROW1 no"), "rows.arrow: not an Arrow file, or"),
    "damaged gzip": (binary("rows.jsonl.gz", b"\x1f\x8b no"), "rows.jsonl.gz: cannot be read"),
    "ragged CSV": (
        text("prompt,completion\na,b\nc\n", "rows.csv", type="prompt_completion"),
        "rows.csv: not valid CSV: Row #3: Expected 2 columns, got 1: c",
    ),
    "CSV without a header": (
        text("what?,that\n", "rows.csv", type="prompt_completion"), "the dataset is empty",
    ),
    "CSV with another header": (
        text("a,b\nwhat?,that\n", "rows.csv", type="prompt_completion"),
        "rows.csv, row 1: the field 'prompt' is missing (the row has 'a', 'b')",
    ),
    "CSV with the same name twice": (
        text("prompt,prompt\na,b\n", "rows.csv", type="prompt_completion"),
        "rows.csv, line 1: must name the columns, each differently",
    ),
    "a folder without data": (folder_with("readme"), "data: no data files are in this folder"),
    "a file that the folder lacks": (
        folder_with("a.jsonl", data_files="b.jsonl"), "data_files: there is no b.jsonl in this",
    ),
    "a damaged saved dataset": (folder_with("state.json"), "data: cannot be read by datasets"),
    "a split of a file": (text(GOOD, split="test"), "a file has only the split 'train', not 'tes"),
    "a split that is none": (text(GOOD, split="train["), "'train[' is not a split; write train, "),
    "a builder that fails": (
        builder("raise SystemExit('no disk')"), "did not build",
    ),
    # --- rows ---
    "a list for a row": (row([]), "line 2: must be an object with the field 'messages', not a lis"),
    "another field": (
        row({"text": "a"}),
        "line 2: the field 'messages' is missing (the row has 'text'); is the dataset's type "
        "completion?",
    ),
    "no messages": (row({"messages": []}), "line 2: the field 'messages' must be a list of messag"),
    "text for messages": (row({"messages": "hi"}), "line 2: the field 'messages' must be a list o"),
    "text for a message": (row({"messages": ["hi"]}), "message 1 must be an object with the field"),
    "no role": (row({"messages": [{"content": "a"}]}), "message 1 needs the field 'role', with te"),
    "an unknown role": (row(turn(role="asistant")), "message 2 has the role 'asistant', which is"),
    "no content": (row(turn(content=None)), "line 2: message 2 needs the field 'content', with te"),
    "a number for content": (row(turn(content=5)), "needs the field 'content', with text in it, n"),
    "an image": (
        row(turn(content=[{"type": "image", "url": "x"}])),
        "line 2: the row has an image, and the model reads text only: leave images out",
    ),
    "a video": (
        row(turn(content=[{"type": "video", "url": "x"}])),
        "message 2 has a part of type 'video' in 'content'; only text and images are trained",
    ),
    "no assistant": (
        row({"messages": [{"role": "user", "content": "a"}]}),
        "line 2: no message has the role 'assistant' (only user)",
    ),
    "tools that are none": (row({**turn(), "tools": "{"}), "the field 'tools' is not valid JSON"),
    "calls that are none": (row(turn(tool_calls="x")), "'tool_calls' is not valid JSON: Expecting"),
    "calls of two meanings": (
        row(turn(tool_calls='[{"name": "f", "name": "g"}]')),
        "the field 'tool_calls' cannot be read: the key 'name' is duplicated",
    ),
    "a flag that is none": (
        row(turn(train="yes"), message_field_training="train"),
        "line 2: message 2, field 'train': must be true or false, not 'yes'",
    ),
    "ranges that are none": (
        row(turn(train=[1]), message_field_training_detail="train"),
        "message 2, field 'train': must be a list of {begin_offset, end_offset, train}",
    ),
    "no instruction": (
        only({"output": "a"}, type="alpaca"),
        "line 1: the field 'instruction' is missing (the row has 'output')",
    ),
    "a number for an answer": (
        only({"instruction": "a", "output": 3}, type="alpaca"),
        "line 1: the field 'output' must be text, not a number",
    ),
    "neither column": (
        only({"a": "b"}, type="prompt_completion"), "line 1: the field 'prompt' is missing (the ro",
    ),
    "columns of two kinds": (
        only({"prompt": "a", "completion": []}, type="prompt_completion"),
        "must both be text, or both lists of messages, not text and a list",
    ),
    "segments without labels": (
        only({"segments": [{"text": "a"}]}, type="input_output"),
        "line 1: segment 1 needs the fields 'text', with text in it, and 'label'",
    ),
    "text for a text": (only({"text": ["a"]}, type="completion"), "'text' must be text, not a lis"),
    "labels that are no tokens": (
        lambda folder: {
            **only({"input_ids": [1, 2], "labels": [-100, 3]})(folder),
            "skip_prepare_dataset": True,
        },
        "line 1: label 2 must be its token, 2, or -100, not 3",
    ),
    # --- recipes that ask for what is not there ---
    "an unknown type": (text(GOOD, type="alpaka"), "'alpaka' is not a type of rows; did you mean"),
    "an unknown template": (
        recipe(chat_template="lama3"), "there is no template 'lama3' here; did you mean llama3?",
    ),
    "all rows are too long": (
        recipe(sequence_len=8), "no row is left to train on: of 5, 5 are longer than 8 tokens",
    ),
    "all rows are too short": (
        recipe(min_sample_len=100), "of 5, 5 are shorter than 100 tokens (min_sample_len); lower"
    ),
    "a row is too long": (
        recipe(sequence_len=8, excess_length_strategy="raise"), "line 1: 23 tokens, and sequence_l",
    ),
    "nothing to train": (
        only(turn(train=False), message_field_training="train"), "of 1, 1 have nothing to train",
    ),
    "nothing left to train on": (
        recipe(val_set_size=5),
        "val_set_size: 5 of 5 rows leaves 0 to train on and 5 to validate on; set "
        "val_set_size to a number of rows from 1 to 4, to a share below 1, or to 0",
    ),
    "an end that is no token": (recipe(eot_tokens=["<|nope|>"]), "eot_tokens: '<|nope|>' is 8 tok"),
    "an end that is never trained": (
        recipe(eot_tokens=["<|pad|>"]), "no row trains '<|pad|>', the token that should end",
    ),
    # --- tokenizers and templates ---
    "no template": (base(_no_template), "has no chat template; name one with chat_template, for"),
    "a template that is no Jinja": (base(_broken), "chat_template: line 2 of it is not valid Jinj"),
    "a template that refuses": (base(_refusing), "line 1: the chat template refuses this conversa"),
    "an end outside of the marks": (
        base(_late_end), "no row trains '<|im_end|>', the token that follows answers",
    ),
    "a template without ends": (
        base(_no_end), "no row trains '<|im_end|>', the token that should end answers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_malformed(
    name: str, base_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = CASES[name]
    monkeypatch.chdir(tmp_path)
    keys = {
        "base_model": str(base_model),
        "output_dir": "out",
        "sequence_len": 64,
        **make(tmp_path),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    before = snapshot(tmp_path)
    result = fusewright("preprocess", str(path), "--allow-builders")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert said in complaint(result)
    assert complaint(result).count("\n") == 1
    assert "Traceback" not in result.output
    after = snapshot(tmp_path)
    assert {k: v for k, v in after.items() if "__pycache__" not in k} == before
    assert not (tmp_path / "last_run_prepared").exists()


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer; nothing here gets as far as the weights."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
