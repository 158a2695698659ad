"""Answers: to one prompt, to many, from files and pipes; greedy unless a temperature is given."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusewright.errors import DataError, ModelError
from fusewright.train.data.chat.stops import unknown_stops
from fusewright.train.data.sample import Sample
from fusewright.train.inference.generate import Sampling, TextGenerator, answer
from fusewright.train.inference.load_run import load_run
from fusewright.train.inference.prompts import read_prompts
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.report.run_facts import snippet

from ..commands import fusewright, refused
from ..conftest import CHATML, chat, make_model, make_tokenizer

SHORT = ("--max_new_tokens", "6")
ENDS, OTHER = 2, 60


@pytest.fixture(scope="module")
def loaded(trained: Path) -> tuple[Any, Any]:
    return load_run(trained)


def one_after_another(model: Any, ids: list[int], count: int) -> list[int]:
    """Greedy decoding, written out."""
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class Scripted:
    """Stands in for a model: writes what it is told to, whatever it reads."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.training = True
        self.device = torch.device("cpu")
        self.generation_config = None
        self.config = make_model().config

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.train(False)

    def generate(self, input_ids: Any, generation_config: Any, streamer: Any, **_: Any) -> Any:
        ends = generation_config.eos_token_id
        written = []
        for token in self.script[: generation_config.max_new_tokens]:
            written.append(token)
            if token in ends:
                break
        if streamer is not None:
            streamer.put(input_ids)
            for token in written:
                streamer.put(torch.tensor([token]))
            streamer.end()
        answer = torch.tensor([written] * len(input_ids))
        return torch.cat([input_ids, answer], 1)


def test_greedy_is_the_likeliest_token_each_time(trained: Path, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    text = "<|im_start|>user\nWhat is 7?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written = one_after_another(model, ids, 6)[len(ids) :]
    assert ENDS not in written
    done = fusewright("generate", trained, "What is 7?", *SHORT)
    assert done.exit_code == 0, done.output
    assert done.stdout == tokenizer.decode(written, skip_special_tokens=True).strip() + "\n"
    again = objects(fusewright("generate", trained, "What is 7?", *SHORT, "--json").stdout)[0]
    assert again["answer"] == done.stdout.strip()
    assert (again["tokens"], again["finish"]) == (6, "length")
    assert again["messages"] == [{"role": "user", "content": "What is 7?"}]


def test_the_system_text_is_part_of_the_prompt(trained: Path) -> None:
    done = fusewright("generate", trained, "Hi", "--system", "Be terse.", *SHORT, "--json")
    assert objects(done.stdout)[0]["messages"] == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "Hi"},
    ]


@pytest.mark.parametrize("batch_size", ["1", "2", "8"])
def test_a_file_of_prompts_in_any_batch(
    trained: Path, tmp_path: Path, loaded: tuple[Any, Any], batch_size: str
) -> None:
    texts = ["What is 3?", "Hi", "What is the longest of all of these questions here?"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts) + "\n\n")
    options = ("--file", file, "--batch_size", batch_size, *SHORT)
    done = fusewright("generate", trained, *options, "--json")
    assert done.exit_code == 0, done.output
    rows = objects(done.stdout)
    assert [row["messages"][0]["content"] for row in rows] == texts
    writer = TextGenerator(*loaded, Sampling(6))
    for text, row in zip(texts, rows, strict=True):
        prompt = writer.prompt([{"role": "user", "content": text}])
        assert row["answer"] == "".join(writer.stream(prompt)).strip()
    plain = fusewright("generate", trained, *options).stdout
    assert plain == "".join(
        f"> {t}\n{row['answer']}\n\n" for t, row in zip(texts, rows, strict=True)
    )


def test_prompts_from_standard_input(trained: Path) -> None:
    expected = fusewright("generate", trained, "What is 7?", *SHORT).stdout
    for arguments in (["-"], []):
        done = fusewright("generate", trained, *arguments, *SHORT, stdin="What is 7?\n")
        assert done.stdout == expected


def test_drawing_needs_a_temperature_and_repeats_with_its_seed(trained: Path) -> None:
    def drawn(*more: str) -> str:
        options = ("--max_new_tokens", "12", "--temperature", "5")
        return fusewright("generate", trained, "Hi", *options, *more).stdout

    assert drawn() == drawn("--seed", "0")
    assert drawn() != drawn("--seed", "1")
    greedy = fusewright("generate", trained, "Hi", "--max_new_tokens", "12").stdout
    assert drawn("--top_k", "1") == greedy
    assert drawn("--top_p", "0.000001") == greedy
    zero = fusewright("generate", trained, "Hi", "--max_new_tokens", "12", "--temperature", "0")
    assert zero.stdout == greedy
    assert "need a temperature" in refused("generate", trained, "Hi", "--top_p", "0.5")


