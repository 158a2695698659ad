"""The keys of several processes: what each of them becomes, and which do not go together."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from fusewright.errors import RecipeError
from fusewright.train.inference.run_recipe import written
from fusewright.train.model.quantize import quant_storage
from fusewright.train.recipe.deepspeed_config import built_in, built_in_names
from fusewright.train.recipe.json_schema import json_schema
from fusewright.train.recipe.keys.base import extra_of
from fusewright.train.recipe.keys.distributed import FsdpKeys
from fusewright.train.recipe.load import check, load_recipe
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.recipe.status import entries, messages
from fusewright.train.recipe.strategy import (
    Fsdp,
    Strategy,
    ddp_arguments,
    strategy_of,
)

from ..commands import fusewright

BASE: dict[str, Any] = {"base_model": "a/b", "datasets": [{"path": "a/b"}]}
QLORA = {"adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True}
PLAIN = Fsdp(
    wrap="transformer", classes=(), min_num_params=0, reshard_after_forward=True,
    offload_params=False, pin_memory=True,
    activation_checkpointing=False, state_dict_type="FULL_STATE_DICT", mixed_precision=None,
)  # fmt: skip


def recipe(**keys: Any) -> Recipe:
    return load_recipe({**BASE, **keys})


def refused(**keys: Any) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe({**BASE, **keys})
    return str(error.value)


def status(**keys: Any) -> dict[str, tuple[str, str]]:
    checked = check({**BASE, **keys})
    return {e.key: (e.status, e.note) for e in entries(checked.values, checked.recipe)}


def test_without_any_of_them_it_is_ddp() -> None:
    assert recipe().strategy() == Strategy("ddp")
    off = {"fsdp": [], "fsdp_config": {}, "deepspeed": None, "fsdp_version": 2}
    assert recipe(**off).strategy() == Strategy("ddp")
    assert recipe(fsdp_config={"offload_params": None}).strategy() == Strategy("ddp")
    assert recipe(fsdp=False, fsdp_config={"offload_params": True}).strategy() == Strategy("ddp")


@pytest.mark.parametrize(
    "said",
    [
        True,
        "full_shard",
        "full_shard auto_wrap",
        "FULL_SHARD, AUTO_WRAP",
        ["full_shard", "auto_wrap"],
        ["auto_wrap", "full_shard"],
    ],
)
def test_fsdp_by_its_options(said: Any) -> None:
    assert recipe(fsdp=said).strategy() == Strategy("fsdp", PLAIN)


OPTIONS: list[tuple[str, Any, dict[str, Any]]] = [
    ("version", 1, {}),
    ("version", 2, {}),
    ("auto_wrap_policy", "TRANSFORMER_BASED_WRAP", {}),
    ("auto_wrap_policy", "no_wrap", {"wrap": "none"}),
    ("min_num_params", 1000, {"wrap": "size", "min_num_params": 1000}),
    ("min_num_params", 0, {}),
    ("transformer_layer_cls_to_wrap", "LlamaDecoderLayer", {"classes": ("LlamaDecoderLayer",)}),
    ("transformer_layer_cls_to_wrap", "A, B", {"classes": ("A", "B")}),
    ("transformer_layer_cls_to_wrap", ["A", "B"], {"classes": ("A", "B")}),
    ("reshard_after_forward", True, {}),
    ("reshard_after_forward", False, {"reshard_after_forward": False}),
    ("reshard_after_forward", "SHARD_GRAD_OP", {"reshard_after_forward": False}),
    ("sharding_strategy", "FULL_SHARD", {}),
    ("sharding_strategy", 1, {}),
    ("sharding_strategy", "shard_grad_op", {"reshard_after_forward": False}),
    ("sharding_strategy", 2, {"reshard_after_forward": False}),
    ("offload_params", True, {"offload_params": True}),
    ("offload_params", False, {}),
    ("cpu_offload_pin_memory", False, {"pin_memory": False}),
    ("activation_checkpointing", True, {"activation_checkpointing": True}),
    ("state_dict_type", "FULL_STATE_DICT", {}),
    ("state_dict_type", "SHARDED_STATE_DICT", {"state_dict_type": "SHARDED_STATE_DICT"}),
    ("state_dict_type", "LOCAL_STATE_DICT", {"state_dict_type": "SHARDED_STATE_DICT"}),
    ("mixed_precision_policy", "bf16", {"mixed_precision": "bfloat16"}),
    ("mixed_precision_policy", "fp16", {"mixed_precision": "float16"}),
    ("mixed_precision_policy", "float32", {"mixed_precision": "float32"}),
    ("activation_checkpointing_offload", True, {}),
    ("final_state_dict_type", "SHARDED_STATE_DICT", {}),
    ("use_orig_params", False, {}),
    ("sync_module_states", True, {}),
    ("limit_all_gathers", True, {}),
    ("backward_prefetch", "BACKWARD_PRE", {}),
    ("forward_prefetch", True, {}),
]


@pytest.mark.parametrize(("name", "value", "changed"), OPTIONS)
def test_an_option_of_fsdp(name: str, value: Any, changed: dict[str, Any]) -> None:
    expected = Strategy("fsdp", replace(PLAIN, **changed))
    assert recipe(fsdp_config={name: value}).strategy() == expected
    assert recipe(fsdp=True, fsdp_config={f"fsdp_{name}": value}).strategy() == expected
    if f"fsdp_{name}" not in Recipe.model_fields:
        assert recipe(**{f"fsdp_{name}": value}).strategy() == expected
        by_command = load_recipe(BASE, {f"fsdp_config.fsdp_{name}": value})
        assert by_command.strategy() == expected


def test_every_honoured_option_of_fsdp_is_tested() -> None:
    changes = {name for name, _, changed in OPTIONS if changed}
    for name, field in FsdpKeys.model_fields.items():
        said = extra_of(field).get("status", "honoured")
        assert (said == "honoured") == (name in changes | {"version"}), name
    seen = {name for _, _, changed in OPTIONS for name in changed}
    assert seen == {field.name for field in fields(Fsdp)}


def test_size_based_wrapping_needs_a_size() -> None:
    config = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 5}
    assert recipe(fsdp_config=config).strategy().fsdp == replace(
        PLAIN, wrap="size", min_num_params=5
    )
    said = refused(fsdp_config={"auto_wrap_policy": "SIZE_BASED_WRAP"})
    assert "fsdp_config.auto_wrap_policy: SIZE_BASED_WRAP needs min_num_params" in said


@pytest.mark.parametrize(
    ("keys", "reshards"),
    [
        ({"fsdp": ["hybrid_shard", "auto_wrap"]}, True),
        ({"fsdp": "hybrid_shard_zero2"}, False),
        ({"fsdp_config": {"sharding_strategy": "HYBRID_SHARD"}}, True),
        ({"fsdp_config": {"sharding_strategy": 5}}, False),
    ],
)
def test_hybrid_sharding_needs_the_number_of_copies(keys: dict[str, Any], reshards: bool) -> None:
    expected = Strategy("fsdp", replace(PLAIN, reshard_after_forward=reshards), replicate=2)
    assert recipe(**keys, dp_replicate_size=2).strategy() == expected
    assert "HYBRID_SHARD" in refused(**keys)
    assert "needs dp_replicate_size" in refused(**keys, dp_shard_size=2)


@pytest.mark.parametrize(
    "keys",
    [
        {"fsdp": ["no_shard"]},
        {"fsdp_config": {"sharding_strategy": "NO_SHARD", "offload_params": True}},
        {"fsdp_config": {"reshard_after_forward": "no_shard"}},
    ],
)
def test_no_shard_is_ddp(keys: dict[str, Any]) -> None:
    assert recipe(**keys).strategy() == Strategy("ddp")


def test_offload_as_a_word() -> None:
    found = recipe(fsdp=["full_shard", "offload"]).strategy().fsdp
    assert found == replace(PLAIN, offload_params=True)


def test_the_same_sharding_may_be_said_twice() -> None:
    config = {"sharding_strategy": "FULL_SHARD", "reshard_after_forward": True}
    assert recipe(fsdp=["full_shard"], fsdp_config=config).strategy() == Strategy("fsdp", PLAIN)
    both = {"state_dict_type": "SHARDED_STATE_DICT"}
    found = recipe(fsdp_config=both, **both).strategy().fsdp
    assert found == recipe(fsdp=True, **both).strategy().fsdp
    assert found == replace(PLAIN, state_dict_type="SHARDED_STATE_DICT")


SIZES: list[tuple[dict[str, Any], int | None, list[int], dict[int, str]]] = [
    ({}, None, [1, 2, 3, 8], {}),
    ({"ddp": True}, None, [1, 2], {}),
    ({"ddp": False}, 1, [1], {2: "ddp: false means one process, but 2 processes run: remove it"}),
    (
        {"lisa_n_layers": 1, "lisa_step_interval": 2},
        1,
        [1],
        {2: "lisa_n_layers: 1 means one process, but 2 processes run: remove it, or start one"},
    ),
    ({"async_save": True}, 1, [1], {2: "async_save: true means one process, but 2 processes run"}),
    (
        {"dp_replicate_size": 4},
        4,
        [4],
        {2: "dp_replicate_size: 4 processes are needed, but 2 processes run: start 4"},
    ),
    ({"fsdp": True}, None, [1, 2, 8], {}),
    ({"fsdp": True, "dp_shard_size": 1, "dp_replicate_size": 1}, None, [1, 2, 8], {}),
    (
        {"fsdp": True, "dp_shard_size": 2},
        2,
        [2],
        {
            1: "dp_shard_size: 2 times dp_replicate_size: 1 is 2, but 1 process runs: start 2",
            4: "or set sizes whose product is 4",
        },
    ),
    ({"fsdp": True, "dp_shard_size": 2, "dp_replicate_size": 3}, 6, [6], {8: "is 6, but 8"}),
    (
        {"fsdp": True, "dp_replicate_size": 2},
        None,
        [2, 4, 6],
        {3: "dp_replicate_size: 2 copies of the model cannot share the processes, of which 3"},
    ),
    ({"deepspeed": "deepspeed_configs/zero3.json"}, None, [1, 2, 8], {}),
    (
        {"tensor_parallel_size": 2},
        2,
        [2],
        {
            1: "tensor_parallel_size: 2 needs 2 processes, but 1 process runs: start 2 (e.g. --np",
            4: "or set fsdp: true to train on several groups",
        },
    ),
    (
        {"tensor_parallel_size": 2, "fsdp": True},
        None,
        [2, 4, 6],
        {3: "tensor_parallel_size: 2 needs a multiple of 2 processes, but 3 processes run"},
    ),
    (
        {"tensor_parallel_size": 2, "fsdp": True, "dp_shard_size": 2, "dp_replicate_size": 2},
        8,
        [8],
        {4: "2 times dp_shard_size: 2 times dp_replicate_size: 2 is 8 processes, but 4 processes"},
    ),
    (
        {"context_parallel_size": 8, "fsdp": True, "dp_shard_size": 1},
        None,
        [8, 16],
        {4: "context_parallel_size: 8 needs a multiple of 8 processes, but 4 processes run"},
    ),
]


PARALLEL = {
    "fsdp_version": 2,
    "fsdp_config": {
        "offload_params": False, "state_dict_type": "FULL_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True,
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    },
    "bf16": True, "tf32": True, "flash_attention": True, "gradient_checkpointing": True,
}  # fmt: skip


def test_recipes_of_several_dimensions_need_no_change() -> None:
    """Axolotl's examples: copies, shards and layers; and long sequences over all devices."""
    keys = {"dp_shard_size": 2, "dp_replicate_size": 2, "tensor_parallel_size": 2}
    found = recipe(**PARALLEL, **keys, sample_packing=True).strategy()
    assert (found.shard, found.replicate, found.tensor, found.world()) == (2, 2, 2, 8)
    ring = {"size": 8, "backend": "auto", "load_balance": "auto", "ring_impl": "auto"}
    long = recipe(**PARALLEL, dp_shard_size=1, context_parallel=ring, sample_packing=False)
    assert (long.strategy().context, long.attention()) == (8, "sdpa")
    said = status(**PARALLEL, context_parallel=ring)
    assert said["context_parallel.size"] == ("honoured", "")
    assert said["context_parallel.backend"] == ("subsumed", "torch's own ring attention")
    three = {"dp_shard_size": 2, "context_parallel_size": 2, "tensor_parallel_size": 2}
    options = {**PARALLEL, **three, "heads_k_stride": 1, "ring_attn_func": "varlen_llama3"}
    del options["flash_attention"]
    asked = recipe(**options, attn_implementation="flash_attention_2")
    assert asked.strategy().world() == 8
    assert asked.attention() == "sdpa"
    kind, note = status(**options, attn_implementation="flash_attention_2")["attn_implementation"]
    assert kind == "not applicable"
    assert (
        note == "context_parallel_size needs torch's own attention, which has a flash kernel, too"
    )
    assert {status(**options)[key][0] for key in ("heads_k_stride", "ring_attn_func")} == {
        "subsumed"
    }


