"""A trained model is asked as it was trained: same template variables, same system text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaForCausalLM

from fusewright.train import train
from fusewright.train.model.tokenizer import ChatPrompt
from fusewright.train.report.run_facts import snippet

from ..commands import fusewright
from ..conftest import CHATML, chat, make_tokenizer, small_recipe, write_rows

TEMPLATE = "{{ 'mode: ' + mode + '\n' }}" + CHATML
"""Refuses to be rendered without the variable."""

BEGINS, SYSTEM = "mode: terse\n", "Answer like a sailor."


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def asked(question: str, system: str | None = SYSTEM) -> str:
    spoken = turn("system", system) if system else ""
    return BEGINS + spoken + turn("user", question) + "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def prompts() -> Iterator[list[str]]:
    """What models are asked, whoever asks."""
    heard: list[str] = []

    def generate(model: Any, **options: Any) -> Any:
        heard.append(make_tokenizer().decode(options["input_ids"][0]))
        return original(model, **options)

    original: Callable[..., Any] = LlamaForCausalLM.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "generate", generate)
        yield heard


@pytest.fixture(scope="module")
def folder(base: Path, prompts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run with both keys; ``prompts`` has its two questions."""
    folder = tmp_path_factory.mktemp("asked")
    lines = [chat(f"What is {i}?", f"It is the number {i}.") for i in range(16)]
    rows = write_rows(folder / "rows.jsonl", lines)
    recipe = {
        **small_recipe(base, rows, folder / "out"),
        "chat_template_jinja": TEMPLATE,
        "chat_template_kwargs": {"mode": "terse"},
        "default_system_message": SYSTEM,
        "sample_prompt": "Where to?",
        "sample_max_tokens": 3,
        "max_steps": 1,
    }
    train(recipe, console=Console(quiet=True))
    return folder / "out"


def test_before_and_after_training(folder: Path, prompts: list[str]) -> None:
    assert prompts[:2] == [asked("Where to?")] * 2


@pytest.mark.parametrize(
    ("options", "system"),
    [((), SYSTEM), (("--system", "Be kind."), "Be kind."), (("--system", ""), None)],
)
def test_generate(
    folder: Path, prompts: list[str], options: tuple[str, ...], system: str | None
) -> None:
    done = fusewright("generate", folder, "Hi", "--max_new_tokens", "3", "--json", *options)
    assert done.exit_code == 0, done.output
    assert prompts[-1] == asked("Hi", system)
    roles = [message["role"] for message in json.loads(done.stdout)["messages"]]
    assert roles == (["system", "user"] if system else ["user"])


def test_a_file_keeps_the_system_texts_that_it_has(
    folder: Path, prompts: list[str], tmp_path: Path
) -> None:
    own = {"messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "A"}]}
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{json.dumps(own)}\n{{"prompt": "B"}}\n', encoding="utf-8")
    options = ("--file", file, "--batch_size", "1", "--max_new_tokens", "3")
    done = fusewright("generate", folder, *options)
    assert done.exit_code == 0, done.output
    assert prompts[-2:] == [asked("A", "Own."), asked("B")]


def test_chat(folder: Path, prompts: list[str]) -> None:
    said = "one\n/reset\n/system\ntwo\n/reset\n/system Be kind.\nthree\n"
    done = fusewright("chat", folder, "--max_new_tokens", "3", stdin=said)
    assert done.exit_code == 0, done.output
    assert prompts[-3:] == [asked("one"), asked("two", None), asked("three", "Be kind.")]
    done = fusewright("chat", folder, "--max_new_tokens", "3", "--system", "Hm.", stdin="four\n")
    assert prompts[-1] == asked("four", "Hm.")


def test_the_code_that_report_and_card_show(folder: Path, prompts: list[str]) -> None:
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    recipe, stops = record["recipe"], record["stop_tokens"]
    exec(snippet(recipe, str(folder)), {"print": lambda text: None})
    assert prompts[-1] == asked("Your question")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert snippet(recipe, ".", stops=stops) in card
    assert "mode=&#39;terse&#39;" in (folder / "report.html").read_text(encoding="utf-8")


def test_names_that_are_no_arguments_are_written_as_a_mapping() -> None:
    code = snippet({"chat_template_kwargs": {"no-think": True, "class": "a"}}, "out")
    compile(code, "snippet", "exec")
    assert "**{'no-think': True, 'class': 'a'}" in code


@pytest.mark.parametrize(
    ("rows", "used"),
    [
        ([{"type": "chat_template"}], True),
        ([{"path": "a"}], True),
        ([{"type": "sharegpt.load"}], True),
        ([{"type": "chat_template", "drop_system_message": True}], False),
        ([{"type": "alpaca"}, {"type": {"field": "text"}}], False),
        ([{"type": "completion"}, {"type": "chat_template"}], True),
        ("odd", False),
    ],
)
def test_the_system_text_is_that_of_rows_which_get_it(rows: Any, used: bool) -> None:
    recipe = {"default_system_message": SYSTEM, "datasets": rows}
    assert ChatPrompt.of(recipe).system == (SYSTEM if used else None)
    assert len(ChatPrompt.of(recipe).question("Hi")) == 1 + used


def test_a_run_without_these_keys_is_asked_as_it_is() -> None:
    assert ChatPrompt.of({}) == ChatPrompt.of({"chat_template_kwargs": "odd"}) == ChatPrompt()
    assert "chat_template" not in snippet({}, "out").replace("apply_chat_template", "")
