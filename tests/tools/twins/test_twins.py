"""The tool runs recipes on twins, and says what does not hold; the page is what it has found."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, CodeLlamaTokenizer

from fusewright.train import merge as merging
from fusewright.train.chat_templates import TOKENIZER_TEMPLATES, find_template
from fusewright.train.recipe.keys.row_types import PREFERENCE_TYPES

from . import __main__ as command
from . import page as pages
from . import run as running
from .checkpoint import VOCAB, kind_of, make_checkpoint, make_tokenizer
from .page import PAGE, README, claim, page, read_outcomes
from .rows import rows_of
from .run import Outcome, examples_in, run

PLAIN = {"optimize": False}


def recipe(tmp_path: Path, **keys: Any) -> tuple[Path, Path]:
    """A recipe in the style of the examples; its file and its folder."""
    values: dict[str, Any] = {
        "base_model": "HuggingFaceTB/SmolLM2-135M", "adapter": "lora", "lora_r": 8,
        "lora_alpha": 16, "lora_target_linear": True, "sequence_len": 2048,
        "sample_packing": True, "micro_batch_size": 2, "num_epochs": 3, "learning_rate": 2e-4,
        "optimizer": "adamw_torch_fused", "warmup_ratio": 0.1, "bf16": "auto",
        "datasets": [{"path": "some/chats", "type": "chat_template", "split": "train[:1%]"}],
        "output_dir": "./outputs/out", "wandb_project": None, **keys,
    }  # fmt: skip
    (tmp_path / "examples").mkdir()
    file = tmp_path / "examples" / "recipe.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return file, file.parent


def outcome_of(tmp_path: Path, more: Any = PLAIN, **keys: Any) -> tuple[Outcome, list[str]]:
    file, examples = recipe(tmp_path, **keys)
    folder, stages = tmp_path / "twin", []
    folder.mkdir()
    outcome = run(file, examples, folder, lambda o: stages.append(o.stage), more)
    return outcome, stages


STAGES = ["twin", "train", "load plainly", "merge", "same logits", "done"]


def test_a_recipe_runs_to_its_merged_model(tmp_path: Path) -> None:
    outcome, stages = outcome_of(tmp_path)
    assert (outcome.why, stages) == ("", STAGES)
    assert outcome.accepted
    assert outcome.ran
    assert outcome.kind == "llama"
    assert 0 <= outcome.figures["difference"] < 1e-5 < 1e-4 < outcome.figures["effect"]
    assert not outcome.overrides


@pytest.mark.long("keys0", "keys1", "keys3")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"fsdp_config": {"offload_params": False}, "optimizer": "adamw_bnb_8bit",
         "base_model": "mistralai/Mixtral-8x7B-v0.1", "load_in_4bit": True, "adapter": "qlora"},
        {"adapter": None, "lora_target_linear": None, "val_set_size": 0.05,
         "datasets": [{"path": "some/rows", "type": "alpaca"}], "tokenizer_type": "LlamaTokenizer",
         "special_tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}},
        {"rl": "dpo", "sample_packing": None, "datasets": [{
            "path": "fozziethebeat/alpaca_messages_2k_dpo_test", "type": "chat_template.default",
            "field_messages": "conversation", "field_chosen": "chosen",
            "field_rejected": "rejected"}]},
    ],
)  # fmt: skip
def test_other_recipes_run(tmp_path: Path, keys: dict[str, Any]) -> None:
    outcome, _ = outcome_of(tmp_path, PLAIN if keys else {}, **keys)
    assert outcome.ran, outcome.why
    assert ("one process" in outcome.overrides) == ("fsdp_config" in keys)


@pytest.mark.long
def test_a_recipe_for_images_runs(tmp_path: Path) -> None:
    outcome, stages = outcome_of(
        tmp_path, base_model="llava-hf/llava-1.5-7b-hf", processor_type="AutoProcessor",
        skip_prepare_dataset=True, sample_packing=False, chat_template="llava",
        datasets=[{"path": "HuggingFaceH4/llava-instruct-mix-vsft", "type": "chat_template"}],
    )  # fmt: skip
    assert (outcome.why, stages, outcome.text) == ("", STAGES, False)
    assert outcome.figures["effect"] > 1e-4


def test_rows_of_sound_are_no_twin(tmp_path: Path) -> None:
    outcome, _ = outcome_of(
        tmp_path, base_model="mistralai/Voxtral-Mini-3B-2507", processor_type="VoxtralProcessor"
    )
    assert (outcome.accepted, outcome.ran) == (True, False)
    assert outcome.why == "rows with sound are not read"


def test_a_refused_recipe_says_why(tmp_path: Path) -> None:
    outcome, stages = outcome_of(tmp_path, learning_rats=1.0)
    assert (outcome.accepted, outcome.stage, stages) == (False, "accept", [])
    assert re.match(r"line \d+: learning_rats: is not a key of a recipe", outcome.why)


def test_a_checkpoint_of_foreign_code_has_no_twin(tmp_path: Path) -> None:
    outcome, _ = outcome_of(tmp_path, base_model="Qwen/Qwen-7B")
    assert outcome.accepted
    assert (outcome.stage, outcome.ran) == ("twin", False)
    assert "code on the hub" in outcome.why


def test_a_merge_that_is_wrong_does_not_run(tmp_path: Path, monkeypatch: Any) -> None:
    tensor = merging.Layers.tensor

    def wrong(layers: Any, name: str) -> torch.Tensor:
        found = tensor(layers, name)
        return found * 2 if name.endswith("q_proj.weight") else found

    monkeypatch.setattr(merging.Layers, "tensor", wrong)
    outcome, _ = outcome_of(tmp_path)
    assert outcome.stage == "same logits"
    assert re.match("RuntimeError: adapter and merged: logits differ by", outcome.why)


def test_an_adapter_that_does_nothing_does_not_run(tmp_path: Path) -> None:
    outcome, _ = outcome_of(tmp_path, learning_rate=1e-30)
    assert "the adapter changes logits by" in outcome.why


def test_parts_that_read_no_text_must_stay(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {"model.vision.weight": torch.ones(2), "model.q_proj.weight": torch.ones(2)}
    for name, changes in {"base": {}, "same": {"model.q_proj.weight": torch.zeros(2)},
                          "other": {"model.vision.weight": torch.zeros(2)}}.items():  # fmt: skip
        (tmp_path / name).mkdir()
        save_file({**weights, **changes}, tmp_path / name / "model.safetensors")
    running._require_towers(tmp_path / "base", tmp_path / "same")
    with pytest.raises(RuntimeError, match=r"other has changed model.vision.weight"):
        running._require_towers(tmp_path / "base", tmp_path / "other")
    (tmp_path / "none").mkdir()
    with pytest.raises(RuntimeError, match=r"none lacks model.vision.weight"):
        running._require_towers(tmp_path / "base", tmp_path / "none")


def _sleep(*_: Any) -> Outcome:
    time.sleep(60)
    return Outcome("", "")


def _die(*_: Any) -> Outcome:
    os._exit(3)


def _pass(*_: Any) -> Outcome:
    return Outcome("recipe.yaml", "", accepted=True, stage="done")


@pytest.mark.parametrize(
    ("replacement", "why"),
    [(_sleep, "took longer than 1 s"), (_die, "the process ended with 3"), (_pass, "")],
)
def test_recipes_run_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: Any, replacement: Callable[..., Outcome], why: str
) -> None:
    file, examples = recipe(tmp_path)
    monkeypatch.setattr(command, "run", replacement)
    outcome = command.run_apart(file, examples, tmp_path, 1.0, {})
    assert (outcome.recipe, outcome.why, outcome.ran) == ("recipe.yaml", why, not why)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen/Qwen2.5-0.5B", "qwen2"),
        ("google/gemma-4-31B", "gemma4?"),
        ("mistralai/Ministral-3-3B-Reasoning-2512", "mistral3+ministral3"),
        ("somebody/Qwen3-MoE-2B", "qwen3_moe?"),
        ("somebody/zzz", "None"),
    ],
)
def test_the_type_of_a_checkpoint(name: str, kind: str) -> None:
    assert str(kind_of(name)) == kind


def test_a_twin_is_of_its_type(tmp_path: Path) -> None:
    tokenizer = make_tokenizer({"special_tokens": {"pad_token": "<|end_of_text|>"}}, ["some text"])
    made = make_checkpoint(
        kind_of("axolotl-ai-co/Mistral-Small-4-119B-2603-BF16"), tokenizer, tmp_path
    )
    config = AutoConfig.from_pretrained(tmp_path)
    assert made == "Mistral3ForConditionalGeneration" == config.architectures[0]
    assert (config.model_type, config.text_config.model_type) == ("mistral3", "mistral4")
    assert config.text_config.vocab_size == VOCAB >= len(tokenizer)
    assert config.dtype is torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path)("<|end_of_text|>").input_ids) == 1


@pytest.mark.parametrize("kind", ["AutoTokenizer", "CodeLlamaTokenizer"])
def test_a_tokenizer_knows_what_its_recipe_names(tmp_path: Path, kind: str) -> None:
    named = {"special_tokens": {"pad_token": "[PAD]"}, "eot_tokens": ["<end>"], "tokens": ["<x>"]}
    text = "It is the number 3.\n"
    made = make_tokenizer({**named, "tokenizer_type": kind}, [text] * 9)
    made.save_pretrained(tmp_path)
    read = CodeLlamaTokenizer if kind == "CodeLlamaTokenizer" else AutoTokenizer
    tokenizer = read.from_pretrained(tmp_path)
    assert len(tokenizer) <= VOCAB
    for token in ("[PAD]", "<end>", "<x>", "<s>", "</s>"):
        assert tokenizer.convert_tokens_to_ids(token) != tokenizer.unk_token_id
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) < len(text)  # it has merges
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZER_TEMPLATES)
def test_a_tokenizer_brings_the_template_of_its_kind(name: str) -> None:
    tokenizer = make_tokenizer({"chat_template": name}, ["text"])
    assert find_template(name, None, tokenizer) == tokenizer.chat_template
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )


def test_rows_have_the_fields_that_a_dataset_names() -> None:
    dataset = {
        "type": "chat_template", "field_messages": "conversations", "field_thinking": "thinking",
        "message_property_mappings": {"role": "from", "content": "value"},
    }  # fmt: skip
    (conversation,) = rows_of(dataset)[1].values()
    assert [set(m) for m in conversation] == [{"from", "value"}, {"from", "value", "thinking"}]
    assert set(rows_of({"type": "completion", "field": "chapter"})[0]) == {"chapter"}
    with pytest.raises(KeyError):
        rows_of({"type": "no.such"})
    assert "bradley_terry.chat_template" in PREFERENCE_TYPES


def test_only_recipes_are_taken_from_a_folder(tmp_path: Path) -> None:
    _, examples = recipe(tmp_path)
    (examples / "cloud.yaml").write_text("image: x\n")
    (examples / "list.yml").write_text("- 1\n")
    assert [file.name for file in examples_in(examples)] == ["recipe.yaml"]


# --- the page ------------------------------------------------------------------------------------


def test_the_page_is_of_the_outcomes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(*read_outcomes())


def test_readme_claims_what_ran() -> None:
    assert claim(read_outcomes()[1]) in README.read_text(encoding="utf-8")


def test_the_command_writes_page_and_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in (("PAGE", tmp_path / "page.md"), ("README", tmp_path / "README.md")):
        monkeypatch.setattr(pages, name, path)
    old = "1 of Axolotl's 2 examples are accepted, 1 ran on"
    (tmp_path / "README.md").write_text(f"before {old} after")
    pages.write_pages()
    assert (tmp_path / "README.md").read_text() == f"before {claim(read_outcomes()[1])} after"
    assert (tmp_path / "page.md").read_text() == PAGE.read_text(encoding="utf-8")
