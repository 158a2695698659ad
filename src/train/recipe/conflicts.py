"""Keys of a recipe that are valid alone: which conflict, and which nothing reads with the others.

Most of this is declared on the keys (``KeyRules``); the functions here are for what takes more than
whether another key asks for something.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from ..chat_templates import unknown_template
from .keys.base import METHOD, KeyRules, Keys, UnreadKeys, nested, rules_of
from .keys.distributed import DistributedKeys, FsdpKeys
from .keys.optimization import OWN_OPTIMIZERS
from .keys.preferences import GENERATING, OF_METHODS, PAIRED, WITH_BETA, has_method
from .keys.row_types import TEACHER_TYPES, TYPES, no_type, reward_problem, type_problem
from .preferences import HEADS, ROWS
from .problems import Loc
from .recipe import Recipe
from .strategy import (
    RESHARDS,
    context_key,
    contexts,
    is_sharded,
    names_fsdp,
    offloads,
    settings,
    strategies,
    words,
    wrap_policy,
)

Values = Mapping[str, Any]
Problem = tuple[Loc, str]


def conflicts(values: Values) -> Iterator[Problem]:
    """Yield the place and the problem of keys that conflict.

    ``values`` is the recipe as written, unset keys left out. It may have other problems.
    """
    yield from declared_conflicts(Recipe, _with_method(values))
    for check in _CHECKS:
        yield from check(values)


def without_effect(values: Values) -> Iterator[tuple[str, str]]:
    """Yield the keys of a recipe as written that nothing reads with the others, and the reasons."""
    for check in _READERS:
        for keys, reason in check(values):
            yield from ((key, reason) for key in keys if key.partition(".")[0] in values)
    yield from declared_without_effect(Recipe, _with_method(values))


# --- what the keys declare ------------------------------------------------------------------------


def declared_conflicts(model: type[Keys], values: Values, loc: Loc = ()) -> Iterator[Problem]:
    """Yield what the rules of a class's keys refuse.

    ``METHOD`` among ``values`` is the method that the recipe asks for; ``loc`` the place of the
    keys.
    """
    for name, rules in _ruled(model).items():
        if name not in values and not rules.one_of:
            continue
        set_keys = [k for k in (name, *rules.one_of) if _asks(model, values, k)]
        if rules.one_of and len(set_keys) > 1:
            yield (*loc, set_keys[1]), f"set this or {set_keys[0]}, not both{rules.because}"
        if not loc and name in OF_METHODS and not has_method(values):
            continue  # nothing reads it
        for inner, place, group in _groups(model, name, values):
            yield from declared_conflicts(inner, group, (*loc, name, *place))
        if not _asks(model, values, name):
            continue
        for condition, message in _texts(rules.excludes, "set this or {key}, not both"):
            if key := _holds(model, values, condition):
                yield (*loc, name), message.replace("{key}", key)
        for condition, message in _texts(rules.needs, "needs {condition}"):
            if not _holds(model, values, condition):
                yield (*loc, name), message


def declared_without_effect(
    model: type[Keys], values: Values, prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Yield the keys of a class that nothing reads by its rules, dotted, each with the reason."""
    for name, rules in _ruled(model).items():
        if name not in values:
            continue
        reasons = [
            text for condition, text in _texts(rules.read_with, "only {condition} reads it")
            if not _holds(model, values, condition)
        ]  # fmt: skip
        reasons += [s for c, s in rules.unread_with.items() if _holds(model, values, c)]
        unread = rules.methods is not None and method_in(values) not in rules.methods
        if unread:
            reasons.append(f"only {_named(rules.methods or ())} it")
        yield from ((prefix + name, reason) for reason in reasons)
        for inner, place, group in () if unread else _groups(model, name, values):
            inside = ".".join(map(str, (name, *place)))
            yield from declared_without_effect(inner, group, f"{prefix}{inside}.")


@functools.cache
def _ruled(model: type[Keys]) -> dict[str, KeyRules]:
    """The keys of a class that have rules, or keys inside."""
    rules = {name: rules_of(model, name) for name in model.model_fields}
    plain = KeyRules()
    return {
        name: rule for name, rule in rules.items()
        if rule != plain or nested(model.model_fields[name].annotation) is not None
    }  # fmt: skip


def _groups(
    model: type[Keys], name: str, values: Values
) -> Iterator[tuple[type[Keys], Loc, Values]]:
    """The mappings in a key's value whose keys are read: their class, and their places in it."""
    inner = nested(model.model_fields[name].annotation)
    if inner is not None and not issubclass(inner, UnreadKeys):
        yield from ((inner, place, group) for place, group in groups_in(values.get(name)))


def groups_in(value: Any) -> Iterator[tuple[Loc, Values]]:
    """The mappings in a value that may have keys, with their places in it."""
    if isinstance(value, Mapping):
        yield (), value
    elif isinstance(value, list):
        yield from (((i,), item) for i, item in enumerate(value) if isinstance(item, Mapping))