@pytest.mark.parametrize(("keys", "world", "right", "wrong"), SIZES)
def test_numbers_of_processes(
    keys: dict[str, Any], world: int | None, right: list[int], wrong: dict[int, str]
) -> None:
    strategy = recipe(**keys).strategy()
    assert strategy.world() == world
    for size in right:
        strategy.require_world(size)
    for size, said in wrong.items():
        with pytest.raises(RecipeError) as error:
            strategy.require_world(size)
        assert said in str(error.value)


# --- DeepSpeed -----------------------------------------------------------------------------------


def test_a_configuration_of_deepspeed_is_read_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    (tmp_path / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        "base_model: a/b\ndatasets: [{path: a/b}]\ndeepspeed: ds.json\n", encoding="utf-8"
    )
    found = load_recipe(tmp_path / "recipe.yaml")
    assert found.deepspeed == str(tmp_path / "ds.json")
    assert strategy_of(found) == Strategy("deepspeed", deepspeed=config)
    assert recipe(deepspeed=config).strategy() == strategy_of(found)
    (tmp_path / "ds.json").unlink()
    with pytest.raises(RecipeError, match=r"deepspeed: there is no file .*ds\.json"):
        strategy_of(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            None,
            "deepspeed: there is no file ds.json next to the recipe or in the current folder; t",
        ),
        ("{", "ds.json, line 1 is not valid JSON: "),
        ('{"a": 1,}', "ds.json, line 1 is not valid JSON: "),
        ('{"a": 1, "a": 2}', "the key 'a' is duplicated in one object"),
        ("[1]", "ds.json must hold one JSON object, a configuration of DeepSpeed"),
        (b"\xff\xfe", "ds.json cannot be read: "),
        ('{"zero_optimization": 3}', "ds.json: zero_optimization must be keys and values, not 3"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage must be 1, 2 or 3; r"),
        (
            '{"gradient_clipping": 1.0}',
            "ds.json: zero_optimization.stage must be 1, 2 or 3; remove ",
        ),
        (
            '{"bf16": true}',
            'ds.json: bf16 must be keys and values, such as {"enabled": "auto"}, not',
        ),
        (
            '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}',
            "ds.json: optimizer: the recipe's optimizer, learning_rate, weight_decay and adam_* "
            "say this: remove the section",
        ),
        (
            '{"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}',
            "scheduler: the recipe's lr_scheduler, warmup_",
        ),
        (
            '{"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 4}',
            "train_micro_batch_size_per_gpu is 4, but micro_batch_size is 2: write auto for it in "
            "the configuration, or set micro_batch_size: 4",
        ),
        (
            '{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 2}',
            "gradient_accumulation_steps is 2, but gradient_accumulation_steps is 3: write auto",
        ),
        (
            '{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}',
            "gradient_clipping is 0.5, but max_grad_norm is 1.0: w",
        ),
    ],
)
def test_a_file_that_is_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "ds.json").write_bytes(data)
    message = refused(deepspeed="ds.json", micro_batch_size=2, gradient_accumulation_steps=3)
    assert message.startswith("the recipe, deepspeed: ")
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", built_in_names())
def test_the_names_that_recipes_use_need_no_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = f"deepspeed_configs/{name}"
    found = recipe(deepspeed=named)
    config = found.strategy().deepspeed
    assert config is not None
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert ("offload_param" in zero) == ("cpuoffload" in name)
    assert ("offload_optimizer" in zero) == ("zero2" in name or "all" in name)
    assert config == recipe(deepspeed=name).strategy().deepspeed == built_in(named)
    assert status(deepspeed=named)["deepspeed"][0] == "honoured"
    assert "fusewright's own configuration" in status(deepspeed=named)["deepspeed"][1]
    assert any(f"deepspeed: {named}: there is no such file" in line for line in messages(found))
    # a file of that name is what counts
    (tmp_path / "deepspeed_configs").mkdir()
    (tmp_path / named).write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert recipe(deepspeed=named).strategy().deepspeed == {"zero_optimization": {"stage": 1}}
    assert status(deepspeed=named)["deepspeed"] == ("honoured", "")
    assert messages(recipe(deepspeed=named)) == []


