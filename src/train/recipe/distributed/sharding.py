"""What the names of FSDP's options mean together, those of its first version too."""

from __future__ import annotations

from ..keys.distributed import DistributedKeys
from ..keys.fsdp import FsdpKeys

RESHARDS: dict[str, bool | None] = {
    "FULL_SHARD": True,
    "SHARD_GRAD_OP": False,
    "NO_SHARD": None,  # nothing is gathered
    "HYBRID_SHARD": True,
    "HYBRID_SHARD_ZERO2": False,
}
"""What each sharding strategy of FSDP1 says of ``reshard_after_forward``."""


def words(recipe: DistributedKeys) -> list[str]:
    """The options of ``fsdp``."""
    return list(recipe.fsdp) if isinstance(recipe.fsdp, list) else []


def settings(recipe: DistributedKeys) -> FsdpKeys:
    """``fsdp_config``, or one in which nothing is set."""
    return recipe.fsdp_config or FsdpKeys()


def names_fsdp(recipe: DistributedKeys) -> bool:
    """Whether a recipe asks for FSDP, be it only for its ``NO_SHARD``."""
    if recipe.fsdp is False:
        return False
    return bool(recipe.fsdp) or any(value is not None for _, value in settings(recipe))


def strategies(recipe: DistributedKeys) -> list[tuple[str, str]]:
    """The keys that name a sharding strategy of FSDP1, each with the name."""
    config = settings(recipe)
    named = [("fsdp", word.upper()) for word in words(recipe) if word.upper() in RESHARDS]
    if config.sharding_strategy is not None:
        named.append(("fsdp_config.sharding_strategy", config.sharding_strategy))
    if isinstance(config.reshard_after_forward, str):
        named.append(("fsdp_config.reshard_after_forward", config.reshard_after_forward))
    return named


def is_sharded(recipe: DistributedKeys) -> bool:
    """Whether FSDP shards the model."""
    return names_fsdp(recipe) and all(name != "NO_SHARD" for _, name in strategies(recipe))


def reshards(recipe: DistributedKeys) -> bool:
    """Whether gathered weights are freed after forward."""
    asked = settings(recipe).reshard_after_forward
    if isinstance(asked, bool):
        return asked
    return all(RESHARDS[name] is not False for _, name in strategies(recipe))


def offloads(recipe: DistributedKeys) -> bool:
    """Whether shards are kept in CPU memory."""
    return bool(settings(recipe).offload_params) or "offload" in words(recipe)


def wrap_policy(recipe: DistributedKeys) -> str:
    """What is gathered at a time, as ``auto_wrap_policy`` names it."""
    config = settings(recipe)
    by_size = config.min_num_params and not config.transformer_layer_cls_to_wrap
    default = "SIZE_BASED_WRAP" if by_size else "TRANSFORMER_BASED_WRAP"
    return config.auto_wrap_policy or default