def _texts(rules: Mapping[str, str] | Sequence[str], default: str) -> Iterator[tuple[str, str]]:
    """The conditions of a rule, each with its message."""
    for condition in rules:
        message = rules[condition] if isinstance(rules, Mapping) else default
        yield condition, message.replace("{condition}", condition)


def _holds(model: type[Keys], values: Values, condition: str) -> str | None:
    """The first key of a condition that asks for something; None: the condition does not hold."""
    for part in condition.split(" or "):
        name, colon, expected = part.partition(": ")
        if not colon and _asks(model, values, name):
            return values[METHOD] if name == METHOD else name
        if colon:
            value = values.get(name)
            value = model.model_fields[name].get_default() if value is None else value
            if str(value).lower() == expected:
                return name
    return None


def _asks(model: type[Keys], values: Values, name: str) -> bool:
    """Whether a key, or a key in a group, asks for something."""
    value: Any = values
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    rules = rules_of(model, name)
    if rules.more_than is not None:
        return isinstance(value, int) and value > rules.more_than
    written = rules.if_written or "." in name
    return value is not None if written else bool(value)


def _with_method(values: Values) -> Values:
    """The same with the method that the recipe asks for, by its name in messages."""
    method = method_in(values)
    if method is None:
        return values
    return {**values, METHOD: method if values.get("rl") == method else f"{method}_model"}


def _datasets(values: Values) -> Iterator[tuple[Loc, Values]]:
    """The datasets that are trained and validated on, with their places."""
    for name in ("datasets", "test_datasets"):
        for place, dataset in groups_in(values.get(name)):
            if place:
                yield (name, *place), dataset


# --- the model and its adapter --------------------------------------------------------------------

_DTYPES = ("bf16", "bfloat16", "fp16", "float16", "float32", "fp8")


def _model(values: Values) -> Iterator[Problem]:
    dtypes = [k for k in _DTYPES if values.get(k) and values[k] != "auto"]
    same = ({"bf16", "bfloat16"}, {"fp16", "float16"})
    if len(dtypes) > 1 and set(dtypes) not in same:
        yield (dtypes[1],), f"set this or {dtypes[0]}, not both: weights have one dtype"
    if values.get("quantize_moe_experts"):
        if not (values.get("load_in_4bit") or values.get("load_in_8bit")):
            yield ("quantize_moe_experts",), "needs load_in_4bit: true or load_in_8bit: true"
        elif values.get("deepspeed"):
            text = "DeepSpeed cannot send packed experts: leave it out, or train with DDP or FSDP"
            yield ("quantize_moe_experts",), text
    if (config := values.get("model_quantization_config")) is not None:
        options = values.get("model_quantization_config_kwargs")
        if not (isinstance(options, Mapping) and options.get("dequantize")):
            text = f"{config} needs model_quantization_config_kwargs: {{dequantize: true}}: weights"
            yield ("model_quantization_config",), f"{text} that stay packed cannot be trained"
    if isinstance(qat := values.get("qat"), Mapping):
        yield from _qat(qat)
    yield from _template(values, ())


_QAT = {
    ("int4", None), ("int4", "int8"), ("int4", "float8_e4m3fn"),
    ("float8_e4m3fn", "float8_e4m3fn"), ("mxfp4", None), ("mxfp4", "mxfp4"), ("nvfp4", None),
    ("nvfp4", "nvfp4"),
}  # fmt: skip
"""The dtypes of weights and activations that go together."""


def _qat(qat: Values) -> Iterator[Problem]:
    fp8 = dict.fromkeys(("fp8", "float8"), "float8_e4m3fn")
    weight, inputs = (qat.get(k) for k in ("weight_dtype", "activation_dtype"))
    weight, inputs = (fp8.get(str(dtype), dtype) for dtype in (weight or "int8", inputs))
    if (weight, inputs) not in _QAT:
        known = ", ".join(f"{w} with {a}" for w, a in sorted(_QAT, key=str) if a)
        text = f"there is no training of weights in {weight} with activations in {inputs}"
        yield ("qat",), f"{text}: take int4 alone, or {known}"
    size = {"nvfp4": 16, "mxfp4": 32}.get(str(weight))
    if size is not None and qat.get("group_size", size) not in (size, None):
        yield ("qat", "group_size"), f"{weight} has groups of {size}"
    if weight != "int4" and qat.get("quantize_embedding"):
        yield ("qat", "quantize_embedding"), f"embeddings are rounded to int4 only, not to {weight}"
    if weight == "mxfp4" and qat.get("fake_quant_after_n_steps"):
        text = "torchao rounds to mxfp4 from the start: leave it out"
        yield ("qat", "fake_quant_after_n_steps"), text


