"""How a recipe's run is shared between processes: one record for all spellings of the keys.

A recipe may be written for FSDP1 or FSDP2, with the names of accelerate, transformers or Axolotl.
FSDP is always FSDP2 (``fully_shard``), with what the options mean there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...errors import RecipeError
from .deepspeed_config import read_config
from .keys.distributed import DistributedKeys, FsdpKeys

StateDictType = Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"]


@dataclass(frozen=True)
class Fsdp:
    """What FSDP2 shards and keeps.

    Attributes:
        wrap: what is gathered at a time: a block, a module of ``min_num_params``, or the whole
            model.
        classes: names of the classes of blocks; none: blocks are found by the model's structure.
        min_num_params: the number of parameters from which a module is a unit, for ``"size"``.
        reshard_after_forward: free gathered weights after forward, and gather them again in
            backward.
        offload_params: keep shards, gradients and the optimizer's state in CPU memory.
        activation_checkpointing: keep only the inputs of each block for backward.
        state_dict_type: whether checkpoints hold whole tensors, or the shards of each process.
        mixed_precision: the name of the dtype of gathered weights, gradients and outputs; None: the
            model's own.
    """

    wrap: Literal["transformer", "size", "none"]
    classes: tuple[str, ...]
    min_num_params: int
    reshard_after_forward: bool
    offload_params: bool
    pin_memory: bool
    activation_checkpointing: bool
    state_dict_type: StateDictType
    mixed_precision: str | None


@dataclass(frozen=True)
class Strategy:
    """How the work is shared between processes.

    Attributes:
        engine: who shares it. ``"ddp"`` is also that of a run of one process.
        fsdp: with ``"fsdp"``, its options.
        deepspeed: with ``"deepspeed"``, its configuration. Values may be ``"auto"``.
        shard: number of processes that share one copy of the weights; 0: all that ``replicate``
            leaves.
        replicate: number of copies of the weights.
        tensor: number of processes that share each layer (tensor parallelism).
        context: number of processes that share each sequence (context parallelism).
        packs: whether sequences are packs of samples.
        alone: the key, as it is written, that means one process; None: no key does.
    """

    engine: Literal["ddp", "fsdp", "deepspeed"]
    fsdp: Fsdp | None = None
    deepspeed: Mapping[str, Any] | None = None
    shard: int = 0
    replicate: int = 1
    tensor: int = 1
    context: int = 1
    packs: bool = False
    alone: str | None = None

    @property
    def group(self) -> int:
        """Number of processes that train the same batch together."""
        return self.tensor * self.context

    def world(self) -> int | None:
        """The number of processes that the recipe needs; None: several would do."""
        return self.shard * self.replicate * self.group if self.shard else None

    def require_world(self, size: int) -> None:
        """Raise RecipeError unless the number of processes, on all machines together, fits."""
        required = self.world()
        if required == size or (required is None and size % (self.replicate * self.group) == 0):
            return
        run = f"{size} process{'es run' if size != 1 else ' runs'}"
        start = f"start {required} (e.g. --nproc {required})"
        if self.group > 1:
            problem = self._group_problem(required, run)
        elif required is None:
            problem = (
                f"dp_replicate_size: {self.replicate} copies of the model cannot share the "
                f"processes, of which {run}: start a multiple of {self.replicate}, or remove the "
                "key"
            )
        elif self.engine == "ddp" and required == 1:
            problem = f"{self.alone} means one process, but {run}: remove it, or start one"
        elif self.engine == "ddp":
            problem = (
                f"dp_replicate_size: {required} processes are needed, but {run}: {start}, or "
                "remove the key"
            )
        else:
            problem = (
                f"dp_shard_size: {self.shard} times dp_replicate_size: {self.replicate} is "
                f"{required}, but {run}: {start}, or set sizes whose product is {size}"
            )
        raise RecipeError(problem)

    def _group_problem(self, needed: int | None, run: str) -> str:
        """The problem with a number of processes that is no multiple of the group's."""
        sizes = {
            "tensor_parallel_size": self.tensor, "context_parallel_size": self.context,
            "dp_shard_size": self.shard, "dp_replicate_size": self.replicate,
        }  # fmt: skip
        set_ones = [f"{key}: {size}" for key, size in sizes.items() if size > 1]
        product = self.replicate * self.group
        several = f"{' times '.join(set_ones)} is {needed or product}"
        if len(set_ones) == 1:
            several = f"{set_ones[0]} needs {'' if needed else 'a multiple of '}{needed or product}"
        start = f"start {needed}" if needed else f"start a multiple of {product}"
        more = "" if self.engine == "fsdp" else ", or set fsdp: true to train on several groups"
        return f"{several} processes, but {run}: {start} (e.g. --nproc {needed or product}){more}"