def test_a_name_elsewhere_is_a_file() -> None:
    assert "there is no file mine/zero3.json" in refused(deepspeed="mine/zero3.json")


@pytest.mark.parametrize("name", built_in_names())
def test_deepspeed_takes_our_configurations(name: str) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config", reason="deepspeed not installed")
    config = built_in(name)
    assert config is not None
    given = {k: v for k, v in config["zero_optimization"].items() if v != "auto"}
    assert set(config["zero_optimization"]) <= {
        key
        for name, field in zero.DeepSpeedZeroConfig.model_fields.items()
        for key in (name, field.alias)
    }
    assert zero.DeepSpeedZeroConfig(**given).stage == int(name[4])


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusewright.train import requirements

    find = requirements.importlib.util.find_spec
    monkeypatch.setattr(
        requirements.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "deepspeed" else find(name, *rest),
    )
    assert requirements.missing_packages(recipe(deepspeed="zero1.json")) == [
        "deepspeed: needs the package deepspeed, which is not installed: "
        'pip install "fusewright[distributed]"'
    ]
    assert requirements.missing_packages(recipe(fsdp=True)) == []


# --- what depends on it --------------------------------------------------------------------------


def test_arguments_of_ddp() -> None:
    keys = {
        "ddp_timeout": 60, "ddp_bucket_cap_mb": 25, "ddp_broadcast_buffers": False,
        "ddp_find_unused_parameters": True,
    }  # fmt: skip
    assert ddp_arguments(recipe(**keys)) == keys
    assert ddp_arguments(recipe(**keys, fsdp=True)) == {"ddp_timeout": 60}
    assert ddp_arguments(recipe(**keys, deepspeed="zero1.json")) == {"ddp_timeout": 60}
    assert ddp_arguments(recipe()) == {}
    found = status(**keys, fsdp=True)
    assert found["ddp_timeout"][0] == "honoured"
    assert found["ddp_bucket_cap_mb"] == (
        "not applicable",
        "only DDP reads it, and fsdp shards the model",
    )