def _template(values: Values, loc: Loc) -> Iterator[Problem]:
    name = values.get("chat_template")
    if name == "jinja" and not values.get("chat_template_jinja"):
        yield (*loc, "chat_template"), "jinja needs chat_template_jinja: the template or its file"
    elif isinstance(name, str) and (message := unknown_template(name)) is not None:
        yield (*loc, "chat_template"), message


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
    low_precision = values.get("peft_autocast_adapter_dtype") is False
    if adapter and values.get("lora_fp32_gradients") and low_precision:
        message = "gradients have the dtype of the adapters"
        yield ("lora_fp32_gradients",), f"needs peft_autocast_adapter_dtype: true: {message}"
    if adapter and values.get("unfrozen_parameters") and "peft_layers_to_transform" in values:
        yield ("unfrozen_parameters",), "set this or peft_layers_to_transform, not both"


# --- rows -----------------------------------------------------------------------------------------


def _rows(values: Values) -> Iterator[Problem]:
    if "datasets" not in values and "pretraining_dataset" not in values:
        yield ("datasets",), "is missing"
    size = values.get("val_set_size")
    if isinstance(size, float) and size > 1 and size != int(size):
        yield ("val_set_size",), f"must be a fraction below 1 or a number of rows, not {size}"
    streamed = next((k for k in ("pretraining_dataset", "streaming") if values.get(k)), None)
    if streamed:
        if "max_steps" not in values:
            yield (streamed,), "needs max_steps: a stream has no known end"
        for loc in _weights(values):
            yield loc, f"needs all rows at once, which a stream ({streamed}) never has"
    parts, part = values.get("dataset_shard_num"), values.get("dataset_shard_idx", 0)
    if isinstance(parts, int) and isinstance(part, int) and part >= parts:
        yield ("dataset_shard_idx",), f"must be less than dataset_shard_num, which is {parts}"
    most, least = values.get("image_max_pixels"), values.get("image_min_pixels")
    if isinstance(most, int) and isinstance(least, int) and 0 < most < least:
        yield ("image_max_pixels",), f"must be at least image_min_pixels, which is {least}"
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
    kind = values.get("type") if supervised else None  # preferences have other types
    plain = kind.removesuffix(".load").removesuffix(".default") if isinstance(kind, str) else ""
    if isinstance(kind, str) and not (plain in TYPES or is_of_teacher(kind)):
        yield (*loc, "type"), no_type(kind, TYPES, "rows")
    shards, index = values.get("shards"), values.get("shards_idx", 0)
    if isinstance(shards, int) and isinstance(index, int) and index >= shards:
        yield (*loc, "shards_idx"), f"must be less than shards, which is {shards}"


# --- steps and output -----------------------------------------------------------------------------


def _steps(values: Values) -> Iterator[Problem]:
    size, micro = values.get("batch_size"), values.get("micro_batch_size", 1)
    if isinstance(size, int) and isinstance(micro, int) and micro > 0 and size % micro:
        yield ("batch_size",), f"must be a multiple of micro_batch_size, which is {micro}"
    warmup = values.get("warmup_steps")
    if isinstance(warmup, float) and warmup > 1 and warmup != int(warmup):
        yield ("warmup_steps",), f"must be a number of steps or a fraction below 1, not {warmup}"
    least, peak = values.get("eta_min"), values.get("learning_rate", 2e-4)
    if isinstance(least, float) and isinstance(peak, float) and least > peak:
        yield ("eta_min",), f"must not be above learning_rate, which is {peak:g}"
    if values.get("relora") and "adam" not in str(values.get("optimizer", "adamw")):
        yield ("relora",), f"prunes the moments of AdamW: {values['optimizer']} has others"
    if (name := values.get("optimizer")) in OWN_OPTIMIZERS:
        for key in ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio"):
            if values.get(key):
                yield (key,), f"{name} has one learning rate: leave one of them out"
        if values.get("deepspeed"):
            text = f"{name} needs matrices, which DeepSpeed makes one vector of: use fsdp: true"
            yield ("optimizer",), text


def _output(values: Values) -> Iterator[Problem]:
    for key in ("save_steps", "eval_steps", "logging_steps"):
        every = values.get(key)
        if isinstance(every, float) and every > 1 and every != int(every):
            yield (key,), f"must be a fraction below 1 or a number of steps, not {every}"
    for verb in ("save", "eval"):
        strategy = values.get(f"{verb}_strategy", "steps")
        for key in (f"{verb}_steps", f"{verb}s_per_epoch"):
            if values.get(key) and strategy != "steps":
                text = "no" if strategy is False else strategy
                yield (key,), f"needs {verb}_strategy: steps, which is {text}"
    validates = values.get("val_set_size") or values.get("test_datasets")
    if values.get("eval_strategy", "no") not in ("no", False) and not validates:
        text = "needs val_set_size or test_datasets: there are no rows to validate on"
        yield ("eval_strategy",), text
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
    # auto_resume_from_checkpoints may always be in a recipe: overwriting starts anew
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


