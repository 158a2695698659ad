"""Groups of processes that train the same batch: tensor and context parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..keys.distributed import DistributedKeys
from .sharding import is_sharded

if TYPE_CHECKING:
    from ..problems import Loc

    Problem = tuple[Loc, str]

_TENSOR = ("tensor_parallel_size",)


def contexts(recipe: DistributedKeys) -> int:
    """The number of processes that share each sequence, by either of its keys."""
    nested = recipe.context_parallel.size if recipe.context_parallel else None
    return nested or recipe.context_parallel_size


def context_key(recipe: DistributedKeys) -> tuple[str, ...]:
    """The place of the key that says so."""
    nested = recipe.context_parallel is not None and recipe.context_parallel.size is not None
    return ("context_parallel", "size") if nested else ("context_parallel_size",)


def group_conflicts(values: Mapping[str, Any], recipe: DistributedKeys) -> Iterator[Problem]:
    """Yield the place and the problem of keys that conflict with tensor or context parallelism.

    Args:
        values: the recipe as written.
        recipe: its keys of several processes.
    """
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
    if recipe.deepspeed:
        for loc in keys:
            yield loc, "DeepSpeed does not go with it here: use fsdp_config in place of deepspeed"
    elif not is_sharded(recipe) and keys and keys[-1] != _TENSOR:
        yield (
            keys[-1],
            "needs FSDP, which adds up what the parts of a sequence give: set fsdp: true",
        )
    elif not is_sharded(recipe) and keys and (recipe.dp_replicate_size or 1) > 1:
        yield ("dp_replicate_size",), f"needs FSDP beside {'.'.join(keys[0])}: set fsdp: true"


def _tensor(values: Mapping[str, Any]) -> Iterator[Problem]:
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


def _context(values: Mapping[str, Any], key: str) -> Iterator[Problem]:
    """What torch's ring attention cannot do: it knows the causal mask, and no other."""
    for name in ("sample_packing", "eval_sample_packing"):
        if values.get(name):
            yield (
                (name,),
                f"the samples of a pack would see each other: torch's ring attention ({key}) has "
                "no masks; set it to false",
            )
    asked = str(values.get("attn_implementation", "sdpa"))
    if asked != "sdpa" and "flash" not in asked:
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