@pytest.mark.parametrize(
    ("keys", "storage"),
    [
        ({}, None),
        ({"fsdp": True}, "auto"),
        ({"fsdp": True, "bf16": True}, "bfloat16"),
        ({"fsdp": True, "float32": True, "bf16": False}, "float32"),
        ({"fsdp": "no_shard", "bf16": True}, None),
        ({"deepspeed": "zero2.json", "bf16": True}, None),
        ({"deepspeed": "zero3.json", "bf16": True}, "bfloat16"),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_storage": "float16"}}, "float16"),
        ({"fsdp": True, "bnb_config_kwargs": {"bnb_4bit_quant_storage": "uint8"}}, "uint8"),
        ({"fsdp": True, "bnb_config_kwargs": {"bnb_4bit_compute_dtype": "float16"}}, "float16"),
    ],
)
def test_storage_of_weights_of_four_bits(keys: dict[str, Any], storage: str | None) -> None:
    assert quant_storage(recipe(**QLORA, **keys)) == storage
    sharded = {k: v for k, v in keys.items() if k != "bnb_config_kwargs"}
    assert quant_storage(recipe(**sharded)) is None


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({}, "uint8"),
        ({"fsdp": True}, "float32"),
        ({"fsdp": True, "bf16": True}, "bfloat16"),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_storage": "bfloat16"}}, "bfloat16"),
    ],
)
def test_the_storage_reaches_bitsandbytes(keys: dict[str, Any], name: str) -> None:
    import torch

    from fusewright.train.model.quantize import quantization

    dtype = torch.bfloat16 if keys.get("bf16") else torch.float32
    config = quantization(recipe(**QLORA, **keys), dtype)
    assert config.bnb_4bit_quant_storage == getattr(torch, name)