# --- distillation ---------------------------------------------------------------------------------


def is_of_teacher(kind: Any) -> bool:
    """Whether a type of rows, as written, is one with a teacher's log-probabilities."""
    return isinstance(kind, str) and kind.removesuffix(".load") in TEACHER_TYPES


def _distillation(values: Values) -> Iterator[Problem]:
    distils = bool(values.get("kd_trainer"))
    for loc, dataset in _datasets(values):
        kind = dataset.get("type")
        if distils and not is_of_teacher(kind):
            text = f"kd_trainer needs rows with a teacher's log-probabilities: {TEACHER_TYPES[0]}"
            yield (*loc, "type"), text
        elif not distils and is_of_teacher(kind):
            yield (*loc, "type"), "needs kd_trainer: true; without a teacher, use chat_template"
    if distils and values.get("kd_alpha") == 0 and not values.get("kd_ce_alpha"):
        yield ("kd_alpha",), "must be above 0, or else kd_ce_alpha: with both 0, there is no loss"
    before, after = (values.get(k) for k in ("kd_top_k_before_softmax", "kd_normalize_topk"))
    if distils and None not in (before, after) and bool(before) != bool(after):
        text = f"is the older name of kd_normalize_topk, which is {str(after).lower()}"
        yield ("kd_top_k_before_softmax",), f"{text}: set one of them"


# --- preferences and rewards ----------------------------------------------------------------------

_FORMS = {
    "pairs": ("prompt_format", "chosen_format", "rejected_format"),
    "labelled": ("prompt_format", "completion_format"),
}
"""The formats that a type written as keys may have, by the kind of rows."""


def method_in(values: Values) -> str | None:
    """The method of a recipe as written; None: supervised training, or an unknown method."""
    if values.get("reward_model") is True:
        return "reward"
    if values.get("process_reward_model") is True:
        return "process_reward"
    method = values.get("rl")
    return method if isinstance(method, str) and method in ROWS else None


def _preferences(values: Values) -> Iterator[Problem]:
    if has_method(values):  # else nothing reads these keys
        yield from _losses(values)
        trl = values.get("trl")
        yield from _trl(values, trl if isinstance(trl, Mapping) else {})
    method = method_in(values)
    yield from _class(values, method)
    if method is None:
        return
    yield from _labels(values, method)
    yield from _limits(values, method, _with_method(values)[METHOD])
    for loc, dataset in _datasets(values):
        yield from _preference_rows(dataset, method, loc)


def _losses(values: Values) -> Iterator[Problem]:
    losses, weights = values.get("dpo_loss_type"), values.get("dpo_loss_weights")
    for key in ("dpo_loss_type", "dpo_loss_weights"):
        if values.get(key) and values.get("rl", "dpo") != "dpo":
            yield (key,), f"needs rl: dpo, and this recipe has rl: {values['rl']}"
    if isinstance(losses, list) and isinstance(weights, list) and len(losses) != len(weights):
        message = f"has {len(weights)} weights, and dpo_loss_type has {len(losses)} losses"
        yield ("dpo_loss_weights",), message
    names = [losses] if isinstance(losses, str) else list(losses or ())
    if values.get("dpo_use_weighting") and {"aot", "aot_unpaired"} & set(names):
        yield ("dpo_use_weighting",), "has no meaning with aot, which sorts the pairs: leave it out"
    if "exo_pair" in names and not values.get("dpo_label_smoothing"):
        yield ("dpo_loss_type",), "exo_pair needs dpo_label_smoothing above 0, for example 1e-3"
    divides = values.get("rl") in ("ipo", "simpo") or "sppo_hard" in names or "ipo" in names
    if divides and values.get("rl_beta") == 0:
        yield ("rl_beta",), "must be above 0: this loss divides by it"
    if values.get("rl") == "orpo" and values.get("rl_beta") and values.get("orpo_alpha"):
        yield ("orpo_alpha",), "set this or rl_beta, not both: they are one weight"


