"""A tiny model with a tokenizer, a few chats, and a recipe for them."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..conftest import OF_EXTRAS

try:
    from rich.console import Console

    from fusewright.train import train
    from fusewright.train.processes.signals import Stopped
    from fusewright.train.recipe.recipe import Recipe
except ModuleNotFoundError as error:
    if error.name not in OF_EXTRAS:
        raise
    pytest.skip(f"{error.name} is not installed", allow_module_level=True)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Let a run that a signal quits fail its test: pytest would end all tests."""
    try:
        return (yield)
    except Stopped as stopped:
        raise AssertionError(f"{stopped} has quit the run") from stopped


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte, except that two line breaks in a row are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocab = {t: i for i, t in enumerate([*specials, *alphabet, "ĊĊ"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=template,
    )


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 262, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def checked(base: Any, **keys: Any) -> Recipe:
    """A recipe for a model, without rows."""
    given = {"base_model": str(base), "datasets": [{"path": "x"}], "bf16": False}
    return Recipe.model_validate({**given, **keys})


def learnt(model: Any) -> Any:
    """Adapters, and whatever else is trained, that are not what they began as."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_adapter(folder: Path, model: Any = None, dtype: Any = None, **settings: Any) -> Path:
    """Save a base and an adapter with random weights for it, as plain PEFT does; its folder."""
    base = folder / "base"
    model = model if model is not None else make_model()
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(base, max_shard_size="40KB")
    make_tokenizer().save_pretrained(base)
    model.config._name_or_path = model.name_or_path = str(base)
    chosen = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(model, LoraConfig(**chosen))
    learnt(adapted).save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def chat(question: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def numbers(count: int = 40) -> list[dict[str, Any]]:
    """Chats of three lengths."""
    return [chat(f"What is {i}?", f"It is the number {i}, " * (1 + i % 3)) for i in range(count)]


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", numbers())


def small_recipe(base: Path, rows: Path, output: Path) -> dict[str, Any]:
    """Four steps of LoRA on the tiny model."""
    return {
        "base_model": str(base),
        "bf16": False,
        "optimize": False,
        "audit": False,
        "adapter": "lora",
        "lora_r": 4,
        "lora_target_linear": True,
        "datasets": [{"path": str(rows)}],
        "val_set_size": 8,
        "sequence_len": 128,
        "sample_packing": True,
        "micro_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "output_dir": str(output),
    }


@pytest.fixture
def recipe(base: Path, rows: Path, tmp_path: Path) -> dict[str, Any]:
    return small_recipe(base, rows, tmp_path / "out")


@pytest.fixture(scope="session")
def run_folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, to read from."""
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "rows.jsonl", numbers())
    recipe = {
        "base_model": str(base), "bf16": False, "adapter": "lora", "lora_r": 4,
        "lora_target_linear": True, "datasets": [{"path": str(rows), "type": "chat_template"}],
        "val_set_size": 8, "sequence_len": 128, "sample_packing": True, "micro_batch_size": 2,
        "max_steps": 6, "eval_steps": 2, "learning_rate": 1e-2, "codegen": "eager",
        "sample_prompt": "What is 3?", "sample_max_tokens": 8, "output_dir": str(folder / "out"),
    }  # fmt: skip
    return train(recipe, console=Console(quiet=True)).output_dir


@pytest.fixture
def run(run_folder: Path) -> dict[str, Any]:
    """What ``run.json`` of that run holds."""
    found: dict[str, Any] = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a LoRA run with a checkpoint and validation rows."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [chat(f"What is {i}?", f"It is the number {i}.") for i in range(40)]
    rows = write_rows(folder / "rows.jsonl", lines)
    recipe = {**small_recipe(base, rows, folder / "out"), "save_steps": 2}
    train(recipe, console=Console(quiet=True))
    return folder / "out"