@pytest.mark.parametrize("ends", ["<|im_end|>", "<|pad|>"])
def test_an_answer_ends_where_its_turn_does(ends: str) -> None:
    """Also where the template's end of a turn is not the tokenizer's end of text."""
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", ends))
    end = tokenizer.convert_tokens_to_ids(ends)
    writer = TextGenerator(Scripted([OTHER, OTHER, end, OTHER]), tokenizer, Sampling(8))
    assert set(writer.stops) == {ENDS, end}
    knows = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ENDS))
    unknown = unknown_stops(knows, tokenizer, {})
    assert unknown == ([] if end == ENDS else [ENDS, end])
    for images in (False, True):  # a base does not know them, and PEFT asks the base
        code = snippet({"base_model": "a/b", "adapter": "lora"}, ".", images, unknown)
        assert code is not None
        compile(code, "snippet", "exec")
        assert ("max_new_tokens=200, eos_token_id=[2, " in code) == (end != ENDS)
        assert "eos_token_id" not in str(snippet({"base_model": "a/b"}, ".", images, unknown))
    prompt = writer.prompt([{"role": "user", "content": "Hi"}])
    text = tokenizer.decode([OTHER, OTHER])
    assert "".join(writer.stream(prompt)) == text
    (answer,) = writer.answers([prompt])
    assert (answer.text, answer.tokens, answer.finish) == (text, 3, "stop")
    writer = TextGenerator(Scripted([OTHER] * 9), tokenizer, Sampling(4))
    (answer,) = writer.answers([prompt])
    assert (answer.tokens, answer.finish) == (4, "length")


def test_the_sample_answer_of_a_run_ends_where_generate_does() -> None:
    tokenizer = make_tokenizer(CHATML.replace("<|im_end|>", "<|pad|>"))
    model = Scripted([OTHER, tokenizer.pad_token_id, OTHER, OTHER])
    recipe = Recipe(base_model="x", sample_max_tokens=4)
    state = torch.get_rng_state()
    assert answer(model, tokenizer, "Hi", recipe) == tokenizer.decode([OTHER])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)  # or training would go another way


def test_without_a_chat_template_the_text_is_continued(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    make_tokenizer(None).save_pretrained(tmp_path)
    model, tokenizer = load_run(tmp_path)
    ids = tokenizer("Once upon")["input_ids"]
    written = one_after_another(model, ids, 6)[len(ids) :]
    done = fusewright("generate", tmp_path, "Once upon", *SHORT)
    assert done.stdout.strip() == tokenizer.decode(written, skip_special_tokens=True).strip()


def test_a_stream_that_is_closed_stops_the_model(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    writer = TextGenerator(model, tokenizer, Sampling(400))
    writer.stops = []
    before = threading.active_count()
    stream = writer.stream(writer.prompt([{"role": "user", "content": "Hi"}]))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()  # waits for the thread, which would go on for 400 tokens
    assert threading.active_count() == before


def test_an_error_in_the_stream_is_raised_where_it_is_read(tokenizer: Any) -> None:
    class Broken(Scripted):
        def generate(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("out of memory")

    writer = TextGenerator(Broken([]), tokenizer, Sampling(4))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(writer.stream(Sample([1, 2, 3], [])))


def test_no_more_than_the_model_has_positions_for(trained: Path, loaded: tuple[Any, Any]) -> None:
    writer = TextGenerator(*loaded, Sampling(100))
    assert writer.room([1] * 500) == 12
    with pytest.raises(ModelError, match=r"the prompt has 6\d\d tokens, .* accepts at most 512"):
        writer.prompt([{"role": "user", "content": "x" * 600}])
    assert "accepts at most 512" in refused("generate", trained, "x" * 600)


def test_a_template_that_refuses(trained: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "strict"
    shutil.copytree(trained, folder)
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(strict + CHATML)
    said = refused("generate", folder, "Hi", "--system", "Be terse.")
    assert said == "the chat template refuses this conversation: no system"
    trips = "{% for m in messages if m.role == 'assistant' %}{{ m.content + 1 }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(trips + CHATML)  # only answers, which none asks for
    assert fusewright("generate", folder, "Hi", "--max-new-tokens", "2").exit_code == 0


def test_kinds_of_prompts(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    user = [{"role": "user", "content": "q"}]
    rows = ["q", {"prompt": "q"}, {"prompt": user}, {"messages": user}, chat("q", "answered")]
    file.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(file) == [user] * len(rows)
    text = tmp_path / "p.txt"
    text.write_text("q\n\nq\n")
    assert read_prompts(text, "s") == [[{"role": "system", "content": "s"}, *user]] * 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{oops", "line 1: not valid JSON: "),
        ("5", "line 1: must be a text"),
        ("{}", "line 1: must be a text"),
        ('{"messages": []}', "line 1: must be a text"),
        ('{"messages": [{"role": "user"}]}', "line 1: must be a text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "line 1: it ends with an answer"),
        ("", "the file has no prompts"),
    ],
)
def test_bad_prompts(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(line)
    with pytest.raises(DataError, match=rf"p\.jsonl(, |: ){said}"):
        read_prompts(file)


def test_what_is_refused(trained: Path, tmp_path: Path) -> None:
    assert "cannot be read" in refused("generate", trained, "--file", tmp_path / "no.jsonl")
    assert "not both" in refused("generate", trained, "Hi", "--file", tmp_path / "no.jsonl")
    assert "there is no prompt" in refused("generate", trained)
