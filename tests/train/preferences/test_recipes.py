"""18 recipes in the style of Axolotl's examples of preference methods: prepared, and trained."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fusewright.train.consent import Consent
from fusewright.train.data import Samples, prepare
from fusewright.train.data.preferences.examples import Examples
from fusewright.train.model.tokenizer import load_tokenizer
from fusewright.train.recipe.load import Checked, check
from fusewright.train.recipe.preferences import method_of, rows_of
from fusewright.train.recipe.status import entries

from ..commands import fusewright
from .public_rows import COUNT, question, right, wrong
from .recipes import ORIGINALS, RECIPES, overrides, provide, values

each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)

PARTS = {
    "pairs": {"prompt_ids", "chosen_ids", "rejected_ids"},
    "labelled": {"prompt_ids", "completion_ids", "label"},
    "prompts": {"prompt", "prompt_ids", "answer"},
    "steps": {"input_ids", "labels"},
}


@pytest.fixture
def here(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the model and the rows of a recipe."""
    provide(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(path: Path) -> Checked:
    return check(path, overrides(path), Consent(allow_code=True))


def test_there_is_one_for_each_original() -> None:
    assert [path.stem for path in RECIPES] == sorted(ORIGINALS)
    assert len(RECIPES) == 18
    methods = {method_of(checked(path).recipe) for path in RECIPES}
    assert methods == {
        "dpo", "ipo", "orpo", "kto", "simpo", "grpo", "gdpo", "reward", "process_reward"
    }  # fmt: skip


@each
def test_no_key_is_unknown_or_without_a_trainer(path: Path) -> None:
    waiting = {e.key for e in entries(checked(path).values) if e.status == "not yet available"}
    assert waiting == set()


@each
def test_its_rows_are_prepared(path: Path, here: Path) -> None:
    recipe = checked(path).recipe
    kind = rows_of(recipe)
    assert kind is not None
    tokenizer = load_tokenizer(recipe)
    prepared = prepare(recipe, tokenizer)
    counts = prepared.counts
    assert counts["rows"] == COUNT * len(recipe.datasets)
    for dropped in ("too_long", "too_short", "nothing_to_train", "empty", "equal_answers"):
        assert counts.get(dropped, 0) == 0
    repeated = COUNT if recipe.dataset_exact_deduplication else 0
    assert counts.get("duplicates", 0) == repeated
    held = counts["validation_samples"]
    assert (held > 0) == bool(recipe.val_set_size)
    assert counts["train_samples"] + held == counts["rows"] - repeated
    assert isinstance(prepared.train, Samples)
    examples = Examples(prepared.train, kind)
    asked = [_read(examples[i], kind, tokenizer) for i in range(len(examples))]
    assert set(asked) <= {question(i) for i in range(COUNT)}
    assert len(set(asked)) == min(len(asked), COUNT - (held if len(recipe.datasets) == 1 else 0))


def _read(example: dict[str, Any], kind: str, tokenizer: Any) -> str:
    """The question of an example; its answers belong to it, and end as they should."""
    assert set(example) == PARTS[kind]
    texts = {k: tokenizer.decode(v) for k, v in example.items() if k.endswith("_ids")}
    prompt = texts["input_ids" if kind == "steps" else "prompt_ids"]
    i = next(i for i in reversed(range(COUNT)) if question(i) in prompt)
    if kind == "pairs":
        assert right(i) in texts["chosen_ids"]
        assert wrong(i) in texts["rejected_ids"]
    elif kind == "labelled":
        assert (right if example["label"] else wrong)(i) in texts["completion_ids"]
    elif kind == "prompts":
        assert example["answer"] == str(2 * i + 1)
    else:
        labels = [label for label in example["labels"] if label != -100]
        assert labels == [1] * (1 + i % 3) + [int(i % 2 == 0)]
    for name in ("chosen_ids", "rejected_ids", "completion_ids"):
        if name in example:
            last = tokenizer.convert_ids_to_tokens(example[name][-1])
            assert last in (tokenizer.eos_token, "<|im_end|>", "<|eot_id|>", "<end_of_turn>")
    return question(i)


class SwanLab(ModuleType):
    """Stands for the package of that name, which would send all this to its makers."""

    def __init__(self) -> None:
        super().__init__("swanlab")
        self.__spec__ = ModuleSpec("swanlab", None)
        self.config: dict[str, Any] = {}
        self.run: dict[str, Any] | None = None
        self.logged: list[dict[str, Any]] = []

    def init(self, **settings: Any) -> None:
        self.run = settings

    def get_run(self) -> dict[str, Any] | None:
        return self.run

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append(values)


@pytest.mark.slow
@each
def test_it_trains_three_steps(path: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "\ndeepspeed:" in path.read_text(encoding="utf-8"):
        pytest.importorskip("deepspeed", reason="the recipe shards with it, and it is an extra")
    pytest.importorskip("trl", reason="its trainers train by preferences")
    tracker = SwanLab()
    if values(path).get("use_swanlab"):
        monkeypatch.setitem(sys.modules, "swanlab", tracker)
    arguments = [f"--{key}={value}" for key, value in overrides(path).items()]
    result = fusewright("train", str(path), "--allow-code", *arguments)
    assert result.exit_code == 0, result.output
    recipe = checked(path).recipe
    output = Path(recipe.output_dir)
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (run["status"], run["steps"]) == ("finished", 3)
    losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert (output / "adapter_model.safetensors").exists() == (recipe.adapter is not None)
    assert bool(tracker.logged) == bool(recipe.use_swanlab)
