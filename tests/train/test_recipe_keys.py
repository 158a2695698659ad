"""The keys themselves: each explains itself, has one status, and is read if it is honoured."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any, get_args

import pytest
from transformers.trainer_utils import HubStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from fusewright.train.docs import page
from fusewright.train.keys.adapter import PeftKeys
from fusewright.train.keys.base import Keys, aliases, extra_of
from fusewright.train.keys.dataset import Dataset, PretrainingDataset, PromptFormat
from fusewright.train.keys.model import SpecialTokens
from fusewright.train.keys.output import OutputKeys
from fusewright.train.keys.steps import OPTIMIZERS, SCHEDULERS
from fusewright.train.recipe import GROUPS, Recipe
from fusewright.train.schema import json_schema
from fusewright.train.yamlfile import load_recipe

ROOT = Path(__file__).resolve().parents[2]
MODELS: list[type[Keys]] = [
    Recipe, Dataset, PretrainingDataset, PromptFormat, SpecialTokens, PeftKeys,
]  # fmt: skip
STATUSES = ("honoured", "subsumed", "not applicable", "not yet available")


@pytest.mark.parametrize("model", MODELS)
def test_every_key_explains_itself(model: type[Keys]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.description.endswith("."), name
        if not field.is_required() and field.get_default(call_default_factory=True) is None:
            assert "nset" in field.description, f"{name}: what does null mean?"
        extra = extra_of(field)
        status = extra.get("status", "honoured")
        assert status in STATUSES, name
        assert bool(extra.get("note")) == (status != "honoured"), f"{name}: why?"
        for special in extra.get("values", ()):
            assert special["status"] in STATUSES, name
            assert special["note"], name


def test_the_vocabulary_is_whole() -> None:
    assert len(Recipe.model_fields) >= 150
    assert sum(len(g.__annotations__) for g in GROUPS) == len(Recipe.model_fields), (
        "a key in two groups"
    )
    taken = set(Recipe.model_fields)
    for old, new in aliases(Recipe).items():
        assert old not in taken
        assert new in taken


NOT_READ_YET = frozenset(
    [
        "accelerator_config",
        "added_tokens_overrides",
        "auto_find_batch_size",
        "auto_resume_from_checkpoints",
        "bnb_config_kwargs",
        "chat_template_kwargs",
        "cls_model_config",
        "comet_api_key",
        "comet_experiment_key",
        "comet_mode",
        "comet_online",
        "comet_workspace",
        "cosine_constant_lr_ratio",
        "cosine_min_lr_ratio",
        "curriculum_sampling",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_exact_deduplication",
        "dataset_keep_in_memory",
        "dataset_processes",
        "dataset_shard_idx",
        "dataset_shard_num",
        "default_system_message",
        "device_map",
        "drop_system_message",
        "ds_type",
        "early_stopping_patience",
        "embedding_lr",
        "embedding_lr_scale",
        "eot_tokens",
        "eval_batch_size",
        "eval_delay",
        "eval_sequence_len",
        "field",
        "field_human",
        "field_input",
        "field_instruction",
        "field_model",
        "field_output",
        "field_system",
        "field_thinking",
        "field_tools",
        "gc_steps",
        "gradient_checkpointing_kwargs",
        "greater_is_better",
        "group_by_length",
        "hf_mlflow_log_artifacts",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "input_format",
        "label_smoothing_factor",
        "load_best_model_at_end",
        "load_in_4bit",
        "load_in_8bit",
        "log_on_each_node",
        "logging_first_step",
        "lora_bias",
        "lora_exclude_modules",
        "lora_fan_in_fan_out",
        "lora_modules_to_save",
        "lora_target_parameters",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
        "loss_watchdog_patience",
        "loss_watchdog_threshold",
        "lr_div_factor",
        "lr_quadratic_warmup",
        "lr_scheduler_kwargs",
        "mean_resizing_embeddings",
        "message_field_content",
        "message_field_role",
        "message_field_training",
        "message_field_training_detail",
        "metric_for_best_model",
        "min_sample_len",
        "mlflow_run_name",
        "model_type",
        "neftune_noise_alpha",
        "optim_args",
        "optim_target_modules",
        "overrides_of_model_config",
        "overrides_of_model_kwargs",
        "pad_to_sequence_len",
        "peft_autocast_adapter_dtype",
        "peft_ensure_weight_tying",
        "peft_init_lora_weights",
        "peft_layer_replication",
        "peft_layers_pattern",
        "peft_layers_to_transform",
        "peft_trainable_token_indices",
        "peft_use_dora",
        "peft_use_rslora",
        "pretrain_multipack_attn",
        "resize_token_embeddings_to_32x",
        "revision",
        "revision_of_model",
        "roles",
        "roles_to_train",
        "sample_packing_bin_size",
        "sample_packing_group_size",
        "sample_packing_sequentially",
        "save_first_step",
        "save_only_model",
        "shards",
        "shards_idx",
        "shrink_embeddings",
        "shuffle_before_merging_datasets",
        "shuffle_merged_datasets",
        "skip",
        "skip_prepare_dataset",
        "special_tokens",
        "split_thinking",
        "streaming_multipack_buffer_size",
        "template_thinking_key",
        "tf32",
        "tokenizer_legacy",
        "tokenizer_type",
        "tokenizer_use_fast",
        "torch_empty_cache_steps",
        "trackio_run_name",
        "trackio_space_id",
        "train_on_eos",
        "train_on_eot",
        "unfrozen_parameters",
        "wandb_entity",
        "wandb_log_model",
        "wandb_name",
        "wandb_run_id",
        "wandb_watch",
        "weight",
    ]
)
"""Keys whose readers are not merged yet; empty once they are."""


def _read_names() -> set[str]:
    """The attributes of recipes and datasets that the engine reads, outside the keys."""
    found: set[str] = set()
    owners = {"recipe", "dataset", "form"}
    for path in (ROOT / "src" / "train").rglob("*.py"):
        if "keys" in path.parts:
            continue
        mine = owners | ({"self"} if path.name == "recipe.py" else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", None)
                if name in mine:
                    found.add(node.attr)
    return found


def test_honoured_keys_are_read() -> None:
    read = _read_names()
    for model in (Recipe, Dataset):
        honoured = {
            name
            for name, field in model.model_fields.items()
            if extra_of(field).get("status", "honoured") == "honoured"
        }
        assert honoured - read - NOT_READ_YET == set()


def test_names_are_those_of_transformers() -> None:
    assert {o.value for o in OptimizerNames} <= set(get_args(OPTIMIZERS))
    assert {s.value for s in SchedulerType} <= set(get_args(SCHEDULERS))
    strategies = get_args(get_args(OutputKeys.model_fields["hub_strategy"].annotation)[0])
    assert {h.value for h in HubStrategy} <= set(strategies)


def test_the_schema_says_all_about_each_key() -> None:
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, key in model["properties"].items():
            assert key.get("deprecated") or (key["description"] and key["status"] in STATUSES), name
    learning_rate = schema["properties"]["learning_rate"]
    assert learning_rate["anyOf"] == [{"exclusiveMinimum": 0, "type": "number"}, {"type": "null"}]
    assert learning_rate["default"] == 2e-4
    assert schema["properties"]["rl"]["status"] == "not yet available"
    assert schema["required"] == ["base_model"]
    assert schema["properties"]["model_config"]["deprecated"]
    assert schema["additionalProperties"] is False


def test_the_page_of_keys_is_up_to_date() -> None:
    written = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m fusewright.train.docs docs/recipes.md"


@pytest.mark.parametrize(("old", "new"), aliases(Recipe).items())
def test_older_names(old: str, new: str) -> None:
    value: Any = {"a": 1} if "model_" in new else 0.5
    value = "main" if "revision" in new or new == "model_type" else value
    value = {"eval_strategy": "no"}.get(new, value)
    value = 3 if new in ("dataset_processes", "eval_max_new_tokens") or "buffer" in new else value
    recipe = load_recipe({"base_model": "a/b", "datasets": [{"path": "a/b"}], old: value})
    assert getattr(recipe, new) == value
