"""Keys of distillation that conflict with others, or that nothing reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..keys.dataset import TEACHER_TYPES
from ..problems import Loc

Values = Mapping[str, Any]
Problem = tuple[Loc, str]

_OWN = (
    "kd_alpha", "kd_ce_alpha", "kd_temperature", "kd_beta", "kd_normalize_topk",
    "kd_top_k_before_softmax",
)  # fmt: skip
_OTHER_LOSSES = ("use_dft", "use_eaft", "label_smoothing_factor")
_STREAMS = ("pretraining_dataset", "streaming")
_DIVISIONS = ("tensor_parallel_size", "context_parallel_size")


def is_of_teacher(kind: Any) -> bool:
    """Whether a type of rows, as written, is one with a teacher's log-probabilities."""
    return isinstance(kind, str) and kind.removesuffix(".load") in TEACHER_TYPES


def distillation_conflicts(values: Values) -> Iterator[Problem]:
    """Yield the place and the problem of keys of distillation that conflict.

    Args:
        values: the recipe as written, unset keys left out. It may have other problems.
    """
    distils = bool(values.get("kd_trainer"))
    for name in ("datasets", "test_datasets"):
        listed = values.get(name)
        for i, dataset in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(dataset, Mapping):
                yield from _dataset(dataset, (name, i), distils)
    if not distils:
        return
    for key in _OTHER_LOSSES:
        if values.get(key):
            yield (key,), "set this or kd_trainer, not both: distillation has a loss of its own"
    for key in _STREAMS:
        if values.get(key):
            yield (key,), "rows with a teacher are not streamed: use datasets, without streaming"
    for key in _DIVISIONS:
        if isinstance(size := values.get(key), int) and size > 1:
            yield (key,), "kd_trainer is not trained with it: use fsdp_config or deepspeed"
    if values.get("skip_prepare_dataset"):
        yield ("skip_prepare_dataset",), "rows with a teacher are always tokenized: leave it out"
    if values.get("do_causal_lm_eval"):
        said = "validation has the loss of distillation, which has no perplexity: leave it out"
        yield ("do_causal_lm_eval",), said
    if values.get("kd_alpha") == 0 and not values.get("kd_ce_alpha"):
        yield ("kd_alpha",), "must be above 0, or else kd_ce_alpha: with both 0, there is no loss"
    before, after = (values.get(k) for k in ("kd_top_k_before_softmax", "kd_normalize_topk"))
    if None not in (before, after) and bool(before) != bool(after):
        said = f"is the older name of kd_normalize_topk, which is {str(after).lower()}"
        yield ("kd_top_k_before_softmax",), f"{said}: set one of them"


def _dataset(values: Values, loc: Loc, distils: bool) -> Iterator[Problem]:
    kind = values.get("type")
    if distils and not is_of_teacher(kind):
        said = f"kd_trainer needs rows with a teacher's log-probabilities: {TEACHER_TYPES[0]}"
        yield (*loc, "type"), said
    elif not distils and is_of_teacher(kind):
        yield (*loc, "type"), "needs kd_trainer: true; without a teacher, use chat_template"


def distillation_without_effect(values: Values) -> Iterator[tuple[Sequence[str], str]]:
    """Yield keys of distillation that nothing reads beside the others, with the reason.

    Args:
        values: the recipe as written; unset keys may be None.
    """
    if values.get("kd_trainer"):
        return
    keys = list(_OWN)
    for name in ("datasets", "test_datasets"):
        listed = values.get(name)
        for i, dataset in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(dataset, Mapping):
                own = ("logprobs_field", "temperature")
                keys += [f"{name}.{i}.{key}" for key in own if key in dataset]
    yield keys, "only kd_trainer: true reads it"
