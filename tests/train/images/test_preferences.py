"""Preference rows with images: how they are read, batched and trained, against TRL and by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from torch.nn import functional as F

from fusewright.errors import DataError, RecipeError
from fusewright.train import train
from fusewright.train.data import Samples, prepare
from fusewright.train.data.images.reading import featurizer_of
from fusewright.train.data.preferences.examples import Examples
from fusewright.train.model.processor import load_processing
from fusewright.train.processes.world import World
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.preferences import rows_of
from fusewright.train.trainer.build import featurizer_for
from fusewright.train.trainer.ready import ready_model

from ..commands import fusewright
from ..conftest import write_rows
from .families import FAMILIES

pytest.importorskip("trl", reason="TRL trains these methods, and is an extra")

FIGURES = (
    "loss", "grad_norm", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected", "kl",
)  # fmt: skip
COLOURS = ("red", "green", "blue", "black")
ROWS = 12
QUIET = Console(quiet=True)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by family, whose templates write nothing after the end of an answer.

    TRL compares what comes after it, too.
    """
    folder = tmp_path_factory.mktemp("checkpoints")

    def saved(name: str) -> Path:
        path = folder / name
        if not path.exists():
            FAMILIES[name].save(path)
            file, line = path / "chat_template.jinja", "\n{% endfor %}"
            between = "{{ '\n' if not loop.last or add_generation_prompt }}{% endfor %}"
            written = file.read_text(encoding="utf-8")
            for end in ("<|im_end|>", "<end_of_turn>"):
                written = written.replace(f"{end}{line}", f"{end}{between}")
            file.write_text(written, encoding="utf-8")
        return path

    return saved


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with drawings of several sizes, ``0.png`` and so on."""
    folder, draw = tmp_path_factory.mktemp("pictures"), random.Random(0)
    for number in range(ROWS + 2):
        image = Image.new("RGB", (draw.choice([24, 32, 40]), draw.choice([24, 32, 48])), "white")
        ImageDraw.Draw(image).rectangle((6, 6, 18, 18), COLOURS[number % 4])
        image.save(folder / f"{number}.png")
    return folder


def image(**named: Any) -> Row:
    return {"type": "image", **named}


def text(content: str) -> Row:
    return {"type": "text", "text": content}


def user(*parts: Row) -> Row:
    return {"role": "user", "content": list(parts)}


def assistant(content: str) -> Row:
    return {"role": "assistant", "content": [text(content)]}


def pairs(number: int = ROWS, texts: bool = False) -> list[Row]:
    """As TRL writes them: every third has two images, and with ``texts`` every fourth none."""
    rows = []
    for i in range(number):
        right, wrong = COLOURS[i % 4], COLOURS[(i + 1 + i % 3) % 4]
        parts, names = [image(), text("Which colour?")], [f"{i}.png"]
        if texts and i % 4 == 3:
            parts, names = [text("Say something.")], []
        elif i % 3 == 0:
            parts, names = [image(), text("and"), image(), text("?")], [f"{i}.png", f"{i + 1}.png"]
        rows.append({
            "images": names, "prompt": [user(*parts)],
            "chosen": [assistant(right)], "rejected": [assistant(f"{wrong}, surely")],
        })  # fmt: skip
    return rows


def labelled(number: int = ROWS) -> list[Row]:
    """The same as single answers, in turn good and bad."""
    return [
        {
            "images": row["images"],
            "prompt": row["prompt"],
            "label": i % 2 == 0,
            "completion": row["chosen" if i % 2 == 0 else "rejected"],
        }
        for i, row in enumerate(pairs(number))
    ]


def recipe(base: Path, folder: Path, rows: list[Row], file: Path, **keys: Any) -> Row:
    """Ten steps of DPO on rows, which are written to a file beside their images."""
    write_rows(file, rows)
    return {
        "base_model": str(base), "bf16": False, "optimize": False, "audit": False, "rl": "dpo",
        "adapter": "lora", "lora_r": 4, "lora_target_linear": True, "freeze_mm_modules": False,
        "datasets": [{"path": str(file), "type": "chat_template"}], "val_set_size": 0,
        "shuffle_merged_datasets": False, "sequence_len": 256, "micro_batch_size": 2,
        "gradient_accumulation_steps": 1, "max_steps": 10, "learning_rate": 1e-3,
        "lr_scheduler": "constant", "logging_steps": 1, "codegen": "eager",
        "output_dir": str(folder / "out"), **keys,
    }  # fmt: skip


def losses(result: Any) -> list[Row]:
    return [entry for entry in result.history if "loss" in entry]


def examples(given: Row) -> list[Row]:
    """The rows of a recipe, prepared, as trainers read them."""
    loaded = load_recipe(given)
    kind, train_rows = rows_of(loaded), prepare(loaded, load_processing(loaded)).train
    assert isinstance(train_rows, Samples)
    assert kind is not None
    return list(Examples(train_rows, kind, pictures=True))


# --- the trained values ---------------------------------------------------------------------------


def by_trl(given: Row, rows: list[Row], folder: Path) -> list[Row]:
    """Train a recipe by TRL's trainer as it is: on raw rows, with the processor's own batches."""
    from datasets import Dataset

    from fusewright.train.data.order import Order
    from fusewright.train.methods.task import task_of

    loaded = load_recipe(given)
    processing = load_processing(loaded)
    task: Any = task_of(loaded)
    args: Any = task.arguments(task.sequences(prepare(loaded, processing)), None)
    args.eval_strategy, args.save_strategy = "no", "no"
    kind: Any = next(c for c in task.method.trainer.__mro__ if c.__module__.startswith("trl."))

    class Plain(kind):  # type: ignore[misc]  # 2026-12-01: which trainer, the recipe says
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return Order([0] * len(self.train_dataset), loaded.seed, "shuffled", 2)

    opened = [
        {**row, "images": [Image.open(folder / name) for name in row["images"]]} for row in rows
    ]
    trainer = Plain(
        model=ready_model(loaded, processing.tokenizer, print), args=args,
        train_dataset=Dataset.from_list(opened), processing_class=processing.processor,
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.long("qwen2_5_vl-True", "gemma3-False", "llava-False")
@pytest.mark.parametrize(
    ("name", "optimize"),
    [
        ("qwen2_5_vl", False),
        ("qwen2_5_vl", True),
        *(
            pytest.param(f, o, marks=pytest.mark.slow if o else ())
            for f in ("gemma3", "llava")
            for o in (False, True)
        ),
    ],
)
def test_ten_steps_are_those_of_trl_on_raw_rows(
    name: str,
    optimize: bool,
    checkpoints: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
) -> None:
    rows, base = pairs(), checkpoints(name)
    given = recipe(base, tmp_path, rows, pictures / "rows.jsonl")
    logs = by_trl(given, rows, pictures)
    found = losses(train({**given, "optimize": optimize}, console=QUIET))
    require_same(found, logs, 1e-3 if optimize else 1e-5)


@pytest.mark.long("qwen2_5_vl")
@pytest.mark.parametrize("name", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_ten_steps_of_kto_are_those_of_trl_on_raw_rows(
    name: str, checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    rows, base = labelled(), checkpoints(name)
    given = recipe(base, tmp_path, rows, pictures / "labelled.jsonl", rl="kto")
    logs = by_trl(given, rows, pictures)
    require_same(losses(train(given, console=QUIET)), logs, 1e-5)


def require_same(found: list[Row], logs: list[Row], tolerance: float) -> None:
    assert len(found) == len(logs) == 10
    for own, other in zip(found, logs, strict=True):
        for name in FIGURES:
            if name in other:
                assert own[name] == pytest.approx(other[name], rel=tolerance, abs=1e-5), name
    chosen = [entry.get("rewards/chosen", 0.0) for entry in logs]  # a batch of KTO may have none
    assert max(map(abs, chosen)) > 1e-3  # something was learnt


def log_probability(model: Any, processor: Any, row: Row, answer: str, folder: Path) -> float:
    """That of an answer, summed over its tokens, by a plain forward pass of one sequence."""
    images = [[Image.open(folder / name) for name in row["images"]]] if row["images"] else None
    write = processor.apply_chat_template
    asked = write(row["prompt"], add_generation_prompt=True, tokenize=False)
    whole = write([*row["prompt"], *row[answer]], tokenize=False)
    before, inputs = (
        processor(text=[one], images=images, add_special_tokens=False, return_tensors="pt")
        for one in (asked, whole)
    )
    with torch.no_grad():
        scores = F.log_softmax(model(**inputs).logits[0, :-1].double(), dim=-1)
    ids = inputs["input_ids"][0]
    return float(scores.gather(-1, ids[1:, None])[before["input_ids"].shape[1] - 1 :].sum())


@pytest.mark.long("cpo-lora")
@pytest.mark.parametrize(
    ("method", "adapter"),
    [("dpo", "lora"), pytest.param("dpo", None, marks=pytest.mark.slow), ("cpo", "lora")],
)
def test_validation_is_what_single_forward_passes_give(
    method: str,
    adapter: str | None,
    checkpoints: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    rows, base, beta = pairs(8, texts=True), checkpoints("qwen2_5_vl"), 0.3
    held = write_rows(pictures / "held.jsonl", rows)
    given = recipe(
        base, tmp_path, rows, pictures / "mixed.jsonl", adapter=adapter, rl_beta=beta, max_steps=4,
        test_datasets=[{"path": str(held), "type": "chat_template"}], eval_batch_size=3, rl=method,
    )  # fmt: skip
    if method == "cpo":
        given["cpo_alpha"] = 0.0
    if adapter is None:
        for key in ("lora_r", "lora_target_linear"):
            del given[key]
    result = train(given, console=QUIET)
    assert adapter is None or result.adapter_check["exact"]
    (figures,) = [e for e in result.history if "eval_loss" in e and e["step"] == 4]

    processor = AutoProcessor.from_pretrained(base)
    plain: Any = AutoModelForImageTextToText.from_pretrained(base).eval()
    reference = [
        [log_probability(plain, processor, r, a, pictures) for a in ("chosen", "rejected")]
        for r in rows
    ]
    trained: Any = (
        PeftModel.from_pretrained(plain, result.output_dir).eval()
        if adapter
        else AutoModelForImageTextToText.from_pretrained(result.output_dir).eval()
    )
    own = [
        [log_probability(trained, processor, r, a, pictures) for a in ("chosen", "rejected")]
        for r in rows
    ]
    rewards = beta * torch.tensor(own)
    if method == "dpo":
        rewards -= beta * torch.tensor(reference)
    margins = rewards[:, 0] - rewards[:, 1]
    assert abs(float(margins.mean())) > 1e-2
    assert figures["eval_loss"] == pytest.approx(float(-F.logsigmoid(margins).mean()), abs=1e-4)
    assert figures["eval_rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-4)
    mean = float(torch.tensor(own)[:, 0].mean())
    assert figures["eval_logps/chosen"] == pytest.approx(mean, rel=1e-4)
    evaluated = fusewright("eval", result.output_dir, "--json")
    assert json.loads(evaluated.stdout)["loss"] == pytest.approx(figures["eval_loss"], abs=1e-4)


@pytest.mark.long
def test_a_precomputed_reference_is_that_of_each_batch(
    checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    rows, base = pairs(8, texts=True), checkpoints("gemma3")
    keys = {"max_steps": 4, "val_set_size": 2}
    given = recipe(base, tmp_path, rows, pictures / "before.jsonl", **keys)
    each = train(given, console=QUIET).history
    before = train(
        {**given, "precompute_ref_log_probs": True, "output_dir": str(tmp_path / "before")},
        console=QUIET,
    ).history
    for name in ("loss", "rewards/margins", "eval_loss", "eval_rewards/margins"):
        found, wanted = ([e[name] for e in log if name in e] for log in (before, each))
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6), name


@pytest.mark.long
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    rows, base = pairs(8, texts=True), checkpoints("qwen2_5_vl")
    given = recipe(base, tmp_path, rows, pictures / "resumed.jsonl", max_steps=6, save_steps=3)
    whole = losses(train(given, console=QUIET))
    checkpoint = Path(given["output_dir"]) / "checkpoint-3"
    resumed = train(
        {**given, "resume_from_checkpoint": str(checkpoint), "output_dir": str(tmp_path / "on")},
        console=QUIET,
    )
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen")
    assert [[e[n] for n in names] for e in losses(resumed)[-3:]] == [
        [e[n] for n in names] for e in whole[-3:]
    ]


# --- rows -----------------------------------------------------------------------------------------


def forms() -> dict[str, Row]:
    """The same pair as TRL, LLaMA-Factory and others write it."""
    asked = user(image(), text("Which colour?"))
    marked = {"from": "human", "value": "<image>Which colour?"}
    good, bad = assistant("red"), assistant("green")
    return {
        "explicit": {"images": ["0.png"], "prompt": [asked], "chosen": [good], "rejected": [bad]},
        "no place": {
            "images": ["0.png"], "prompt": [{"role": "user", "content": "Which colour?"}],
            "chosen": [good], "rejected": [bad],
        },
        "one image": {"image": "0.png", "prompt": [asked], "chosen": [good], "rejected": [bad]},
        "implicit": {"images": ["0.png"], "chosen": [asked, good], "rejected": [asked, bad]},
        "repeated": {
            "images": ["0.png"], "prompt": [asked], "chosen": [asked, good],
            "rejected": [asked, bad],
        },
        "path in the part": {
            "prompt": [user(image(path="0.png"), text("Which colour?"))],
            "chosen": [good], "rejected": [bad],
        },
        "paths in both": {
            "chosen": [user(image(path="0.png"), text("Which colour?")), good],
            "rejected": [user(image(path="0.png"), text("Which colour?")), bad],
        },
        "marks": {
            "images": ["0.png"], "conversations": [marked],
            "chosen": {"from": "gpt", "value": "red"},
            "rejected": {"from": "gpt", "value": "green"},
        },
        "text answers": {
            "images": ["0.png"], "messages": [{"role": "user", "content": "<image>Which colour?"}],
            "chosen": "red", "rejected": "green",
        },
    }  # fmt: skip


ENDS = {"qwen2_5_vl": "<|im_end|>", "gemma3": "<end_of_turn>", "llava": "<eos>"}


def of_a_form(base: Path, folder: Path, row: Row, pictures: Path, **keys: Any) -> Row:
    """A recipe for one row."""
    file = pictures / "form.jsonl"
    field = {"field_messages": "conversations"} if "conversations" in row else {}
    dataset = {"path": str(file), "type": "chat_template", **field}
    return recipe(base, folder, [row], file, **{"datasets": [dataset], **keys})


@pytest.mark.parametrize("name", ENDS)
def test_all_forms_of_a_pair_are_the_same_tokens(
    name: str, checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    base, read = checkpoints(name), {}
    for form, row in forms().items():
        given = of_a_form(base, tmp_path, row, pictures)
        (read[form],) = examples(given)
        read[form]["pictures"] = json.loads(read[form]["pictures"])["pictures"]
    first = read["explicit"]
    assert [form for form, example in read.items() if example != first] == []
    assert [p["path"] for p in first["pictures"]] == [str(pictures / "0.png")]
    processing = load_processing(load_recipe(given))
    decode, end = processing.tokenizer.decode, ENDS[name]
    assert decode(first["chosen_ids"]) == f"red{end}"
    assert decode(first["rejected_ids"]) == f"green{end}"
    placeholder = processing.tokenizer.convert_tokens_to_ids(processing.processor.image_token)
    assert placeholder in first["prompt_ids"]


def test_an_image_is_never_cut(
    checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    base, (row,) = checkpoints("qwen2_5_vl"), pairs(1)
    long_answer = {**row, "chosen": [assistant("red " * 20)]}
    file = pictures / "long.jsonl"
    (whole,) = examples(recipe(base, tmp_path, [long_answer], file))
    prompt = len(whole["prompt_ids"])

    def cut(longest: int, **keys: Any) -> list[Row]:
        keys = {"sequence_len": longest, "excess_length_strategy": "truncate", **keys}
        return examples(recipe(base, tmp_path, [long_answer, row], file, **keys))

    first, second = cut(prompt + 14)
    assert first["prompt_ids"] == second["prompt_ids"] == whole["prompt_ids"]
    assert first["chosen_ids"] == whole["chosen_ids"][:14]
    assert second["rejected_ids"] == whole["rejected_ids"]
    with pytest.raises(DataError, match="2 are longer than"):
        cut(prompt - 1)
    with pytest.raises(DataError, match="no row is left to train on"):
        cut(2 * prompt, max_prompt_len=prompt - 1)


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "types", "stands"),
    [
        ("qwen2_5_vl", "mm_token_type_ids", "<|image_pad|>"),
        ("gemma3", "token_type_ids", "<image_soft_token>"),
    ],
)
def test_a_batch_has_the_features_of_both_answers_in_order(
    name: str,
    types: str,
    stands: str,
    checkpoints: Callable[[str], Path],
    pictures: Path,
    tmp_path: Path,
) -> None:
    from fusewright.train.methods.table import METHODS

    base, rows = checkpoints(name), pairs(4, texts=True)
    given = recipe(base, tmp_path, rows, pictures / "batch.jsonl")
    loaded = load_recipe(given)
    processing = load_processing(loaded)
    collate = METHODS["dpo"].collate(0, featurizer_of(loaded, processing))
    whole = collate(examples(given))
    placeholder = processing.tokenizer.convert_tokens_to_ids(stands)
    assert torch.equal(whole[types] == 1, whole["input_ids"] == placeholder)
    assert whole["input_ids"].shape[0] == 8
    alone = [collate([example]) for example in examples(given)]
    assert "pixel_values" not in alone[3]  # it has no image
    once = torch.cat([one["pixel_values"].chunk(2)[0] for one in alone[:3]])
    assert torch.equal(whole["pixel_values"], torch.cat([once, once]))
    assert len({float(part.sum()) for part in once}) > 1
    text_only = collate(examples(given)[3:])
    assert not text_only.keys() & {"pixel_values", types}


def test_columns_of_prompts_are_no_images(
    checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    """Which would take workers of the loader, and refuse to divide a batch among processes."""
    keys = {"rl": "grpo", "trl": {"reward_funcs": ["length:9"]}}
    row = {"prompt": [user(text("Which?"))], "answer": "red"}
    file = pictures / "prompts.jsonl"
    loaded = load_recipe(recipe(checkpoints("qwen2_5_vl"), tmp_path, [row], file, **keys))
    processing = load_processing(loaded)
    prepared = prepare(loaded, processing)
    assert prepared.has_extra()
    assert featurizer_for(torch.nn.Identity(), loaded, processing, prepared.has_extra()) is None


def test_processes_that_share_a_tower_need_an_image_in_each_row(
    checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    """A process whose pairs have none would not call it, and the others would wait."""
    from fusewright.train.methods.task import task_of

    for texts in (False, True):
        file = pictures / f"shared_{texts}.jsonl"
        loaded = load_recipe(recipe(checkpoints("qwen2_5_vl"), tmp_path, pairs(4, texts), file))
        processing = load_processing(loaded)
        featurizer = featurizer_of(loaded, processing)
        assert featurizer is not None
        featurizer.completes = True
        ready = task_of(loaded).validation, prepare(loaded, processing), processing.tokenizer
        if not texts:
            ready[0](*ready[1:], World(), featurizer)
            continue
        with pytest.raises(RecipeError, match="rl: dpo: some rows have no image") as raised:
            ready[0](*ready[1:], World(), featurizer)
        assert "\n" not in str(raised.value)


# --- what is refused ------------------------------------------------------------------------------


def refused() -> dict[str, tuple[Row, Row, str]]:
    """By name: what differs from the recipe, a row, and a part of the line that refuses it."""
    (pair,), (judged,) = pairs(1), labelled(1)
    prompt = {"images": ["0.png"], "prompt": pair["prompt"]}
    seen = [*assistant("red")["content"], image(path="0.png")]
    few = "the row has 1 image, and its messages have 2 places"
    return {
        "orpo": ({"rl": "orpo"}, pair, "the row has an image, and rl: orpo trains prompts, too"),
        "reward": (
            {"rl": None, "reward_model": True}, pair, "an image, and reward_model trains texts"
        ),
        "kto": (
            {"rl": "kto", "precompute_ref_log_probs": True}, judged,
            "rl: kto computes precompute_ref_log_probs of texts alone: set it to false",
        ),
        "grpo": (
            {"rl": "grpo", "trl": {"reward_funcs": ["length:9"]}}, prompt,
            "the row has an image, and rl: grpo trains texts alone: leave such rows out",
        ),
        "process reward": (
            {"rl": None, "process_reward_model": True, "type": "stepwise_supervised"},
            {"images": ["0.png"], "prompt": "?", "completions": ["a"], "labels": [True]},
            "the row has an image, and process_reward_model trains texts alone",
        ),
        "grpo, parts": (
            {"rl": "grpo", "trl": {"reward_funcs": ["length:9"]}},
            {"prompt": [user(image(path="0.png"))]}, "an image, and rl: grpo trains texts alone",
        ),
        "an answer": (
            {}, {**pair, "rejected": [{"role": "assistant", "content": seen}]},
            "'rejected' has an image in an answer",
        ),
        "text": (
            {}, {"images": ["0.png"], "prompt": "Which?", "chosen": "a", "rejected": "b"},
            "its prompt is plain text: write the prompt as a list of messages",
        ),
        "another type": (
            {"type": "chatml.intel"},
            {"question": "?", "chosen": [user(image(path="0.png")), assistant("a")],
             "rejected": [assistant("b")]},
            "'chosen' has an image, which this type cannot write",
        ),
        "counts": ({}, {**pair, "images": ["0.png"]}, few),
        "missing": ({}, {**pair, "images": ["0.png", "none.png"]}, "none.png: file not found"),
    }  # fmt: skip


@pytest.mark.parametrize("name", refused())
def test_what_cannot_be_trained_is_refused_by_one_line(
    name: str, checkpoints: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    keys, row, line = refused()[name]
    file = pictures / "refused.jsonl"
    dataset = {"path": str(file), "type": keys.pop("type", "chat_template")}
    given = recipe(checkpoints("qwen2_5_vl"), tmp_path, [row], file, datasets=[dataset], **keys)
    loaded = load_recipe(given)
    with pytest.raises(DataError) as raised:
        prepare(loaded, load_processing(loaded))
    message = str(raised.value)
    assert message.startswith(f"{file}, line 1: ")
    assert line in message
    assert "\n" not in message
