"""Recipes in the style of Axolotl's examples: accepted, or refused for what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from fusewright.errors import RecipeError
from fusewright.train import requirements, train
from fusewright.train.preflight import obstacles
from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.status import entries

from ..conftest import small_recipe

HEAD = """
base_model: some/model
datasets:
  - path: some/rows
    type: alpaca
val_set_size: 0.05
sequence_len: 512
output_dir: ./out
"""

ACCEPTED: dict[str, tuple[str, dict[str, str]]] = {
    "kernels of all kinds": (
        """
plugins:
  - axolotl.integrations.kernels.KernelsPlugin
  - axolotl.integrations.liger.LigerPlugin
use_kernels: true
use_scattermoe: true
experts_implementation: scattermoe
liger_rms_norm_gated: true
fused_attn_kernel: true
torch_compile: true
torch_compile_regional: true
selective_checkpointing: {save: [attention]}
sdpa_varlen: true
strict: false
""",
        {
            "plugins": "subsumed", "use_scattermoe": "subsumed", "experts_implementation":
            "subsumed", "liger_rms_norm_gated": "subsumed", "fused_attn_kernel": "subsumed",
            "selective_checkpointing": "subsumed", "torch_compile_regional": "subsumed",
        },
    ),
    "experts of transformers": ("experts_implementation: grouped_mm", {
        "experts_implementation": "honoured"}),
    "a template that the tokenizer brings": (
        "chat_template: qwen3_5\ndatasets: [{path: some/chats, type: chat_template}]",
        {"chat_template": "honoured"},
    ),
    "tokens as a mapping": (
        "tokens:\n  bos_token: <s>\n  pad_token: <pad>",
        {"special_tokens.bos_token": "honoured", "special_tokens.pad_token": "honoured"},
    ),
    "prompts of phi": ("datasets: [{path: some/rows, type: 'alpaca:phi'}]", {
        "datasets.0.type": "honoured"}),
    "quiz shows": ("datasets: [{path: some/rows, type: jeopardy}]", {
        "datasets.0.type": "honoured"}),
    "restarts that are off": (
        "relora: false\njagged_restart_steps: false\njagged_restart_anneal_steps: false",
        {"jagged_restart_steps": "honoured"},
    ),
    "perplexity": (
        "do_causal_lm_eval: true\neval_causal_lm_metrics: [perplexity]\neval_table_size: 2\n"
        "eval_steps: 0.5",
        {"do_causal_lm_eval": "honoured", "eval_causal_lm_metrics": "honoured",
         "eval_table_size": "not applicable"},
    ),
    "a stream": (
        "datasets:\npretraining_dataset: [{path: some/text, name: en, type: pretrain, "
        "text_column: text}]\nmax_steps: 10\nval_set_size: 0\nsample_packing: true",
        {"pretraining_dataset.0.text_column": "honoured"},
    ),
    "a stream of instructions": (
        "streaming: true\nmax_steps: 10\nval_set_size: 0",
        {"streaming": "honoured"},
    ),
    "segments in their order, mixed": (
        "datasets: [{path: some/rows, type: input_output, weight: 0.5}]\n"
        "curriculum_sampling: true",
        {"curriculum_sampling": "honoured", "datasets.0.weight": "honoured"},
    ),
    "an older release": (
        "flash_attention: true\nxformers_attention:\ngptq_groupsize:\nsage_attention: false\n"
        "max_packed_sequence_len:\nevaluation_strategy: steps\neval_steps: 10",
        {"flash_attention": "subsumed", "eval_strategy": "honoured"},
    ),
    "names of PyTorch": (
        "adam_eps: 1e-8\neta_min: 1e-6\nwarmup_steps: 0.1",
        {"adam_epsilon": "honoured", "eta_min": "honoured", "warmup_steps": "honoured"},
    ),
    "experts on several devices": (
        "expert_parallel_size: 2\ndp_shard_size: 2\nexperts_implementation: deep_ep\n"
        "plugins: [axolotl.integrations.expert_parallel.ExpertParallelPlugin]",
        {"expert_parallel_size": "subsumed", "plugins": "subsumed"},
    ),
    "parts of packed sequences": (
        "context_parallel_size: 2\nsample_packing: true\ndeepspeed: deepspeed_configs/zero3.json",
        {"context_parallel_size": "honoured", "sample_packing": "honoured"},
    ),
    "few bits in shards": (
        "fsdp: true\nadapter: lora\nlora_target_linear: true\nload_in_8bit: true\n"
        "quantize_moe_experts: true\noptimizer: paged_adamw_8bit",
        {"optimizer": "honoured", "quantize_moe_experts": "honoured"},
    ),
    "eight bits under DeepSpeed": (
        "deepspeed: deepspeed_configs/zero2.json\noptimizer: adamw_bnb_8bit",
        {"optimizer": "honoured"},
    ),
    "attention of the hub": (
        "attn_implementation: kernels-community/vllm-flash-attn3",
        {"attn_implementation": "honoured"},
    ),
    "restarts of adapters": (
        "relora: true\njagged_restart_steps: 150\njagged_restart_warmup_steps: 10\n"
        "jagged_restart_anneal_steps: false\nrelora_prune_ratio: 0.9\nrelora_cpu_offload: false\n"
        "adapter: qlora\nload_in_4bit: true\nlora_target_linear: true\noptimizer: adamw_bnb_8bit",
        {"relora": "honoured", "relora_prune_ratio": "honoured"},
    ),
    "Muon from random weights, by Ray": (
        "optimizer: muon\nreinit_weights: true\nuse_ray: true\nray_num_workers: 4",
        {"optimizer": "honoured", "reinit_weights": "honoured", "use_ray": "not applicable"},
    ),
}  # fmt: skip

REFUSED = {
    "a misspelt key": ("adam_epsi: 1e-8", "adam_epsi: is not a key of a recipe; did you mean adam"),
    "a placeholder": ("datasets: [{path: <your-dataset>}]", r"'<your-dataset>' is neither in"),
    "tokens twice": (
        "tokens: {bos_token: <s>}\nspecial_tokens: {eos_token: </s>}", "tokens: must be a list",
    ),
    "a misspelt name in tokens": ("tokens: {bos: <s>}", r"special_tokens\.bos: is not a key"),
    "metrics of generated text": (
        "do_causal_lm_eval: true\neval_causal_lm_metrics: [perplexity, chrf]\neval_steps: 9",
        "eval_causal_lm_metrics: .* is not yet available",
    ),
    "metrics without a name": ("do_causal_lm_eval: true", "needs eval_causal_lm_metrics"),
    "pruning": ("llmcompressor: {recipe: {}}", "llmcompressor: .* with LLM Compressor itself"),
    "quantized training of 8 bits": ("qat: {weight_dtype: int8}", "qat: there is no training of"),
    "restarts of adapters": (
        "relora: true\njagged_restart_steps: 9\nadapter: lora\nlora_target_linear: true\n"
        "fsdp: true",
        "relora: set this or fsdp, not both: merging needs whole weights",
    ),
    "shifted attention": ("s2_attention: true", "s2_attention: true is not yet available"),
    "no such template": ("chat_template: qwen33", "there is no template 'qwen33' here; did you"),
    "no such type of rows": ("datasets: [{path: a/b, type: jeopardi}]", "did you mean jeopardy"),
}  # fmt: skip


def values(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {**yaml.safe_load(HEAD), **yaml.safe_load(text)}
    return found


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name: str, tmp_path: Path) -> None:
    text, expected = ACCEPTED[name]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values(text)), encoding="utf-8")
    load_recipe(file)
    found = {entry.key: entry.status for entry in entries(check(file).values)}
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    text, expected = REFUSED[name]
    with pytest.raises(RecipeError, match=expected):
        load_recipe(values(text))


def test_a_template_that_the_tokenizer_brings_says_so() -> None:
    note = {e.key: e.note for e in entries(check(values("chat_template: gemma4")).values)}
    assert "tokenizer's own template" in note["chat_template"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("attn_implementation: flash_attention_2", "pip install flash-attn"),
        ("attn_implementation: xformers", "is not an attention of transformers"),
        ("flex_attention: true", "flex_attention: flex_attention needs a GPU"),
    ],
)
def test_an_attention_that_is_not_here_is_replaced_with_a_message(
    keys: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(requirements, "_is_there", lambda module: module != "flash_attn")
    recipe = load_recipe({**values(keys), "val_set_size": 0})
    assert [text for text in obstacles(recipe) if "attention" in text] == []
    name, message = requirements.attention(recipe)
    assert name is None
    assert message is not None
    assert said in message


def test_the_same_values_with_an_attention_that_is_not_here(
    base: Path, rows: Path, tmp_path: Path
) -> None:
    losses = []
    for name in ("xformers", "sdpa"):
        recipe = {**small_recipe(base, rows, tmp_path / name), "attn_implementation": name,
                  "max_steps": 2}  # fmt: skip
        console = Console(record=True, width=200, quiet=False, file=(tmp_path / "log").open("w"))
        losses.append([h.get("loss") for h in train(recipe, console=console).history])
        said = "attn_implementation: xformers is not an attention of transformers"
        assert console.export_text().count(said) == (name == "xformers")
    assert losses[0] == losses[1]


def test_perplexity_is_that_of_the_trained_tokens(recipe: dict[str, Any]) -> None:
    keys = {
        "eval_steps": 2,
        "do_causal_lm_eval": True,
        "eval_causal_lm_metrics": ["perplexity"],
        "metric_for_best_model": "perplexity",
        "load_best_model_at_end": True,
        "save_steps": 2,
    }
    result = train({**recipe, **keys}, console=Console(quiet=True))
    found = [h for h in result.history if "eval_loss" in h and h["step"]]
    assert len(found) >= 2
    for entry in found:
        assert entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