def _trl(values: Values, trl: Values) -> Iterator[Problem]:
    method = values.get("rl")
    beta, trl_beta = values.get("rl_beta"), trl.get("beta")
    if beta is not None and trl_beta is not None and beta != trl_beta:
        yield ("trl", "beta"), f"is another value than rl_beta, which is {beta}: set one of them"
    functions, weights = trl.get("reward_funcs"), trl.get("reward_weights")
    if method in ("grpo", "gdpo") and not functions:
        yield ("trl", "reward_funcs"), f"is missing: rl: {method} needs at least one reward"
    for i, name in enumerate(functions if isinstance(functions, list) else ()):
        if isinstance(name, str) and (problem := reward_problem(name)):
            yield ("trl", "reward_funcs", i), problem
    if isinstance(functions, list) and isinstance(weights, list) and len(functions) != len(weights):
        message = f"has {len(weights)} weights, and reward_funcs has {len(functions)} rewards"
        yield ("trl", "reward_weights"), message
    many, each = trl.get("generation_batch_size"), trl.get("num_generations")
    if isinstance(many, int) and isinstance(each, int) and each > 0 and many % each:
        message = f"must be a multiple of num_generations, which is {each}"
        yield ("trl", "generation_batch_size"), message
    if method == "gdpo" and trl.get("multi_objective_aggregation") == "sum_then_normalize":
        message = "is that of rl: grpo: leave it out, or set rl: grpo"
        yield ("trl", "multi_objective_aggregation"), message
    yield from _moving_reference(values, trl)
    luspo = trl.get("loss_type") == "luspo"
    if luspo and trl.get("importance_sampling_level") != "sequence":
        yield ("trl", "loss_type"), "luspo needs importance_sampling_level: sequence"


def _moving_reference(values: Values, trl: Values) -> Iterator[Problem]:
    if not trl.get("sync_ref_model"):
        return
    text = None
    if values.get("adapter"):
        text = "needs a reference model of its own, and an adapter has the model without it"
    elif values.get("precompute_ref_log_probs"):
        text = "moves the reference model, and precompute_ref_log_probs keeps what it was at first"
    elif values.get("rl") in GENERATING and not (trl.get("beta") or values.get("rl_beta")):
        text = "needs rl_beta above 0: without it there is no reference model"
    if text is not None:
        yield ("trl", "sync_ref_model"), f"{text}; leave one of them out"


def _limits(values: Values, method: str, named: str) -> Iterator[Problem]:
    """Keys that a method does not support."""
    if method == "kto":
        message = "must be 2 or more: KTO compares a prompt with the answer to another one"
        if values.get("micro_batch_size") in (None, 1):
            yield ("micro_batch_size",), message
        if values.get("eval_batch_size") == 1:
            yield ("eval_batch_size",), message
    targets = values.get("lora_target_modules")
    if method in (*PAIRED, "kto", *GENERATING) and targets and "lm_head" in targets:
        yield (
            ("lora_target_modules",),
            f"lm_head: {named} reads the head's weights without adapters",
        )


def _labels(values: Values, method: str) -> Iterator[Problem]:
    labels = values.get("num_labels")
    if method == "reward" and labels not in (None, 1):
        yield ("num_labels",), "must be 1: a reward model gives one number to an answer"
    if method == "process_reward" and labels == 1:
        yield ("num_labels",), "must be 2 or more: a step is right or wrong"


def _class(values: Values, method: str | None) -> Iterator[Problem]:
    """A ``model_type`` with another head than what the recipe trains."""
    model_class = values.get("model_type")
    if not isinstance(model_class, str):
        return
    expected = HEADS.get(method or "")
    if expected is not None and not expected.belongs_to(model_class):
        yield ("model_type",), f"must be {expected.auto}, or left out, with {expected.key}: true"
    match = next((head for head in HEADS.values() if head.belongs_to(model_class)), None)
    if expected is None and match is not None:
        message = "has no language head, which is trained here: leave it out, or set"
        yield ("model_type",), f"{message} {match.key}: true"


def _preference_rows(values: Values, method: str, loc: Loc) -> Iterator[Problem]:
    rows = ROWS[method]
    kind = values.get("type")
    if isinstance(kind, str) and (problem := type_problem(kind, rows)):
        yield (*loc, "type"), problem
    if isinstance(kind, Mapping):
        forms = _FORMS.get(rows)
        if forms is None:
            message = f"a type written as keys cannot describe rows of {method}: name one instead"
            yield (*loc, "type"), message
            return
        for name in kind:
            if name.endswith("_format") and name not in forms:
                message = f"is not read with rl: {method}; there are {', '.join(forms)}"
                yield (*loc, "type", name), message


# --- several processes ----------------------------------------------------------------------------

