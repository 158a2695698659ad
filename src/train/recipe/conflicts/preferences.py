"""Keys of training on preferences that conflict with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..keys.preferences.names import reward_problem, type_problem
from ..keys.preferences.unread import has_method
from ..preferences import HEADS, ROWS
from ..problems import Loc

Values = Mapping[str, Any]
Problem = tuple[Loc, str]

_SWITCHES = ("reward_model", "process_reward_model", "kd_trainer")
_FORMS = {
    "pairs": ("prompt_format", "chosen_format", "rejected_format"),
    "labelled": ("prompt_format", "completion_format"),
}
"""The formats that a type written as keys may have, by what the rows are."""


def method_in(values: Values) -> str | None:
    """The method of a recipe as written; None: supervised training, or one that is not known."""
    if values.get("reward_model") is True:
        return "reward"
    if values.get("process_reward_model") is True:
        return "process_reward"
    method = values.get("rl")
    return method if isinstance(method, str) and method in ROWS else None


def preference_conflicts(values: Values) -> Iterator[Problem]:
    """Yield the place and the problem of keys of preference methods that conflict.

    Args:
        values: the recipe as written, unset keys left out. It may have other problems.
    """
    asked = [k for k in ("rl", *_SWITCHES) if values.get(k)]
    if len(asked) > 1:
        yield (asked[1],), f"set this or {asked[0]}, not both: a run trains with one method"
    if has_method(values):  # else nothing reads these keys
        yield from _losses(values)
        trl = values.get("trl")
        yield from _trl(values, trl if isinstance(trl, Mapping) else {})
    method = method_in(values)
    yield from _class(values, method)
    if method is None:
        return
    named = method if values.get("rl") == method else f"{method}_model"
    for key in ("sample_packing", "eval_sample_packing"):
        if values.get(key):
            said = f"rows of {named} are not packed: leave it out, or set it to false"
            yield (key,), said
    for key in ("pretraining_dataset", "streaming"):
        if values.get(key):
            yield (key,), f"rows of {named} are not streamed: use datasets, without streaming"
    if values.get("skip_prepare_dataset"):
        yield ("skip_prepare_dataset",), f"rows of {named} are always tokenized: leave it out"
    yield from _labels(values, method)
    yield from _engine(values, method, named)
    for name in ("datasets", "test_datasets"):
        listed = values.get(name)
        for i, dataset in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(dataset, Mapping):
                yield from _dataset(dataset, method, (name, i))


_PAIRED = ("dpo", "ipo")
_GENERATING = ("grpo", "gdpo")
_READERS: dict[str, Sequence[str]] = {
    "rl_beta": ("dpo", "ipo", "orpo", "kto", "simpo", "cpo", *_GENERATING),
    "dpo_label_smoothing": ("dpo",),
    "dpo_use_weighting": _PAIRED,
    "dpo_ld_alpha": _PAIRED,
    "dpo_padding_free": _PAIRED,
    "precompute_ref_log_probs": (*_PAIRED, "kto"),
    "orpo_alpha": ("orpo",),
    "cpo_alpha": ("cpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "kto_desirable_weight": ("kto",),
    "kto_undesirable_weight": ("kto",),
    "num_labels": ("reward", "process_reward"),
    "center_rewards_coefficient": ("reward",),
    "trl": ("dpo", "ipo", "orpo", "kto", "simpo", "cpo", *_GENERATING),
    "vllm": _GENERATING,
}
"""The methods that read each key."""

_READ_BY_ALL = ("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
"""The keys of ``trl`` that not only GRPO reads."""


def preferences_without_effect(values: Values) -> Iterator[tuple[Sequence[str], str]]:
    """Yield keys of preference methods that the recipe's own method does not read, with the reason.

    Args:
        values: the recipe as written; unset keys may be None.
    """
    method = method_in(values)
    for key, readers in _READERS.items():
        if method not in readers:
            yield (key,), f"only {_named(readers)} it"
    if method is not None:
        yield ("train_on_inputs",), "only answers are compared, never prompts"
        smoothing = "the method's loss has no smoothing of labels"
        yield ("label_smoothing_factor",), smoothing
        perplexity = "validation has the figures of the method, without perplexity"
        yield ("do_causal_lm_eval", "eval_causal_lm_metrics"), perplexity
        if method not in (*_GENERATING, "process_reward"):
            yield ("lora_dropout",), "TRL trains this method without dropout"
    trl = values.get("trl")
    if not isinstance(trl, Mapping) or method not in _READERS["trl"]:
        return
    if method not in _GENERATING:
        keys = [f"trl.{key}" for key in trl if key not in _READ_BY_ALL]
        yield keys, "only rl: grpo and gdpo read it"
    elif not trl.get("use_vllm"):
        keys = [f"trl.{key}" for key in trl if key.startswith("vllm_")]
        yield ["vllm", *keys], "only trl.use_vllm: true reads it"
    if not trl.get("sync_ref_model"):
        keys = ["trl.ref_model_mixup_alpha", "trl.ref_model_sync_steps"]
        yield keys, "only trl.sync_ref_model: true reads it"


def _named(readers: Sequence[str]) -> str:
    """The methods as a recipe names them, with the verb."""
    if len(readers) > 4:
        return "a preference method (key rl) reads"
    models = [f"{name}_model" for name in readers if name not in _READERS["rl_beta"]]
    methods = [name for name in readers if name in _READERS["rl_beta"]]
    named = " and ".join([*([f"rl: {', '.join(methods)}"] if methods else []), *models])
    return f"{named} {'reads' if len(readers) == 1 else 'read'}"


def _losses(values: Values) -> Iterator[Problem]:
    losses, weights = values.get("dpo_loss_type"), values.get("dpo_loss_weights")
    for key in ("dpo_loss_type", "dpo_loss_weights"):
        if values.get(key) and values.get("rl", "dpo") != "dpo":
            yield (key,), f"needs rl: dpo, and this recipe has rl: {values['rl']}"
    if weights and not losses:
        yield ("dpo_loss_weights",), "needs dpo_loss_type"
    if isinstance(losses, list) and isinstance(weights, list) and len(losses) != len(weights):
        said = f"has {len(weights)} weights, and dpo_loss_type has {len(losses)} losses"
        yield ("dpo_loss_weights",), said
    named = [losses] if isinstance(losses, str) else list(losses or ())
    if values.get("dpo_use_weighting") and {"aot", "aot_unpaired"} & set(named):
        yield ("dpo_use_weighting",), "has no meaning with aot, which sorts the pairs: leave it out"
    if "exo_pair" in named and not values.get("dpo_label_smoothing"):
        yield ("dpo_loss_type",), "exo_pair needs dpo_label_smoothing above 0, for example 1e-3"
    divides = values.get("rl") in ("ipo", "simpo") or "sppo_hard" in named or "ipo" in named
    if divides and values.get("rl_beta") == 0:
        yield ("rl_beta",), "must be above 0: this loss divides by it"
    if values.get("dpo_padding_free") and values.get("precompute_ref_log_probs"):
        yield ("dpo_padding_free",), "set this or precompute_ref_log_probs, not both"
    if values.get("rl") == "orpo" and values.get("rl_beta") and values.get("orpo_alpha"):
        yield ("orpo_alpha",), "set this or rl_beta, not both: they are one weight"


def _trl(values: Values, trl: Values) -> Iterator[Problem]:
    method = values.get("rl")
    beta, own = values.get("rl_beta"), trl.get("beta")
    if beta is not None and own is not None and beta != own:
        yield ("trl", "beta"), f"is another value than rl_beta, which is {beta}: set one of them"
    functions, weights = trl.get("reward_funcs"), trl.get("reward_weights")
    if method in ("grpo", "gdpo") and not functions:
        yield ("trl", "reward_funcs"), f"is missing: rl: {method} needs at least one reward"
    for i, name in enumerate(functions if isinstance(functions, list) else ()):
        if isinstance(name, str) and (problem := reward_problem(name)):
            yield ("trl", "reward_funcs", i), problem
    if isinstance(functions, list) and isinstance(weights, list) and len(functions) != len(weights):
        said = f"has {len(weights)} weights, and reward_funcs has {len(functions)} rewards"
        yield ("trl", "reward_weights"), said
    many, each = trl.get("generation_batch_size"), trl.get("num_generations")
    if isinstance(many, int) and isinstance(each, int) and each > 0 and many % each:
        said = f"must be a multiple of num_generations, which is {each}"
        yield ("trl", "generation_batch_size"), said
    if method == "gdpo" and trl.get("multi_objective_aggregation") == "sum_then_normalize":
        said = "is that of rl: grpo: leave it out, or set rl: grpo"
        yield ("trl", "multi_objective_aggregation"), said
    yield from _moving_reference(values, trl)
    cap, most = (trl.get(f"vllm_importance_sampling_{k}") for k in ("cap", "clip_max"))
    if cap is not None and most is not None:
        said = "is the older name of vllm_importance_sampling_clip_max, which is set, too"
        yield ("trl", "vllm_importance_sampling_cap"), said
    luspo = trl.get("loss_type") == "luspo"
    if luspo and trl.get("importance_sampling_level") != "sequence":
        yield ("trl", "loss_type"), "luspo needs importance_sampling_level: sequence"


def _moving_reference(values: Values, trl: Values) -> Iterator[Problem]:
    if not trl.get("sync_ref_model"):
        return
    said = None
    if values.get("adapter"):
        said = "needs a reference model of its own, and an adapter has the model without it"
    elif values.get("precompute_ref_log_probs"):
        said = "moves the reference model, and precompute_ref_log_probs keeps what it was at first"
    elif values.get("rl") in _GENERATING and not (trl.get("beta") or values.get("rl_beta")):
        said = "needs rl_beta above 0: without it there is no reference model"
    if said is not None:
        yield ("trl", "sync_ref_model"), f"{said}; leave one of them out"


def _engine(values: Values, method: str, named: str) -> Iterator[Problem]:
    """What only supervised training can do."""
    for key in ("tensor_parallel_size", "context_parallel_size"):
        if isinstance(size := values.get(key), int) and size > 1:
            said = f"{named} is not trained with it: use fsdp_config or deepspeed"
            yield (key,), said
    for key in ("use_dft", "use_eaft"):
        if values.get(key):
            yield (key,), f"weighs tokens of supervised training, and {named} has its own loss"
    if method == "kto":
        said = "must be 2 or more: KTO compares a prompt with the answer to another one"
        if values.get("micro_batch_size") in (None, 1):
            yield ("micro_batch_size",), said
        if values.get("eval_batch_size") == 1:
            yield ("eval_batch_size",), said
    targets = values.get("lora_target_modules")
    if method in (*_PAIRED, "kto", *_GENERATING) and targets and "lm_head" in targets:
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
    given = values.get("model_type")
    if not isinstance(given, str):
        return
    wanted = HEADS.get(method or "")
    if wanted is not None and not wanted.belongs_to(given):
        yield ("model_type",), f"must be {wanted.auto}, or left out, with {wanted.key}: true"
    found = next((head for head in HEADS.values() if head.belongs_to(given)), None)
    if wanted is None and found is not None:
        said = "has no language head, which is trained here: leave it out, or set"
        yield ("model_type",), f"{said} {found.key}: true"


def _dataset(values: Values, method: str, loc: Loc) -> Iterator[Problem]:
    rows = ROWS[method]
    kind = values.get("type")
    if isinstance(kind, str) and (problem := type_problem(kind, rows)):
        yield (*loc, "type"), problem
    if isinstance(kind, Mapping):
        forms = _FORMS.get(rows)
        if forms is None:
            said = f"a type written as keys cannot describe rows of {method}: name one instead"
            yield (*loc, "type"), said
            return
        for name in kind:
            if name.endswith("_format") and name not in forms:
                said = f"is not read with rl: {method}; there are {', '.join(forms)}"
                yield (*loc, "type", name), said