# --- what is said --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "key", "expected", "said"),
    [
        ({"fsdp": True}, "fsdp", "honoured", ""),
        ({"fsdp_config": {"version": 1}}, "fsdp_config.version", "subsumed", "FSDP2"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config.version", "honoured", ""),
        (
            {"fsdp_config": {"use_orig_params": True}},
            "fsdp_config.use_orig_params", "subsumed", "original parameters",
        ),
        (
            {"fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}},
            "fsdp_config.state_dict_type", "subsumed", "SHARDED_STATE_DICT",
        ),
        (
            {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}},
            "fsdp_config.state_dict_type", "honoured", "",
        ),
        (
            {"fsdp": True, "state_dict_type": "SHARDED_STATE_DICT"},
            "state_dict_type", "honoured", "",
        ),
        ({"fsdp": True, "state_dict_type": "FULL_STATE_DICT"}, "state_dict_type", "honoured", ""),
        (
            {"fsdp_config": {"fsdp_offload_params": True}},
            "fsdp_config.offload_params", "honoured", "",
        ),
        (
            {"fsdp_config": {"sharding_strategy": "NO_SHARD", "offload_params": True}},
            "fsdp_config.offload_params", "not applicable", "NO_SHARD is DDP",
        ),
        (
            {"fsdp": False, "fsdp_config": {"offload_params": True}},
            "fsdp_config.offload_params", "not applicable", "fsdp is false",
        ),
        (
            {"fsdp_config": {"min_num_params": 5, "transformer_layer_cls_to_wrap": "A"}},
            "fsdp_config.min_num_params", "not applicable", "SIZE_BASED_WRAP",
        ),
        (
            {"fsdp_config": {"auto_wrap_policy": "NO_WRAP", "transformer_layer_cls_to_wrap": "A"}},
            "fsdp_config.transformer_layer_cls_to_wrap", "not applicable", "TRANSFORMER_BASED",
        ),
        (
            {"fsdp_config": {"cpu_offload_pin_memory": True}},
            "fsdp_config.cpu_offload_pin_memory", "not applicable", "offload_params",
        ),
        ({"fsdp": "offload", "fsdp_config": {"cpu_offload_pin_memory": True}},
         "fsdp_config.cpu_offload_pin_memory", "honoured", ""),
        ({"state_dict_type": "FULL_STATE_DICT"}, "state_dict_type", "not applicable", "FSDP"),
        ({"fsdp": True, "ddp": True}, "ddp", "not applicable", "only DDP"),
        ({"ddp": True}, "ddp", "honoured", ""),
        ({"fsdp_version": 2}, "fsdp_version", "not applicable", "set fsdp: true or fsdp_config"),
        ({"fsdp_version": 2, "fsdp": True}, "fsdp_version", "subsumed", "FSDP2"),
        ({"fsdp_version": 2, "fsdp": False}, "fsdp_version", "subsumed", "FSDP2"),
        ({"world_size": 2}, "world_size", "not applicable", "launcher"),
        ({"deepcompile": True}, "deepcompile", "subsumed", "compiler"),
        ({"context_parallel_size": 1}, "context_parallel_size", "honoured", ""),
        ({"sequence_parallel_degree": 1}, "context_parallel_size", "honoured", ""),
    ],
)  # fmt: skip
def test_statuses(keys: dict[str, Any], key: str, expected: str, said: str) -> None:
    found, note = status(**keys)[key]
    assert found == expected
    assert said in note


