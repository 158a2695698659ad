"""Keys of a recipe that are valid alone, but conflict together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ....errors import did_you_mean
from ...chat_templates import unknown_template
from ..distributed.conflicts import distributed_conflicts
from ..keys.dataset import TYPES
from ..problems import Loc
from .distillation import distillation_conflicts, is_of_teacher
from .preferences import method_in, preference_conflicts

Values = Mapping[str, Any]
Problem = tuple[Loc, str]

_ATTENTIONS = (
    "flash_attention", "xformers_attention", "sdp_attention", "flex_attention", "eager_attention",
    "s2_attention", "sage_attention",
)  # fmt: skip
_DTYPES = ("bf16", "bfloat16", "fp16", "float16", "float32", "fp8")


def conflicts(values: Values) -> Iterator[Problem]:
    """Yield the place and the problem of keys that conflict.

    Args:
        values: the recipe as written, unset keys left out. It may have other problems.
    """
    for check in _CHECKS:
        yield from check(values)


def _model(values: Values) -> Iterator[Problem]:
    named = [k for k in _ATTENTIONS if values.get(k)]
    if "attn_implementation" in values:
        named.insert(0, "attn_implementation")
    if len(named) > 1:
        yield (named[1],), f"set this or {named[0]}, not both"
    dtypes = [k for k in _DTYPES if values.get(k) and values[k] != "auto"]
    same = ({"bf16", "bfloat16"}, {"fp16", "float16"})
    if len(dtypes) > 1 and set(dtypes) not in same:
        yield (dtypes[1],), f"set this or {dtypes[0]}, not both: weights have one dtype"
    if values.get("load_in_4bit") and values.get("load_in_8bit"):
        yield ("load_in_8bit",), "set this or load_in_4bit, not both"
    for key in ("load_in_4bit", "load_in_8bit"):
        if values.get(key) and not values.get("adapter"):
            yield (
                (key,),
                f"quantized weights cannot be trained: set adapter, or {key}: false",
            )
    if values.get("quantize_moe_experts"):
        if not (values.get("load_in_4bit") or values.get("load_in_8bit")):
            yield ("quantize_moe_experts",), "needs load_in_4bit: true or load_in_8bit: true"
        elif any(values.get(k) for k in ("fsdp", "fsdp_config", "deepspeed")):
            said = "packed experts cannot be sharded: leave it out, or train with DDP"
            yield ("quantize_moe_experts",), said
    if (config := values.get("model_quantization_config")) is not None:
        given = values.get("model_quantization_config_kwargs")
        if not (isinstance(given, Mapping) and given.get("dequantize")):
            said = f"{config} needs model_quantization_config_kwargs: {{dequantize: true}}: weights"
            yield ("model_quantization_config",), f"{said} that stay packed cannot be trained"
        for key in ("load_in_4bit", "load_in_8bit"):
            if values.get(key):
                yield (key,), "set this or model_quantization_config, not both"
    sharded = next((k for k in ("fsdp", "fsdp_config", "deepspeed") if values.get(k)), None)
    if values.get("fp32_norms") and sharded:
        yield ("fp32_norms",), f"not with {sharded}, whose shards have one dtype: leave it out"
    yield from _template(values, ())


def _template(values: Values, loc: Loc) -> Iterator[Problem]:
    name = values.get("chat_template")
    if name == "jinja" and not values.get("chat_template_jinja"):
        yield (*loc, "chat_template"), "jinja needs chat_template_jinja: the template or its file"
    elif isinstance(name, str) and (said := unknown_template(name)) is not None:
        yield (*loc, "chat_template"), said


def _adapter(values: Values) -> Iterator[Problem]:
    adapter, layers = values.get("adapter"), values.get("lora_target_modules")
    targets = ("lora_target_linear", "lora_target_modules", "lora_target_parameters")
    if adapter in ("lora", "qlora"):
        if not any(values.get(k) for k in (*targets, "lora_model_dir")):
            yield (
                ("adapter",),
                f"{adapter} needs lora_target_linear: true, or a list lora_target_modules",
            )
        if adapter == "qlora" and values.get("load_in_8bit"):
            yield (
                ("adapter",),
                "qlora needs load_in_4bit: true, not load_in_8bit",
            )
        elif adapter == "qlora" and not values.get("load_in_4bit"):
            yield ("adapter",), "qlora needs load_in_4bit: true"
    if isinstance(layers, str) and layers != "all-linear" and values.get("lora_target_linear"):
        yield (
            ("lora_target_modules",),
            "one text cannot add to lora_target_linear: write a list, or set lora_target_linear to "
            "false",
        )
    narrow = values.get("peft_autocast_adapter_dtype") is False
    if adapter and values.get("lora_fp32_gradients") and narrow:
        said = "gradients have the dtype of the adapters"
        yield ("lora_fp32_gradients",), f"needs peft_autocast_adapter_dtype: true: {said}"
    if values.get("lora_target_parameters") and values.get("lora_dropout"):
        yield ("lora_target_parameters",), "needs lora_dropout: 0"
    if values.get("peft_layers_pattern") and "peft_layers_to_transform" not in values:
        yield ("peft_layers_pattern",), "needs peft_layers_to_transform"
    if adapter and values.get("unfrozen_parameters") and "peft_layers_to_transform" in values:
        yield ("unfrozen_parameters",), "set this or peft_layers_to_transform, not both"


_ALONE = "set this or lisa_n_layers, not both: LISA trains with one process"
_SIZES = ("dp_replicate_size", "dp_shard_size", "tensor_parallel_size", "context_parallel_size")


def _lisa(values: Values) -> Iterator[Problem]:
    if not values.get("lisa_n_layers"):
        return
    if values.get("adapter"):
        yield ("lisa_n_layers",), "trains whole blocks: set this or adapter, not both"
    if not values.get("lisa_step_interval"):
        yield ("lisa_n_layers",), "needs lisa_step_interval"
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if values.get(key):
            yield (key,), _ALONE
    for key in _SIZES:
        if isinstance(values.get(key), int) and values[key] > 1:
            yield (key,), _ALONE


def _rows(values: Values) -> Iterator[Problem]:
    if "datasets" not in values and "pretraining_dataset" not in values:
        yield ("datasets",), "is missing"
    if values.get("datasets") and values.get("pretraining_dataset"):
        yield (
            ("pretraining_dataset",),
            "set this or datasets, not both: only one of them is trained on; to read datasets as "
            "a stream, set streaming: true",
        )
    size = values.get("val_set_size")
    if isinstance(size, float) and size > 1 and size != int(size):
        yield ("val_set_size",), f"must be a fraction below 1 or a number of rows, not {size}"
    if size and values.get("test_datasets"):
        yield ("val_set_size",), "set this or test_datasets, not both"
    streamed = next((k for k in ("pretraining_dataset", "streaming") if values.get(k)), None)
    if streamed:
        if "max_steps" not in values:
            yield (streamed,), "needs max_steps: a stream has no known end"
        if size:
            yield ("val_set_size",), f"cannot be cut from a stream ({streamed}): use test_datasets"
        for key in ("dataset_exact_deduplication", "dataset_shard_num"):
            if values.get(key):
                yield (key,), f"needs all rows at once, which a stream ({streamed}) never has"
        for loc in _weights(values):
            yield loc, f"needs all rows at once, which a stream ({streamed}) never has"
    parts, part = values.get("dataset_shard_num"), values.get("dataset_shard_idx", 0)
    if isinstance(parts, int) and isinstance(part, int) and part >= parts:
        yield ("dataset_shard_idx",), f"must be less than dataset_shard_num, which is {parts}"
    if part and parts is None:
        yield ("dataset_shard_idx",), "needs dataset_shard_num"
    supervised = not values.get("rl") and method_in(values) is None
    for name in ("datasets", "test_datasets", "pretraining_dataset"):
        listed = values.get(name)
        for i, dataset in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(dataset, Mapping):
                yield from _dataset(dataset, (name, i), supervised)


def _weights(values: Values) -> Iterator[Loc]:
    """The places of weights of datasets to train on that ask for something."""
    for name in ("datasets", "pretraining_dataset"):
        listed = values.get(name)
        for i, dataset in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(dataset, Mapping) and dataset.get("weight", 1) != 1:
                yield (name, i, "weight")


def _dataset(values: Values, loc: Loc, supervised: bool) -> Iterator[Problem]:
    yield from _template(values, loc)
    kind = values.get("type") if supervised else None  # preferences have types of their own
    plain = kind.removesuffix(".load").removesuffix(".default") if isinstance(kind, str) else ""
    if isinstance(kind, str) and not (plain in TYPES or is_of_teacher(kind)):
        hint = did_you_mean(kind, TYPES) or f"there are {', '.join(TYPES)}"
        yield (*loc, "type"), f"{kind!r} is not a type of rows; {hint}"
    shards, index = values.get("shards"), values.get("shards_idx", 0)
    if isinstance(shards, int) and isinstance(index, int) and index >= shards:
        yield (*loc, "shards_idx"), f"must be less than shards, which is {shards}"
    if "shards_idx" in values and shards is None:
        yield (*loc, "shards_idx"), "needs shards"
    mapped = values.get("message_property_mappings")
    for name in ("role", "content"):
        old = f"message_field_{name}"
        if old in values and isinstance(mapped, Mapping) and name in mapped:
            yield (*loc, old), f"set this or message_property_mappings.{name}, not both"


def _steps(values: Values) -> Iterator[Problem]:
    yield from _either(values, "warmup_ratio", "warmup_steps")
    yield from _either(values, "batch_size", "gradient_accumulation_steps")
    yield from _either(values, "embedding_lr_scale", "embedding_lr")
    yield from _either(values, "use_eaft", "use_dft")
    weighed = next((k for k in ("use_dft", "use_eaft") if values.get(k)), None)
    if weighed:
        for key in ("label_smoothing_factor", "tensor_parallel_size", "context_parallel_size"):
            if (values.get(key) or 0) > (0 if key.startswith("label") else 1):
                yield (key,), f"set this or {weighed}, not both"
        for key in ("fsdp", "fsdp_config", "deepspeed"):
            if values.get(key):
                said = "whose tiles need the whole output head in each process (DDP)"
                yield (key,), f"set this or {weighed}, not both: {weighed} is a loss {said}"
    size, micro = values.get("batch_size"), values.get("micro_batch_size", 1)
    if isinstance(size, int) and isinstance(micro, int) and micro > 0 and size % micro:
        yield ("batch_size",), f"must be a multiple of micro_batch_size, which is {micro}"


def _output(values: Values) -> Iterator[Problem]:
    for key in ("save_steps", "eval_steps", "logging_steps"):
        every = values.get(key)
        if isinstance(every, float) and every > 1 and every != int(every):
            yield (key,), f"must be a fraction below 1 or a number of steps, not {every}"
    yield from _either(values, "saves_per_epoch", "save_steps")
    yield from _either(values, "evals_per_epoch", "eval_steps")
    for verb in ("save", "eval"):
        strategy = values.get(f"{verb}_strategy", "steps")
        for key in (f"{verb}_steps", f"{verb}s_per_epoch"):
            if values.get(key) and strategy != "steps":
                said = "no" if strategy is False else strategy
                yield (key,), f"needs {verb}_strategy: steps, which is {said}"
    validates = values.get("val_set_size") or values.get("test_datasets")
    for key in ("eval_steps", "eval_strategy"):
        if values.get(key, "no") not in ("no", False) and not validates:
            yield (key,), "needs val_set_size or test_datasets: there are no rows to validate on"
    if values.get("do_causal_lm_eval") and not values.get("eval_causal_lm_metrics"):
        yield ("do_causal_lm_eval",), "needs eval_causal_lm_metrics: [perplexity]"
    evaluated = any(values.get(k) for k in ("eval_steps", "evals_per_epoch", "eval_strategy"))
    for key in ("early_stopping_patience", "load_best_model_at_end"):
        if values.get(key) and validates and not evaluated:
            yield (key,), "needs eval_steps or evals_per_epoch"
    saved = any(values.get(k) for k in ("save_steps", "saves_per_epoch", "save_strategy"))
    if values.get("load_best_model_at_end") and validates and not saved:
        yield ("load_best_model_at_end",), "needs save_steps or saves_per_epoch"
    resumes = [
        k for k in ("resume_from_checkpoint", "auto_resume_from_checkpoints") if values.get(k)
    ]
    # auto_resume_from_checkpoints may stand in a recipe for good: overwriting begins anew
    if values.get("resume_from_checkpoint") is True and values.get("overwrite_output_dir"):
        yield (
            (resumes[0],),
            "set this or overwrite_output_dir (--overwrite), not both; to resume a run that has "
            "finished, name its checkpoint, e.g. RUN/checkpoint-8",
        )
    if resumes and values.get("save_only_model"):
        yield (
            (resumes[0],),
            "needs save_only_model: false, because resuming needs the optimizer's state",
        )


def _either(values: Values, key: str, other: str) -> Iterator[Problem]:
    if values.get(key) and values.get(other):
        yield (key,), f"set this or {other}, not both"


_CHECKS: tuple[Callable[[Values], Iterator[Problem]], ...] = (
    _model, _adapter, _lisa, _rows, _steps, _output, preference_conflicts, distributed_conflicts,
    distillation_conflicts,
)  # fmt: skip
