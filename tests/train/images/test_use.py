"""Images in what a run is used for: answers, chats, figures, pages, cards and saved folders."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from rich.console import Console

from fusewright.errors import DataError, ModelError, RecipeError
from fusewright.train import train
from fusewright.train.data.images.picture import Gallery, thumbnail
from fusewright.train.data.images.reading import featurizer_of
from fusewright.train.inference.generate import ChatSession, Sampling, TextGenerator
from fusewright.train.inference.load_run import load_to_answer
from fusewright.train.inference.prompts import read_prompts, text_of, user_message
from fusewright.train.inference.run_folder import open_run
from fusewright.train.inference.run_recipe import recipe_for
from fusewright.train.report import model_card as card
from fusewright.train.report import page
from fusewright.train.report.run_facts import Facts, snippet

from ..commands import fusewright, refused
from ..conftest import write_rows
from .families import FAMILIES

SHORT = ("--max_new_tokens", "5")
COLOURS = ("red", "green", "blue")
BRIEF = {"qwen2_5_vl", "gemma3", "smolvlm"}
"""Families that are tested by default: positions by rows and columns, a mask of images, parts."""


def draw(path: Path, colour: str = "red", size: tuple[int, int] = (40, 24)) -> Path:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle([6, 6, 18, 18], fill=colour)
    image.save(path)
    return path


def row(path: str, colour: str) -> dict[str, Any]:
    asked = [{"type": "image", "path": path}, {"type": "text", "text": "color?"}]
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": colour}]
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, ``model``; drawings; rows; and a run on them, ``out``."""
    folder = tmp_path_factory.mktemp("images")
    FAMILIES["qwen2_5_vl"].save(folder / "model")
    rows = []
    for i in range(12):
        draw(folder / f"{i}.png", COLOURS[i % 3], (24 + 8 * (i % 3), 40))
        rows.append(row(f"{i}.png", COLOURS[i % 3]))
    rows.append({"messages": [{"role": "user", "content": "hi"},
                              {"role": "assistant", "content": "hello"}]})  # fmt: skip
    recipe = {
        "base_model": str(folder / "model"), "bf16": False, "adapter": "lora", "lora_r": 4,
        "lora_target_linear": True, "datasets": [{"path": str(write_rows(folder / "r.jsonl", rows)),
                                                  "type": "chat_template"}],
        "val_set_size": 4, "sequence_len": 512, "micro_batch_size": 2, "max_steps": 2,
        "learning_rate": 1e-2, "optimize": False, "audit": False, "image_max_pixels": 800,
        "sample_prompt": "color?", "sample_image": str(folder / "0.png"), "sample_max_tokens": 4,
        "output_dir": str(folder / "out"),
    }  # fmt: skip
    result = train(recipe, console=Console(quiet=True))
    assert result.status == "finished"
    assert result.problems == []
    return folder


@pytest.fixture(scope="module")
def writer(place: Path) -> TextGenerator:
    return made_writer(place / "out")


def made_writer(folder: Path, count: int = 5) -> TextGenerator:
    run = open_run(folder)
    model, processing = load_to_answer(run, images=True)
    reads = featurizer_of(recipe_for(run), processing)
    assert reads is not None
    return TextGenerator(model, processing.tokenizer, Sampling(count), None, reads)