def strategy_of(recipe: DistributedKeys) -> Strategy:
    """The strategy of a checked recipe, in which no two keys conflict.

    Raises:
        RecipeError: the file of ``deepspeed`` does not exist any more, or is no configuration.
    """
    replicate = recipe.dp_replicate_size or 1
    shard = recipe.dp_shard_size or 1
    if recipe.deepspeed:
        try:
            return Strategy(
                "deepspeed", deepspeed=read_config(recipe.deepspeed), context=contexts(recipe),
                packs=recipe.packs_sequences(),
            )  # fmt: skip
        except RecipeError as error:
            raise RecipeError(f"deepspeed: {error}") from None
    tensor, context, packs = recipe.tensor_parallel_size, contexts(recipe), recipe.packs_sequences()
    if is_sharded(recipe):
        # experts are shared as all weights are: their groups are part of the copy's
        fixed_shard = shard * recipe.expert_parallel_size if shard > 1 else 0
        return Strategy(
            "fsdp", _fsdp(recipe),
            shard=fixed_shard, replicate=replicate, tensor=tensor, context=context, packs=packs,
        )  # fmt: skip
    # DDP averages over all processes; layers that are divided are not averaged
    alone = recipe.one_process() or ("ddp: false" if recipe.ddp is False else None)
    shard = 1 if replicate > 1 or alone or tensor > 1 else 0
    return Strategy(
        "ddp", shard=shard, replicate=replicate, tensor=tensor, context=context, packs=packs,
        alone=alone,
    )  # fmt: skip


def ddp_arguments(recipe: DistributedKeys) -> dict[str, Any]:
    """The arguments of transformers' ``TrainingArguments`` that the keys ``ddp_*`` are.

    Only keys that are set. Buckets, buffers and unused parameters are DDP's; all engines wait.
    """
    kwargs: dict[str, Any] = {"ddp_timeout": recipe.ddp_timeout}
    if not recipe.deepspeed and not is_sharded(recipe):
        kwargs |= {
            "ddp_bucket_cap_mb": recipe.ddp_bucket_cap_mb,
            "ddp_broadcast_buffers": recipe.ddp_broadcast_buffers,
            "ddp_find_unused_parameters": recipe.ddp_find_unused_parameters,
        }
    return {name: value for name, value in kwargs.items() if value is not None}


_WRAPS: dict[str, Literal["transformer", "size", "none"]] = {
    "TRANSFORMER_BASED_WRAP": "transformer",
    "SIZE_BASED_WRAP": "size",
    "NO_WRAP": "none",
}


def _fsdp(recipe: DistributedKeys) -> Fsdp:
    config = settings(recipe)
    stored = config.state_dict_type or recipe.state_dict_type or "FULL_STATE_DICT"
    return Fsdp(
        wrap=_WRAPS[wrap_policy(recipe)],
        classes=tuple(config.transformer_layer_cls_to_wrap or ()),
        min_num_params=config.min_num_params or 0,
        reshard_after_forward=reshards(recipe),
        offload_params=offloads(recipe),
        pin_memory=config.cpu_offload_pin_memory is not False,
        activation_checkpointing=bool(config.activation_checkpointing),
        state_dict_type="FULL_STATE_DICT" if stored == "FULL_STATE_DICT" else "SHARDED_STATE_DICT",
        mixed_precision=config.mixed_precision_policy,
    )


# --- FSDP's options by their names in both versions -----------------------------------------------

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
    """Whether a recipe asks for FSDP, even if only for its ``NO_SHARD``."""
    if recipe.fsdp is False:
        return False
    shares_experts = recipe.expert_parallel_size > 1
    named = bool(recipe.fsdp) or any(value is not None for _, value in settings(recipe))
    return named or shares_experts


def strategies(recipe: DistributedKeys) -> list[tuple[str, str]]:
    """The keys that name a sharding strategy of FSDP1, each with the name."""
    config = settings(recipe)
    pairs = [("fsdp", word.upper()) for word in words(recipe) if word.upper() in RESHARDS]
    if config.sharding_strategy is not None:
        pairs.append(("fsdp_config.sharding_strategy", config.sharding_strategy))
    if isinstance(config.reshard_after_forward, str):
        pairs.append(("fsdp_config.reshard_after_forward", config.reshard_after_forward))
    return pairs


def is_sharded(recipe: DistributedKeys) -> bool:
    """Whether FSDP shards the model."""
    return names_fsdp(recipe) and all(name != "NO_SHARD" for _, name in strategies(recipe))


def reshards(recipe: DistributedKeys) -> bool:
    """Whether gathered weights are freed after forward."""
    reshard = settings(recipe).reshard_after_forward
    if isinstance(reshard, bool):
        return reshard
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


def contexts(recipe: DistributedKeys) -> int:
    """The number of processes that share each sequence, by either of its keys."""
    nested = recipe.context_parallel.size if recipe.context_parallel else None
    return nested or recipe.context_parallel_size


def context_key(recipe: DistributedKeys) -> tuple[str, ...]:
    """The place of the key of ``contexts``."""
    nested = recipe.context_parallel is not None and recipe.context_parallel.size is not None
    return ("context_parallel", "size") if nested else ("context_parallel_size",)
