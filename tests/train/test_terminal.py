"""What acts on a terminal is shown, not sent, wherever foreign words are printed; and secrets."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fusewright.errors import RecipeError
from fusewright.train import dry_run as dryrun
from fusewright.train import train
from fusewright.train.data.preview import show
from fusewright.train.data.sample import Sample
from fusewright.train.inference.generate import ChatSession, generate
from fusewright.train.inference.run_folder import open_run
from fusewright.train.printable import shown, shown_json
from fusewright.train.processing import Processing
from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.secret_values import hide, scrub
from fusewright.train.report.result import RunLog, RunResult
from fusewright.train.terminal import Terminal, announce, say

from .commands import fusewright
from .conftest import chat, make_tokenizer

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\u202e"
ACTING = ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\x7f", "\r", "\u202e")
SECRET = "hf_" + "aB3" * 12


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal() -> Terminal:
    return Terminal(file=Tty(), force_terminal=True, width=200)


def sent(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def harmless(text: str) -> bool:
    return not any(sign in text for sign in ACTING)


def test_characters_are_written_as_one_would_write_them() -> None:
    assert shown("a\tb\nc é 好 🙂") == "a\tb\nc é 好 🙂"
    assert shown("\x1b[0m\x9b\u202e") == r"\x1b[0m\x9b\u202e"
    assert json.loads(shown_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL
    assert harmless(shown_json(json.dumps(EVIL, ensure_ascii=False)))


def test_a_terminal_sends_its_own_escapes_only() -> None:
    console = terminal()
    console.print(EVIL, highlight=False)
    console.out(EVIL)
    table = Table(EVIL)
    table.add_row(EVIL)
    console.print("[bold red]own[/]", table)
    with Progress(console=console) as bars:
        bars.add_task(EVIL, total=1)
    text = sent(console)
    assert "\x1b[1;31mown" in text
    assert r"\x1b]0;owned" in text
    assert "\x1b]" not in text
    assert "\x9b" not in text


def test_a_foreign_console_gets_lines_that_do_nothing() -> None:
    console = Console(file=Tty(), force_terminal=True, width=200)
    say(console, f"{EVIL} {SECRET}")
    assert harmless(sent(console))
    assert SECRET not in sent(console)


def test_rows_are_looked_at_without_acting() -> None:
    tokenizer, console = make_tokenizer(), terminal()
    ids = tokenizer(EVIL)["input_ids"]
    show([Sample(ids, ids)], tokenizer, console)
    assert "\x1b]" not in sent(console)
    assert "\x07" not in sent(console)


def test_a_recipe_is_looked_at_without_acting(recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**recipe, "sample_prompt": EVIL}), encoding="utf-8")
    console = terminal()
    dryrun.show(check(path), console)
    assert "\x1b]" not in sent(console)
    assert "\x07" not in sent(console)


def test_an_error_message_does_not_act(tmp_path: Path) -> None:
    path = tmp_path / f"{EVIL}.yaml"
    path.write_text("{", encoding="utf-8")
    said = fusewright("train", str(path)).stderr
    assert r"\x1b]0;owned\x07" in said
    assert harmless(said)
    assert harmless(fusewright("generate", str(tmp_path / EVIL), "hello").stderr)


def test_a_run_prints_nothing_that_acts(recipe: dict[str, Any], rows: Path) -> None:
    with rows.open("a", encoding="utf-8") as file:
        file.write(json.dumps(chat(EVIL, EVIL)) + "\n")
    console = terminal()
    result = train({**recipe, "sample_prompt": EVIL}, console=console)
    assert result.status == "finished"
    text = sent(console)
    assert r"\x1b]0;owned\x07" in text
    assert "\x1b]" not in text
    assert "\x9b" not in text


class Echo:
    """A writer whose answers are evil."""

    chats = True

    def __init__(self, *_: Any) -> None:
        pass

    def prompt(self, messages: Any) -> list[int]:
        return [1]

    def stream(self, prompt: Any) -> Any:
        yield from EVIL  # an escape in pieces


def test_answers_do_not_act(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Tty()
    ChatSession(Echo(), stdin=Tty(f"hello\n/{EVIL}\n/save /no/{EVIL}\n"), stdout=out).terminal  # noqa: B018
    talk = ChatSession(Echo(), stdin=Tty(), stdout=out)  # type: ignore[arg-type]
    for line in ("hello", f"/{EVIL}", f"/save /no/{EVIL}"):
        talk._react(line)
    assert r"\x1b]0;owned\x07" in out.getvalue()
    assert harmless(out.getvalue())
    from fusewright.train.inference import generate as command

    monkeypatch.setattr(command, "load_to_answer", lambda *_: (None, Processing(None)))
    monkeypatch.setattr(command, "TextGenerator", Echo)
    out = Tty()
    generate(open_run(run_folder), [[{"role": "user", "content": "a"}]], None, out=out)  # type: ignore[arg-type]
    assert r"\x1b]0;owned\x07" in out.getvalue()
    assert harmless(out.getvalue())


# --- wrapping -------------------------------------------------------------------------------------

SENTENCE = "the adapter of that step is in /a/folder/whose/name/is/longer/than/a/narrow/line/" + (
    "adapter_model.safetensors, and the configuration of the tokenizer is beside it"
)


@pytest.mark.parametrize("width", [40, 60, 200])
@pytest.mark.parametrize("kind", [Console, Terminal])
def test_words_are_not_broken(kind: type[Console], width: int) -> None:
    console = kind(file=Tty(), force_terminal=True, width=width)
    say(console, SENTENCE)
    for line in sent(console).splitlines():
        assert len(line) <= width or " " not in line.strip()
        assert set(line.split()) <= set(SENTENCE.split())


@pytest.mark.parametrize("width", [40, 60, 200])
def test_words_of_tables_are_not_broken(width: int) -> None:
    table = Table("name", "text")
    table.add_row(*SENTENCE.split(maxsplit=1))
    console = Terminal(file=Tty(), force_terminal=True, width=width, color_system=None)
    console.print(table)
    assert set(SENTENCE.split()) <= set(sent(console).split())


def test_a_table_that_is_too_wide_keeps_its_first_columns_aligned() -> None:
    table = Table("key", "status", "value")
    table.columns[2].no_wrap = True
    table.add_row("bf16", "honoured", "auto")
    table.add_row("fsdp", "", "")
    table.add_row("lora_target_modules", "unset", "word " * 20)
    console = Terminal(file=Tty(), force_terminal=True, width=60, color_system=None)
    console.print(table)
    lines = sent(console).splitlines()
    assert lines[:3] == [
        f"{'key':21}{'status':10}value",
        f"{'bf16':21}{'honoured':10}auto",
        "fsdp",
    ]
    assert lines[3].startswith("lora_target_modules  unset     word word")


def test_nothing_is_wrapped_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    console = Terminal(file=io.StringIO())
    say(console, SENTENCE)
    console.print(SENTENCE)
    table = Table(SENTENCE)
    table.add_row(SENTENCE)
    console.print(table)
    assert sent(console).count(f"{SENTENCE}\n") == 2
    assert sent(console).count(SENTENCE) == 4


def test_an_error_is_wrapped_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.cli.main import _say

    monkeypatch.setenv("COLUMNS", "60")
    for stream, lines in ((Tty(), 3), (io.StringIO(), 1)):
        monkeypatch.setattr("sys.stderr", stream)
        _say(SENTENCE)
        said = stream.getvalue()
        assert said.count("\n") == lines
        assert said.split() == ["fusewright:", *SENTENCE.split()]


# --- waiting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [Tty(), io.StringIO()])
def test_waits_are_announced_apart_from_results(
    stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    announce("loading x")
    assert stream.getvalue() == "loading x\n"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [("generate", "RUN", "Hi"), ("chat", "RUN"), ("eval", "RUN")])
def test_commands_say_what_they_load(
    words: tuple[str, ...], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    def stop(text: str) -> None:
        raise Enough(text)

    monkeypatch.setattr("fusewright.cli.commands.announce", stop)
    done = fusewright(*(str(run_folder) if word == "RUN" else word for word in words))
    assert f"Enough: loading {run_folder}" in done.stderr


def test_a_dry_run_says_what_it_waits_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    monkeypatch.setattr(sys.modules["fusewright.cli.main"], "announce", waits.append)
    (tmp_path / "recipe.yaml").write_text("base_model: a/b\ndatasets: [{path: a/b}]\nrl: ebft\n")
    assert fusewright("train", tmp_path / "recipe.yaml", "--dry-run").exit_code == 2
    assert waits == ["importing PyTorch and transformers"]


# --- secrets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"hf_use_auth_token": SECRET},
        {"hf_use_auth_token": "not-like-any-token"},
        {"comet_api_key": ["not-like-any-token"]},
        {"special_tokens": {"api_key": "not-like-any-token"}},
        {"comet_experiment_config": 7, "mlflow_tracking_uri": ["https://me:pass@host/x"]},
        {"lora_r": SECRET},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_a_message_does_not_tell_a_secret(keys: dict[str, Any], recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({**recipe, **keys})
    for secret in (SECRET, "not-like-any-token", "me:pass"):
        assert secret not in str(caught.value)
    assert next(iter(keys)) in str(caught.value)


def test_what_looks_like_a_secret_is_hidden_in_any_text(tmp_path: Path) -> None:
    text = f"401 for https://me:pass@hub/x with {SECRET}; and sk-{'x' * 30}"
    assert scrub(text) == "401 for https://(hidden)@hub/x with (hidden); and (hidden)"
    assert scrub("hf_hub, sk-learn, https://hub/a:b@c") == "hf_hub, sk-learn, https://hub/a:b@c"
    assert hide({"wandb_name": f"run {SECRET}"}) == {"wandb_name": "run (hidden)"}
    result = RunResult(output_dir=tmp_path, recipe={})
    with RunLog(result, Console(quiet=True)).guarded("push to the hub"):
        raise RuntimeError(text)
    result.write()
    assert SECRET not in (tmp_path / "run.json").read_text()


# --- JSON that readers take differently -----------------------------------------------------------

TWICE = '{"messages": [], "messages": [{"role": "user", "content": "a"}]}'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", json.dumps(chat("a", "b")) + "\n" + TWICE, ", line 2: the key 'messages' is"),
        ("a.json", f"[{json.dumps(chat('a', 'b'))},\n {TWICE}]", ", row 2: the key 'messages' is"),
        ("a.jsonl", '{"messages": [{"role": "a", "role": "b"}]}', ", line 1: the key 'role' is"),
        ("a.txt", "one\ntwo\0\n", ", line 2: text is not text: character 4 is a NUL"),
        ("a.csv", "text,b\nx,y\nx\0,y\n", "row 2: text is not text: character 2 is a NUL"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a\\u0000"}]}', "is a NUL"),
    ],
)
def test_rows_with_two_meanings_are_refused(
    name: str, text: str, said: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    kind = "chat_template" if "json" in name else "completion"
    asked = {**recipe, "datasets": [{"path": str(tmp_path / name), "type": kind}]}
    with pytest.raises(Exception, match=r"is duplicated|is a NUL") as caught:
        train(asked, console=Console(quiet=True))
    assert said in str(caught.value)


def test_a_table_with_a_nul_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a", "b", "c\0"]}), tmp_path / "a.parquet")
    asked = {**recipe, "datasets": [{"path": str(tmp_path / "a.parquet"), "type": "completion"}]}
    with pytest.raises(Exception, match=r"row 3: text is not text: character 2 is a NUL"):
        train(asked, console=Console(quiet=True))


def test_a_folder_whose_files_have_two_meanings(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"recipe": {}, "recipe": {"base_model": "x"}}')
    said = fusewright("generate", str(tmp_path), "hello").stderr
    assert "run.json cannot be read: the key 'recipe' is duplicated" in said


def test_a_table_in_a_file_has_no_spaces_at_the_ends_of_its_lines() -> None:
    file = io.StringIO()
    table = Table("key", "value", box=None)
    table.add_row("short", "x")
    table.add_row("long", "word " * 300)
    Terminal(file=file).print(table)
    lines = file.getvalue().splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    assert max(len(line) for line in lines if "short" in line) < 40