OLD = """\
base_model: some/model
datasets: [{path: some/rows}]
fsdp:
  - full_shard
  - auto_wrap
fsdp_config:
  fsdp_limit_all_gathers: true
  fsdp_offload_params: true
  fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer
fsdp_activation_checkpointing: true
"""


@pytest.mark.parametrize(
    ("words", "number", "said"),
    [
        (["--nproc", "3"], None, "start a multiple of 2"),
        (["--nproc", "some"], None, "neither a number of processes nor gpu"),
        ([], "3", "start a multiple of 2"),
        (["--nproc", "4"], None, ""),
        ([], None, ""),
    ],
)
def test_a_dry_run_says_whether_the_number_of_processes_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], number: str | None, said: str
) -> None:
    if number is not None:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": number}.items():
            monkeypatch.setenv(name, value)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{OLD}dp_replicate_size: 2\n", encoding="utf-8")
    result = fusewright("train", str(path), "--dry-run", *words)
    assert result.exit_code == (2 if said else 0), result.stderr
    assert said in result.stderr


def test_a_dry_run_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "recipe.yaml"
    path.write_text(OLD, encoding="utf-8")
    result = fusewright("train", str(path), "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "")


def test_a_dry_run_shows_keys_by_the_names_that_they_have_now(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(OLD, encoding="utf-8")
    words = ("--fsdp_state_dict_type=FULL_STATE_DICT", "--verbose")
    result = fusewright("train", str(path), "--dry-run", *words)
    assert result.exit_code == 0, result.stderr
    table = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "fsdp_config.offload_params 8 honoured true" in table
    assert "fsdp_config.activation_checkpointing 10 honoured true" in table
    assert "fsdp_config.state_dict_type set honoured FULL_STATE_DICT" in table
    assert any(line.startswith("fsdp_config.limit_all_gathers 7 subsumed true") for line in table)
    again = tmp_path / "again.yaml"
    resolved = result.stdout.partition("# the recipe with its defaults")[2].partition("\n")[2]
    again.write_text(resolved, encoding="utf-8")
    assert load_recipe(again).strategy() == Strategy(
        "fsdp",
        replace(
            PLAIN, classes=("LlamaDecoderLayer",), offload_params=True,
            activation_checkpointing=True,
        ),
    )  # fmt: skip


def test_older_names_on_the_command_line_are_switches() -> None:
    words = ("--fsdp_offload_params", "--no-fsdp_config.fsdp_cpu_ram_efficient_loading")
    from fusewright.train.recipe.overrides import parse_overrides

    given = parse_overrides([*words, "--fsdp"])
    found = load_recipe(BASE, given)
    assert found.fsdp is True
    assert found.fsdp_config == FsdpKeys(offload_params=True, cpu_ram_efficient_loading=False)


def test_a_mistake_in_an_older_name_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(OLD.replace("params: true", "params: 7"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"line 8: fsdp_config\.offload_params: must be true or"):
        load_recipe(path)
    path.write_text(OLD.replace("ing: true", "ing: 7"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"line 10: fsdp_config\.activation_checkpointing: must"):
        load_recipe(path)


def test_the_schema_has_older_names_where_they_may_stand() -> None:
    schema = json_schema()
    group = schema["$defs"]["FsdpKeys"]["properties"]
    reference = "#/$defs/FsdpKeys/properties/offload_params"
    for place in (group["fsdp_offload_params"], schema["properties"]["fsdp_offload_params"]):
        assert place == {"$ref": reference, "deprecated": True}
    assert group["offload_params"]["status"] == "honoured"
    assert "fsdp_version" in schema["properties"]
    assert not schema["properties"]["fsdp_version"].get("deprecated")


def test_a_recorded_recipe_is_the_same() -> None:
    keys = {"fsdp_config": {"offload_params": True}, "dp_replicate_size": 2}
    first = recipe(**keys)
    again = Recipe.model_validate(written(first.recorded()))
    assert again.strategy() == first.strategy()
    assert Recipe.model_validate(written(recipe().recorded())).strategy() == Strategy("ddp")
    # what versions before recorded of each run
    older = {**recipe().recorded(), "sequence_parallel_degree": 1, "dp_shard_size": 1}
    assert Recipe.model_validate(written(older)).strategy() == Strategy("ddp")


@pytest.mark.parametrize(
    "keys",
    [
        {"fsdp": True, "optimizer": "adamw_torch_8bit"},
        {"fsdp": ["no_shard"], "optimizer": "adamw_bnb_8bit"},
        {"optimizer": "adafactor"},
        {"deepspeed": "deepspeed_configs/zero2.json", "optimizer": "paged_adamw_32bit"},
        {
            "deepspeed": "deepspeed_configs/zero2.json", "optimizer": "adamw_8bit",
            "save_only_model": True,
        },
    ],
)  # fmt: skip
def test_optimizers_that_can_step_what_a_process_has(
    recipe: dict[str, Any], keys: dict[str, Any]
) -> None:
    assert load_recipe({**recipe, **keys}).optimizer == keys["optimizer"]