_OF_DDP = ("ddp", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters")


def _distributed(values: Values) -> Iterator[Problem]:
    recipe = _keys(values)
    if recipe is None:
        return
    fsdp = _fsdp_key(recipe)
    if recipe.deepspeed and names_fsdp(recipe):
        yield ("deepspeed",), f"set this or {fsdp}, not both: each shards the model in its own way"
    engine = _sharding_key(recipe)
    if engine and values.get("device_map") is not None:
        message = f"set this or {engine}, not both: it gives each process its own device"
        yield ("device_map",), message
    if names_fsdp(recipe):
        yield from _strategies(recipe)
        yield from _options(recipe)
    yield from _sizes(recipe)
    yield from _groups_of_processes(values, recipe)
    yield from _sharded_optimizers(values, recipe)


def _unread_distributed(values: Values) -> Iterator[tuple[Sequence[str], str]]:
    recipe = _keys(values)
    if recipe is None:
        return
    config, engine = settings(recipe), _sharding_key(recipe)
    if contexts(recipe) > 1 and values.get("attn_implementation") != "sdpa":
        yield (
            ("attn_implementation",),
            f"{'.'.join(context_key(recipe))} needs torch's own attention, which has a flash "
            "kernel, too",
        )
    if engine:
        yield _OF_DDP, f"only DDP reads it, and {engine} shards the model"
    if not is_sharded(recipe):
        yield ("state_dict_type",), "only FSDP reads it"
        if not engine and recipe.fsdp is None and recipe.fsdp_config is None:
            yield ("fsdp_version",), "by itself it shards nothing: set fsdp: true or fsdp_config"
        why = "NO_SHARD is DDP: each process has the whole model"
        if recipe.fsdp is False:
            why = "fsdp is false"
        names = [n for n in FsdpKeys.model_fields if n != "sharding_strategy" or not recipe.fsdp]
        yield [f"fsdp_config.{name}" for name in names], why
        return
    policy = wrap_policy(recipe)
    if policy != "SIZE_BASED_WRAP":
        reason = "only auto_wrap_policy: SIZE_BASED_WRAP reads it"
        yield ("fsdp_config.min_num_params",), reason
    if policy != "TRANSFORMER_BASED_WRAP":
        reason = "only auto_wrap_policy: TRANSFORMER_BASED_WRAP reads it"
        yield ("fsdp_config.transformer_layer_cls_to_wrap",), reason
    if not offloads(recipe):
        yield ("fsdp_config.cpu_offload_pin_memory",), "only offload_params reads it"
    if config.state_dict_type is not None:
        yield ("state_dict_type",), "fsdp_config.state_dict_type says the same"


def _keys(values: Values) -> DistributedKeys | None:
    """The keys of several processes; None where one of them has a problem itself."""
    keys: dict[str, Any] = {}
    for name in DistributedKeys.model_fields:
        value = values.get(name)
        if name in ("fsdp_config", "context_parallel") and isinstance(value, Mapping):
            value = {k: v for k, v in value.items() if v is not None}
        if value is not None:
            keys[name] = value
    try:
        return DistributedKeys.model_validate(keys)
    except ValidationError:
        return None


def _sharding_key(recipe: DistributedKeys) -> str | None:
    """The key of the engine that shards the model; None: none does."""
    if recipe.deepspeed:
        return "deepspeed"
    if not is_sharded(recipe):
        return None
    return _fsdp_key(recipe)


def _fsdp_key(recipe: DistributedKeys) -> str:
    """The key that asks for FSDP, if one does."""
    if recipe.fsdp or not (recipe.fsdp_config or recipe.expert_parallel_size > 1):
        return "fsdp" if recipe.fsdp else "fsdp_config"
    return "fsdp_config" if recipe.fsdp_config else "expert_parallel_size"


def _strategies(recipe: DistributedKeys) -> Iterator[Problem]:
    named = strategies(recipe)
    for key, name in named[1:]:
        if name != named[0][1]:
            yield tuple(key.split(".")), f"{name} contradicts {_quoted(*named[0])}: remove one"
            return
    reshard = settings(recipe).reshard_after_forward
    if named and isinstance(reshard, bool) and RESHARDS[named[0][1]] is (not reshard):
        yield (
            ("fsdp_config", "reshard_after_forward"),
            f"{str(reshard).lower()} contradicts {_quoted(*named[0])}, which is "
            f"{str(not reshard).lower()}: remove one",
        )
    if named and named[0][1].startswith("HYBRID") and (recipe.dp_replicate_size or 1) == 1:
        key, name = named[0]
        yield (
            tuple(key.split(".")),
            f"{name} needs dp_replicate_size: the number of copies of the model, such as the "
            "number of machines; each copy is sharded over the other processes",
        )


def _options(recipe: DistributedKeys) -> Iterator[Problem]:
    config = settings(recipe)
    if "offload" in words(recipe) and config.offload_params is False:
        yield ("fsdp_config", "offload_params"), "false contradicts fsdp: offload: remove one"
    if "auto_wrap" in words(recipe) and config.auto_wrap_policy == "NO_WRAP":
        yield ("fsdp_config", "auto_wrap_policy"), "NO_WRAP contradicts fsdp: auto_wrap: remove one"
    if config.auto_wrap_policy == "SIZE_BASED_WRAP" and not config.min_num_params:
        yield (
            ("fsdp_config", "auto_wrap_policy"),
            "SIZE_BASED_WRAP needs min_num_params, e.g. 100000000",
        )
    types = (recipe.state_dict_type, config.state_dict_type)
    if None not in types and types[0] != types[1]:
        yield ("state_dict_type",), f"contradicts fsdp_config.state_dict_type: {types[1]}"


def _sizes(recipe: DistributedKeys) -> Iterator[Problem]:
    for key in ("dp_shard_size", "dp_replicate_size"):
        if recipe.deepspeed and (getattr(recipe, key) or 1) > 1:
            yield (
                (key,),
                "DeepSpeed shards the model over all processes: remove this, or use fsdp_config in "
                "place of deepspeed",
            )
    if not recipe.deepspeed and not is_sharded(recipe) and (recipe.dp_shard_size or 1) > 1:
        yield (
            ("dp_shard_size",),
            "needs FSDP, without which each process has the whole model: set fsdp: true",
        )


def _quoted(key: str, name: str) -> str:
    return f"{key}: {name.lower() if key == 'fsdp' else name}"


_TENSOR = ("tensor_parallel_size",)


def _groups_of_processes(values: Values, recipe: DistributedKeys) -> Iterator[Problem]:
    """Keys that conflict with tensor or context parallelism."""
    context = context_key(recipe)
    sizes = {_TENSOR: recipe.tensor_parallel_size, context: contexts(recipe)}
    yield from _data_parallel(recipe, [loc for loc, size in sizes.items() if size > 1])
    if context[1:] and recipe.context_parallel_size not in (1, contexts(recipe)):
        yield context, f"contradicts context_parallel_size: {recipe.context_parallel_size}"
    if sizes[_TENSOR] > 1:
        yield from _tensor(values)
    if sizes[context] > 1:
        yield from _context(values, ".".join(context))


def _data_parallel(recipe: DistributedKeys, keys: list[tuple[str, ...]]) -> Iterator[Problem]:
    """What averages gradients over several groups, or over the parts of a sequence."""
    if recipe.deepspeed and _TENSOR in keys:
        text = "DeepSpeed does not go with it here: use fsdp_config in place of deepspeed"
        yield _TENSOR, text
    elif len(keys) > 1 and not is_sharded(recipe):
        yield keys[-1], "needs FSDP beside tensor_parallel_size: set fsdp: true"
    elif not is_sharded(recipe) and keys and (recipe.dp_replicate_size or 1) > 1:
        yield ("dp_replicate_size",), f"needs FSDP beside {'.'.join(keys[0])}: set fsdp: true"


def _tensor(values: Values) -> Iterator[Problem]:
    for key in ("load_in_4bit", "load_in_8bit"):
        if values.get(key):
            yield (
                _TENSOR,
                f"quantized weights cannot be divided: use fsdp_config in its place, or {key}: "
                "false with adapter: lora",
            )
    for key in ("peft_use_dora", "lora_target_parameters"):
        if values.get(key):
            yield _TENSOR, f"{key} needs whole weights: remove one of the two"


def _context(values: Values, key: str) -> Iterator[Problem]:
    """What parts of sequences cannot do: they share causal attention alone."""
    attention = str(values.get("attn_implementation", "sdpa"))
    if attention != "sdpa" and "flash" not in attention:
        yield ("attn_implementation",), f"{key} needs sdpa, torch's own attention"
    for name in ("eager_attention", "flex_attention"):
        if values.get(name):
            yield (name,), f"{key} needs sdpa, torch's own attention: set it to false"
    if values.get("label_smoothing_factor"):
        yield ("label_smoothing_factor",), f"is not there for parts of sequences ({key}): remove it"
    if values.get("sample_prompt"):
        yield (
            ("sample_prompt",),
            f"{key} leaves the model without the masks that answering needs: remove it, and ask "
            "the result with fusewright chat",
        )


_BITSANDBYTES = re.compile(r"(paged_)?(adamw|lion|ademamix|rmsprop|adamw_bnb|rmsprop_bnb)_\d+bit")
_ALSO_BITSANDBYTES = ("ademamix", "rmsprop_bnb")


def _sharded_optimizers(values: Values, recipe: DistributedKeys) -> Iterator[Problem]:
    """Optimizers that cannot step as the other keys say."""
    # Adafactor does not know PyTorch's ``DTensor``. bitsandbytes' step the share of a process as a
    # parameter, which is rows: of layers that are divided, it may be columns, which no file has.
    name = str(values.get("optimizer", ""))
    divided = recipe.tensor_parallel_size > 1
    in_blocks = bool(_BITSANDBYTES.fullmatch(name)) or name in _ALSO_BITSANDBYTES
    few_bits = bool(re.search(r"_\dbit", name))
    projected = few_bits and name.startswith(("galore", "apollo"))
    whole = projected or name in ("adafactor", "came_pytorch")
    if divided and (in_blocks or few_bits or whole or name == "muon"):
        text = "needs whole weights, which tensor_parallel_size divides: use adamw_torch_fused"
        yield ("optimizer",), f"{name} {text}"
    elif whole and (is_sharded(recipe) or (recipe.deepspeed and few_bits)):
        engine = "DeepSpeed" if recipe.deepspeed else "FSDP"
        instead = "adamw_torch_fused or adamw_8bit"
        yield ("optimizer",), f"{name} needs whole weights, which {engine} divides: use {instead}"


_CHECKS: tuple[Callable[[Values], Iterator[Problem]], ...] = (
    _model, _adapter, _rows, _steps, _output, _preferences, _distributed, _distillation,
)  # fmt: skip


# --- keys that nothing reads with others ----------------------------------------------------------

_OF_NEW_ADAPTERS = (
    "lora_r", "lora_alpha", "lora_rank_pattern", "lora_alpha_pattern", "lora_dropout",
    "lora_target_modules", "lora_target_linear", "lora_modules_to_save", "lora_fan_in_fan_out",
    "lora_exclude_modules", "peft_use_dora", "peft_use_rslora", "peft_layers_to_transform",
    "peft_layers_pattern", "peft_init_lora_weights",
)  # fmt: skip


def _unread_keys(values: Values) -> Iterator[tuple[Sequence[str], str]]:
    longest, length = (values.get(k) for k in ("eval_sequence_len", "sequence_len"))
    if (
        values.get("val_set_size") and longest and longest > (length or longest)
        and not _first_set(values, "eval_sample_packing", "sample_packing")
    ):  # fmt: skip
        yield ("eval_sequence_len",), "held-out rows are never longer than sequence_len"
    if not str(values.get("optimizer")).startswith(("galore", "apollo")):
        yield ("optim_target_modules",), "only the galore and apollo optimizers use it"
    if values.get("adapter") is None:
        keys = [k for k in values if k.startswith(("lora_", "peft_", "loraplus_"))]
        yield keys, "adapter is unset: every weight is trained"
    elif values.get("lora_model_dir") is not None:
        yield _OF_NEW_ADAPTERS, "the adapter in lora_model_dir has settings of its own"
    schedule = (
        "eta_min", "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup",
    )  # fmt: skip
    scheduler = str(values.get("lr_scheduler") or "cosine")
    if scheduler == "cosine" and any(values.get(k) for k in schedule):
        yield ("lr_scheduler_kwargs",), "the cosine keys say what the schedule is"
    streams = values.get("streaming") or values.get("pretraining_dataset")
    if streams and not values.get("test_datasets"):
        yield ("dataset_prepared_path",), "streamed rows are not cached"
    if not values.get("kd_trainer"):
        fields = ("logprobs_field", "temperature")
        keys = [f"{_dotted(loc)}.{k}" for loc, d in _datasets(values) for k in fields if k in d]
        yield keys, "only kd_trainer: true reads it"


def _first_set(values: Values, *keys: str) -> Any:
    return next((values[k] for k in keys if values.get(k) is not None), None)


def _dotted(loc: Loc) -> str:
    return ".".join(map(str, loc))


_OF_ROWS = (
    "chosen_format", "completion_format", "field_chosen", "field_completion",
    "field_label", "field_prompt", "field_rejected", "max_completion_length",
    "prompt_format", "rejected_format", "step_separator", "train_on_last_step_only",
)  # fmt: skip
"""The keys of a dataset that say how rows of preferences are read."""

_OF_ALL_METHODS = ("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
"""The keys of ``trl`` that not only GRPO reads."""


def _unread_preferences(values: Values) -> Iterator[tuple[Sequence[str], str]]:
    method, trl = method_in(values), values.get("trl")
    if method is None:
        keys = []
        for loc, dataset in _datasets(values):
            kind = dataset.get("type")
            keys += [f"{_dotted(loc)}.{key}" for key in dataset if key in _OF_ROWS]
            if isinstance(kind, Mapping):
                keys += [f"{_dotted(loc)}.type.{key}" for key in kind if key in _OF_ROWS]
        yield keys, "only a preference method (key rl) reads it"
    elif method not in (*GENERATING, "process_reward"):
        yield ("lora_dropout",), "TRL trains this method without dropout"
    if not isinstance(trl, Mapping) or method not in WITH_BETA:
        return
    if method not in GENERATING:
        keys = [f"trl.{key}" for key in trl if key not in _OF_ALL_METHODS]
        yield keys, "only rl: grpo and gdpo read it"
    elif not trl.get("use_vllm"):
        keys = [f"trl.{key}" for key in trl if key.startswith("vllm_")]
        yield ["vllm", *keys], "only trl.use_vllm: true reads it"


def _named(methods: Sequence[str]) -> str:
    """The methods as a recipe names them, with the verb."""
    if len(methods) > 4:
        return "a preference method (key rl) reads"
    models = [f"{name}_model" for name in methods if name in HEADS]
    names = [name for name in methods if name not in HEADS]
    subject = " and ".join([*([f"rl: {', '.join(names)}"] if names else []), *models])
    return f"{subject} {'reads' if len(methods) == 1 else 'read'}"


_READERS: tuple[Callable[[Values], Iterator[tuple[Sequence[str], str]]], ...] = (
    _unread_keys, _unread_distributed, _unread_preferences,
)  # fmt: skip
