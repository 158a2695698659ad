"""Keys of several processes that conflict with others, or have no effect beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ..keys.distributed import DistributedKeys
from ..keys.fsdp import FsdpKeys
from . import sharding
from .groups import context_key, contexts, group_conflicts
from .optimizers import optimizer_conflicts
from .sharding import is_sharded, names_fsdp, settings, strategies

if TYPE_CHECKING:
    from ..problems import Loc

    Problem = tuple[Loc, str]

_OF_DDP = ("ddp", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters")


def distributed_conflicts(values: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the place and the problem of keys that conflict with those of several processes.

    Args:
        values: the recipe as written, unset keys left out. It may have other problems.
    """
    recipe = _keys(values)
    if recipe is None:
        return
    fsdp = "fsdp" if recipe.fsdp else "fsdp_config"
    if recipe.deepspeed and names_fsdp(recipe):
        yield ("deepspeed",), f"set this or {fsdp}, not both: each shards the model in its own way"
    engine = _engine(recipe)
    if engine and values.get("device_map") is not None:
        said = f"set this or {engine}, not both: it gives each process its own device"
        yield ("device_map",), said
    if is_sharded(recipe) and values.get("load_in_8bit"):
        yield (
            ("load_in_8bit",),
            f"weights of 8 bits cannot be sharded by FSDP: use adapter: qlora with load_in_4bit: "
            f"true, or remove {fsdp}, so that each process has the whole model",
        )
    if names_fsdp(recipe):
        yield from _strategies(recipe)
        yield from _options(recipe)
    yield from _sizes(recipe)
    yield from group_conflicts(values, recipe)
    yield from optimizer_conflicts(values, recipe)


def distributed_without_effect(
    values: Mapping[str, Any],
) -> Iterator[tuple[Sequence[str], str]]:
    """Yield keys of several processes that nothing reads beside the others, with the reason.

    Args:
        values: the recipe as written; unset keys may be None. Nested keys are dotted.
    """
    recipe = _keys(values)
    if recipe is None:
        return
    config, engine = settings(recipe), _engine(recipe)
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
    policy = sharding.wrap_policy(recipe)
    if policy != "SIZE_BASED_WRAP":
        reason = "only auto_wrap_policy: SIZE_BASED_WRAP reads it"
        yield ("fsdp_config.min_num_params",), reason
    if policy != "TRANSFORMER_BASED_WRAP":
        reason = "only auto_wrap_policy: TRANSFORMER_BASED_WRAP reads it"
        yield ("fsdp_config.transformer_layer_cls_to_wrap",), reason
    if not sharding.offloads(recipe):
        yield ("fsdp_config.cpu_offload_pin_memory",), "only offload_params reads it"
    if config.state_dict_type is not None:
        yield ("state_dict_type",), "fsdp_config.state_dict_type says the same"


def _keys(values: Mapping[str, Any]) -> DistributedKeys | None:
    """The keys of several processes; None where one of them has a problem of its own."""
    own: dict[str, Any] = {}
    for name in DistributedKeys.model_fields:
        value = values.get(name)
        if name in ("fsdp_config", "context_parallel") and isinstance(value, Mapping):
            value = {k: v for k, v in value.items() if v is not None}
        if value is not None:
            own[name] = value
    try:
        return DistributedKeys.model_validate(own)
    except ValidationError:
        return None


def _engine(recipe: DistributedKeys) -> str | None:
    """The key of the engine that shards the model; None: none does."""
    if recipe.deepspeed:
        return "deepspeed"
    if not is_sharded(recipe):
        return None
    return "fsdp" if recipe.fsdp else "fsdp_config"


def _strategies(recipe: DistributedKeys) -> Iterator[Problem]:
    named = strategies(recipe)
    for key, name in named[1:]:
        if name != named[0][1]:
            yield tuple(key.split(".")), f"{name} contradicts {_said(*named[0])}: remove one"
            return
    asked = settings(recipe).reshard_after_forward
    if named and isinstance(asked, bool) and sharding.RESHARDS[named[0][1]] is (not asked):
        yield (
            ("fsdp_config", "reshard_after_forward"),
            f"{str(asked).lower()} contradicts {_said(*named[0])}, which is "
            f"{str(not asked).lower()}: remove one",
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
    if "offload" in sharding.words(recipe) and config.offload_params is False:
        yield ("fsdp_config", "offload_params"), "false contradicts fsdp: offload: remove one"
    if "auto_wrap" in sharding.words(recipe) and config.auto_wrap_policy == "NO_WRAP":
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


def _said(key: str, name: str) -> str:
    return f"{key}: {name.lower() if key == 'fsdp' else name}"