def expected(model: Any, processor: Any, messages: list[Any], count: int = 5) -> str:
    """The answer by plain transformers."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
    )
    ends = [token for token in (processor.tokenizer.convert_tokens_to_ids("<|im_end|>"),
                                processor.tokenizer.eos_token_id) if token is not None]  # fmt: skip
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=ends)
    text: str = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- answers -------------------------------------------------------------------------------------


def test_an_answer_about_an_image_is_that_of_plain_transformers(place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    base = AutoModelForImageTextToText.from_pretrained(place / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, place / "out").eval()
    processor = AutoProcessor.from_pretrained(place / "model")
    small = place / "small.png"
    with Image.open(place / "1.png") as image:
        width, height = image.size
        image.resize((width * 20 // 32, height * 20 // 32)).save(small)  # within image_max_pixels
    said = {}
    for name in ("small.png", "0.png"):
        path = str(place / name)
        done = fusewright("generate", place / "out", "color?", "--image", path, *SHORT)
        assert done.exit_code == 0, done.output
        said[name] = done.stdout.strip()
    (one,) = objects(
        fusewright("generate", place / "out", "color?", "--image", small, *SHORT, "--json").stdout
    )
    assert one["messages"] == [user_message("color?", [str(small)])]
    assert one["answer"] == said["small.png"]
    assert said["small.png"] == expected(model, processor, one["messages"])


@pytest.mark.long(*(FAMILIES.keys() - BRIEF))
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_in_a_batch_are_answered_as_alone(family: str, tmp_path: Path) -> None:
    """With none, one and two images, on the left of which is padding; as plain transformers."""
    from transformers import AutoProcessor

    folder = FAMILIES[family].save(tmp_path / "model")
    paths = [str(draw(tmp_path / f"{c}.png", c, (40, 24 + 8 * i))) for i, c in enumerate(COLOURS)]
    writer = made_writer(folder)
    conversations = [
        [user_message("hello there, what is this?")],
        [user_message("color?", paths[:1])],
        [user_message("and these?", paths[1:])],
    ]
    prompts = [writer.prompt(messages) for messages in conversations]
    together = [answer.text for answer in writer.answers(prompts)]
    alone = ["".join(writer.stream(prompt)).strip() for prompt in prompts]
    assert together == alone
    processor = AutoProcessor.from_pretrained(folder)
    model = writer.model.float()
    writer = TextGenerator(model, writer.tokenizer, Sampling(5), None, writer.images)
    for messages in conversations[1:]:
        (answer,) = writer.answers([writer.prompt(messages)])
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_tensors="pt",
            return_dict=True,
        )  # fmt: skip
        assert writer.prompt(messages).input_ids == inputs["input_ids"][0].tolist()
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, eos_token_id=writer.stops,
            pad_token_id=writer.tokenizer.pad_token_id,
        )  # fmt: skip
        assert answer == writer._answer(out[0, inputs["input_ids"].shape[1] :].tolist())


def test_a_file_of_prompts_has_the_shapes_of_training_rows(place: Path) -> None:
    encoded = base64.b64encode((place / "2.png").read_bytes()).decode()
    rows: list[Any] = [
        row("0.png", "red"),  # the last answer is not given
        {"messages": [{"role": "user", "content": "a <image> b"}], "images": ["1.png"]},
        {"conversations": [{"from": "human", "value": "<image>color?"}], "image": "1.png"},
        {"prompt": "color?", "images": [{"bytes": encoded}]},
        {"prompt": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
            {"type": "text", "text": "color?"}]}]},
        "no image",
    ]  # fmt: skip
    file = write_rows(place / "prompts.jsonl", rows)
    prompts = read_prompts(file, "S", Gallery(place, place / "copies"))
    system = {"role": "system", "content": "S"}
    assert all(messages[0] == system for messages in prompts)
    first, second = str(place / "0.png"), str(place / "1.png")
    assert prompts[0] == [system, user_message("color?", [first])]
    assert prompts[1][1]["content"] == [
        {"type": "text", "text": "a "}, {"type": "image", "path": second},
        {"type": "text", "text": " b"},
    ]  # fmt: skip
    assert prompts[2][1] == user_message("color?", [second])
    assert prompts[3] == prompts[4]
    copy = Path(prompts[3][1]["content"][0]["path"])
    assert copy.read_bytes() == (place / "2.png").read_bytes()
    assert prompts[5] == [system, user_message("no image")]
    assert text_of(prompts[0][1]) == "<image: 0.png> color?"
    done = fusewright("generate", place / "out", "--file", file, *SHORT)
    assert done.exit_code == 0, done.output
    assert [line for line in done.stdout.splitlines() if line.startswith("> ")] == [
        "> <image: 0.png> color?", "> <image: 1.png> a b", "> <image: 1.png> color?",
        f"> <image: {copy.name}> color?", f"> <image: {copy.name}> color?", "> no image",
    ]  # fmt: skip


def test_images_that_cannot_be_read_are_refused_in_a_line(place: Path, tmp_path: Path) -> None:
    out, missing = place / "out", tmp_path / "no.png"
    (tmp_path / "bad.png").write_bytes((place / "0.png").read_bytes()[:60])
    for path, words in (
        (missing, f"--image: {missing}: file not found"),
        (tmp_path / "bad.png", "is damaged or cut off"),
        (tmp_path, "is a folder"),
        ("https://example.com/a.png", "pass --allow-image-urls"),
    ):
        assert words in refused("generate", out, "color?", "--image", path)
        assert words in refused("chat", out, "--image", path, stdin="color?\n")
    file = write_rows(tmp_path / "p.jsonl", ["hi", row("no.png", "red")])
    said = refused("generate", out, "--file", file)
    assert said.startswith(f"{file}, line 2: ")
    assert f"{missing}: file not found" in said
    file = write_rows(tmp_path / "p.jsonl", [row(str(place / "0.png"), "red")])
    assert "leads out of" in refused("generate", out, "--file", file)
    assert "--image goes with a prompt" in refused(
        "generate", out, "--file", file, "--image", place / "0.png"
    )


def test_a_model_of_text_is_given_no_image(trained: Path, place: Path) -> None:
    image = place / "0.png"
    for command in (("generate", trained, "Hi"), ("chat", trained)):
        said = refused(*command, "--image", image, stdin="Hi\n")
        why = "the model reads text only: leave images out, or use a model that reads them"
        assert said == f"{trained}: {why}"
    file = write_rows(place / "q.jsonl", [row("0.png", "red")])
    assert "reads text only" in refused("generate", trained, "--file", file)
    done = fusewright("chat", trained, *SHORT, stdin=f"/image {image}\n/exit\n")
    assert "/image has an image, and the model reads text only" in done.stdout


def test_what_reads_images_may_be_missing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.train.model import processor

    def lacking(recipe: Any) -> Any:
        raise RecipeError("no torchvision") from ImportError()

    monkeypatch.setattr(processor, "_processor", lacking)
    said = refused("generate", place / "out", "color?", "--image", place / "0.png")
    assert 'packages that read images are missing: pip install "fusewright[images]"' in said
    assert fusewright("generate", place / "out", "hi", *SHORT).exit_code == 0


def test_what_stands_for_an_image_is_no_text(place: Path) -> None:
    said = refused("generate", place / "out", "what is <|image_pad|>?")
    assert "the prompt: a text of the row has '<|image_pad|>' in it" in said


# --- conversations -------------------------------------------------------------------------------


def test_a_conversation_about_images(writer: TextGenerator, place: Path, tmp_path: Path) -> None:
    asked: list[list[Any]] = []

    class Recording:
        chats, picture = True, staticmethod(writer.picture)

        def prompt(self, messages: Any) -> Any:
            asked.append(messages)
            return writer.prompt(messages)

        def stream(self, prompt: Any) -> Iterator[str]:
            yield from writer.stream(prompt)

    out, saved = io.StringIO(), tmp_path / "saved.jsonl"
    lines = ["color?", "sure?", f"/image {place / '1.png'}", "and this?", "/image no.png",
             f"/save {saved}", f"/image {place / '2.png'}", "/reset", "hi"]  # fmt: skip
    first = str(place / "0.png")
    session = ChatSession(
        Recording(),
        None,
        io.StringIO("\n".join(lines) + "\n"),
        out,
        [first],  # type: ignore[arg-type]
    )
    session.run()
    assert asked[0] == [user_message("color?", [first])]
    assert asked[1][::2] == [*asked[0], user_message("sure?")]
    assert asked[2][4] == user_message("and this?", [str(place / "1.png")])
    assert asked[3] == [user_message("hi")]
    said = out.getvalue()
    assert "[1.png, 25 x 31: ask about it]" in said  # as large as the run had them
    assert "fusewright: /image: " in said
    (row_of_training,) = objects(saved.read_text())
    assert len(row_of_training["messages"]) == 6
    assert row_of_training["messages"][0] == asked[0][0]
    again = write_rows(place / "saved.jsonl", [row_of_training])
    assert fusewright("eval", place / "out", "--data", again).exit_code == 0


def test_chat_begins_with_an_image(place: Path) -> None:
    image = place / "0.png"
    done = fusewright("chat", place / "out", "--image", image, *SHORT, stdin="color?\n")
    alone = fusewright("generate", place / "out", "color?", "--image", image, *SHORT)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == alone.stdout.strip()


# --- figures -------------------------------------------------------------------------------------


def test_eval_of_rows_with_images(place: Path) -> None:
    recorded = json.loads((place / "out" / "run.json").read_text())
    assert recorded["data"]["images"] == 12
    done = fusewright("eval", place / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["loss"] == pytest.approx(recorded["val_loss_after"], rel=1e-5)
    file = write_rows(place / "e.jsonl", [row("0.png", "red"), row("1.png", "green")])
    one = json.loads(fusewright("eval", place / "out", "--data", file, "--json").stdout)["loss"]
    plain = [{**r, "messages": [{"role": "user", "content": "color?"}, r["messages"][1]]}
             for r in map(json.loads, file.read_text().splitlines())]  # fmt: skip
    text = write_rows(place / "t.jsonl", plain)
    other = json.loads(fusewright("eval", place / "out", "--data", text, "--json").stdout)["loss"]
    assert abs(one - other) > 1e-4  # what is on the images counts


def test_the_loss_of_a_row_with_an_image_by_hand(place: Path, writer: TextGenerator) -> None:
    file = write_rows(place / "h.jsonl", [row("2.png", "blue")])
    figures = json.loads(fusewright("eval", place / "out", "--data", file, "--json").stdout)
    sample = writer.prompt([user_message("color?", [str(place / "2.png")])])
    answer = writer.tokenizer("blue<|im_end|>", add_special_tokens=False)["input_ids"]
    assert not isinstance(writer.images, str)
    ids = torch.tensor([sample.input_ids])
    features = writer.images.features([[sample]], {"input_ids": ids})  # type: ignore[union-attr]
    features["mm_token_type_ids"] = torch.nn.functional.pad(
        features["mm_token_type_ids"], (0, len(answer))
    )
    ids = torch.cat([ids, torch.tensor([answer])], 1)
    with torch.no_grad():
        scores = writer.model(input_ids=ids, **features).logits.log_softmax(-1)[0]
    loss = -sum(float(scores[-len(answer) - 1 + i, t]) for i, t in enumerate(answer)) / len(answer)
    assert figures["loss"] == pytest.approx(loss, rel=1e-5)


# --- rows to look at -----------------------------------------------------------------------------


def preview(place: Path, tmp_path: Path, *more: str) -> str:
    recipe = json.loads((place / "out" / "run.json").read_text())["recipe"]
    kept = ("base_model", "datasets", "sequence_len", "bf16", "image_max_pixels")
    keys = {k: recipe[k] for k in kept}
    keys["datasets"] = [{"path": str(place / "r.jsonl"), "type": "chat_template"}]
    keys |= {"output_dir": str(tmp_path / "o"), "val_set_size": 0}
    keys["dataset_prepared_path"] = str(tmp_path / "prepared")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    done = fusewright("preprocess", tmp_path / "r.yaml", *more)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_rows_are_shown_with_their_images(place: Path, tmp_path: Path) -> None:
    text = preview(place, tmp_path, "--show")
    assert preview(place, tmp_path, "--debug") == text
    shown = re.findall(r"<image: (\d)\.png, (\d+) x (\d+), (\d+) tokens>", text)
    assert len(shown) == 4  # and a row of text
    sizes = [("21", "36"), ("25", "31"), ("28", "28")]  # within image_max_pixels
    assert all((width, height) == sizes[int(name) % 3] for name, width, height, _ in shown)
    assert "image_pad" not in text
    assert f"image 1: {place / shown[0][0]}.png" in text
    for colour in "red", "green", "blue":
        assert "".join((f"▸{c}/" in text and c) or "" for c in colour) == colour
    assert "▀" not in text  # a pipe has no colours


def test_a_terminal_with_colours_shows_thumbnails(place: Path) -> None:
    from fusewright.train.data import prepare
    from fusewright.train.data.preview import first, show
    from fusewright.train.inference.evaluate import recipe_with
    from fusewright.train.inference.load_run import load_processing

    run = open_run(place / "out")
    recipe, processing = recipe_with(run, {"val_set_size": None}), load_processing(run)
    prepared = prepare(recipe, processing)
    reads = featurizer_of(recipe, processing)

    def seen(**options: Any) -> str:
        console = Console(file=io.StringIO(), force_terminal=True, width=120, **options)
        show(first(prepared, 1), processing.tokenizer, console, reads)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return str(text)

    assert len(re.findall("▀+", re.sub(r"\x1b\[[0-9;]*m", "", seen(color_system="truecolor")))) > 5
    assert "▀" not in seen(color_system=None)
    assert "▀" not in seen(color_system="truecolor", no_color=True)
    (name,) = re.findall(r"image 1: .*/(\d+)\.png", seen(color_system=None))
    rgb = ("255;0;0", "0;128;0", "0;0;255")[int(name) % 3]
    assert f"38;2;{rgb};48;2;{rgb}m▀" in seen(color_system="truecolor")


# --- the question of a recipe --------------------------------------------------------------------


def test_a_run_answers_about_an_image(place: Path) -> None:
    record = json.loads((place / "out" / "run.json").read_text())
    assert record["sample"].keys() == {"question", "before", "after"}
    image = record["sample_image"]
    assert image["name"] == "0.png"
    done = fusewright(
        "generate", place / "out", "color?", "--image", place / "0.png", "--max_new_tokens", "4"
    )
    assert done.stdout.strip() == record["sample"]["after"]
    kind, _, encoded = image["thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as small:
        assert small.size == (24, 40)
    text = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert f'src="{image["thumbnail"]}"' in text
    assert 'alt="The image that the question is about, 0.png"' in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert str(place) not in text
    assert "12" in re.findall(r"<dt>images</dt><dd>(\d+)</dd>", text)


def test_a_question_about_an_image_where_rows_are_text(place: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"},
                          {"role": "assistant", "content": "hello"}]}]  # fmt: skip
    keys = {
        "base_model": str(place / "model"), "bf16": False, "adapter": "lora",
        "lora_target_linear": True, "max_steps": 1, "optimize": False, "audit": False,
        "datasets": [{"path": str(write_rows(tmp_path / "r.jsonl", rows)),
                      "type": "chat_template"}],
        "sequence_len": 64, "micro_batch_size": 1, "val_set_size": 0, "sample_prompt": "color?",
        "sample_image": str(place / "0.png"), "sample_max_tokens": 2,
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    result = train(keys, console=Console(quiet=True))
    assert result.problems == []
    assert result.sample is not None
    assert result.sample.keys() == {"question", "before", "after"}


def test_a_thumbnail_is_small(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (1200, 1600, 3), dtype=torch.uint8, generator=None).numpy()
    Image.fromarray(noise).save(tmp_path / "noise.png")
    picture = Gallery(None, tmp_path).picture(tmp_path / "noise.png", "x")
    assert len(thumbnail(picture, "x")) < 50_000


def test_a_page_takes_no_other_address_for_an_image(place: Path) -> None:
    record = json.loads((place / "out" / "run.json").read_text())
    record["sample_image"]["thumbnail"] = "https://example.com/a.jpg"
    assert "example.com" not in page.render(Facts.of(record))


def test_the_image_of_a_question_is_checked_before_training(
    place: Path, base: Path, tmp_path: Path
) -> None:
    keys = {
        "base_model": str(place / "model"), "datasets": [{"path": str(place / "r.jsonl")}],
        "sample_prompt": "color?", "output_dir": str(tmp_path / "out"), "bf16": False,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"sample_image: there is no no\.png in"):
        train({**keys, "sample_image": "no.png"}, console=Console(quiet=True))
    (tmp_path / "bad.png").write_text("text")
    with pytest.raises(DataError, match=r"sample_image: .*bad\.png: is not a"):
        train({**keys, "sample_image": str(tmp_path / "bad.png")}, console=Console(quiet=True))
    with pytest.raises(RecipeError, match=r"sample_image: the model reads text only: leave"):
        train(
            {**keys, "base_model": str(base), "sample_image": str(place / "0.png")},
            console=Console(quiet=True),
        )


# --- cards and folders ---------------------------------------------------------------------------


def run_code(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    return out.getvalue()


def test_the_cards_snippet_runs(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    text = (place / "out" / "README.md").read_text(encoding="utf-8")
    assert card.metadata_load(place / "out" / "README.md")["pipeline_tag"] == "image-text-to-text"
    assert "about the image 0.png" in text
    assert "--image image.png" in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    assert "# the run resized its images before: image_max_pixels: 800" in code
    folder = tmp_path / "copy"
    shutil.copytree(place / "out", folder)
    (folder / "model").symlink_to(place / "model")  # "its folder"
    draw(folder / "image.png", "blue", (24, 24))
    printed = run_code(code.replace("Your question", "color?"), folder, monkeypatch)
    ours = fusewright(
        "generate", place / "out", "color?", "--image", folder / "image.png",
        "--max_new_tokens", "200",
    )  # fmt: skip
    assert printed.split() == ours.stdout.split()


def test_a_merged_model_has_its_processor(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import AutoProcessor

    merged = tmp_path / "merged"
    assert fusewright("merge", place / "out", "--output", merged).exit_code == 0
    processor = AutoProcessor.from_pretrained(merged)
    base = AutoProcessor.from_pretrained(place / "model")
    assert type(processor) is type(base)
    assert processor.chat_template == base.chat_template
    assert processor.image_processor.to_dict() == base.image_processor.to_dict()
    image = draw(merged / "image.png", "blue", (24, 24))
    recipe = {"base_model": str(merged), "processor_kwargs": {"max_pixels": 256}}
    code = snippet(recipe, ".", images=True)
    assert code is not None
    printed = run_code(code.replace("max_new_tokens=200", "max_new_tokens=5"), merged, monkeypatch)
    code = code.replace(" 256}", " 1024}")
    whole = run_code(code.replace("max_new_tokens=200", "max_new_tokens=5"), merged, monkeypatch)
    ours = fusewright("generate", merged, "Your question", "--image", image, *SHORT)
    assert whole.split() == ours.stdout.split()
    assert isinstance(printed, str)


def test_an_older_template_of_the_base_does_not_replace_the_runs(
    place: Path, tmp_path: Path
) -> None:
    """A whole model is saved with the chat template that it was trained with."""
    from transformers import AutoProcessor

    base = tmp_path / "base"
    shutil.copytree(place / "model", base)
    own = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_text(json.dumps({"chat_template": own}))
    trained_with = own.replace("assistant", "helper")
    recipe = {
        "base_model": str(base), "bf16": False, "optimize": False, "audit": False,
        "datasets": [{"path": str(place / "r.jsonl"), "type": "chat_template"}],
        "chat_template_jinja": trained_with, "sequence_len": 512, "max_steps": 1,
        "micro_batch_size": 2, "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    result = train(recipe, console=Console(quiet=True))
    assert result.steps == 1
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.chat_template.strip() == trained_with.strip()
    assert processor.image_processor is not None


def test_a_prompt_of_text_for_a_template_that_takes_parts() -> None:
    """The template writes nothing of a content that is text: it is given as a part."""
    from ..conftest import CHATML, make_tokenizer
    from ..inference.test_generate import OTHER, Scripted

    parts = CHATML.replace(
        "m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}",
        "m['role'] + '\n' }}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
        "{{ '<|im_end|>\n' }}",
    )
    tokenizer = make_tokenizer(parts.replace("<|im_end|>", "<|pad|>"))
    writer = TextGenerator(Scripted([OTHER]), tokenizer, Sampling(4))
    assert tokenizer.pad_token_id in writer.stops
    text = tokenizer.decode(writer.prompt([user_message("Hi")]).input_ids)
    assert text == "<|im_start|>user\nHi<|pad|>\n<|im_start|>assistant\n"
    with pytest.raises(ModelError, match="the prompt has an image, and the model reads text only"):
        writer.prompt([user_message("Hi", ["a.png"])])
