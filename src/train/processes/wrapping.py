"""Accelerate's settings for the strategy of a recipe."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...errors import RecipeError
from ..recipe.strategy import Fsdp


def fsdp_plugin(fsdp: Fsdp, model: nn.Module) -> Any:
    """Accelerate's settings of FSDP2, for the model that is to be sharded."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    policies = {
        "transformer": "transformer_based_wrap", "size": "size_based_wrap", "none": "no_wrap",
    }  # fmt: skip
    kwargs: dict[str, Any] = {
        "fsdp_version": 2,
        "auto_wrap_policy": policies[fsdp.wrap],
        "reshard_after_forward": fsdp.reshard_after_forward,
        "state_dict_type": fsdp.state_dict_type,
        "cpu_ram_efficient_loading": False,  # every process has read the weights itself
        "activation_checkpointing": False,  # blocks do that themselves: Recipe.checkpointing
    }
    if left := left_whole(model):
        kwargs["ignored_modules"] = [_holding(left.values())]
        _leave_scales_out(model)
    if fsdp.offload_params:
        pins = fsdp.pin_memory and torch.cuda.is_available()  # which is for copies to a GPU
        kwargs["cpu_offload"] = CPUOffloadPolicy(pin_memory=pins)
    if fsdp.wrap == "transformer":
        kwargs["transformer_cls_names_to_wrap"] = list(fsdp.classes) or block_classes(model)
    if fsdp.wrap == "size":
        kwargs["min_num_params"] = fsdp.min_num_params
    if fsdp.mixed_precision is not None:
        dtype = getattr(torch, fsdp.mixed_precision)
        kwargs["mixed_precision_policy"] = MixedPrecisionPolicy(param_dtype=dtype)
    return FullyShardedDataParallelPlugin(**kwargs)


def left_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that FSDP cannot shard, by name: those whose scales are beside them.

    bitsandbytes' weights of 8 bits, and packed experts, are frozen, so that nothing is averaged.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and (parameter.dtype is torch.int8 or _packs(parameter))
    }


def _packs(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "packed") and hasattr(parameter, "states")


def _holding(parameters: Iterable[nn.Parameter]) -> nn.Module:
    """A module that has these parameters, for accelerate, which ignores those of modules."""
    holder = nn.Module()
    for number, parameter in enumerate(parameters):
        holder.register_parameter(str(number), parameter)
    return holder


def _leave_scales_out(model: nn.Module) -> None:
    """Take the scales of 8-bit weights, which are no parameters, out of state dictionaries.

    PyTorch looks for an attribute by each name there, and bitsandbytes has none. Frozen weights are
    never written.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            plain = functools.partial(nn.Linear._save_to_state_dict, module)
            module._save_to_state_dict = plain  # type: ignore[method-assign]


def block_classes(model: nn.Module) -> list[str]:
    """The classes of the model's blocks: the elements of its repeated lists of modules."""
    from ...compiler.regions import find

    return sorted({type(r.module).__name__ for r in find(model) if r.kind == "block"})


def deepspeed_config(
    written: Mapping[str, Any], dtype: torch.dtype, adapters: bool = False
) -> dict[str, Any]:
    """The configuration that the Trainer hands to DeepSpeed, once it has filled in ``auto``.

    ``written`` is the recipe's, ``dtype`` that of the weights: DeepSpeed trains a copy in 32 bits
    of those that have 16. If only ``adapters`` are trained, over bf16 they have 32 bits, as in one
    process, which DeepSpeed would cast. Over fp16, it scales the loss, so they have 16 bits, and a
    copy in 32.

    Raises:
        RecipeError: it names another dtype.
    """
    config = copy.deepcopy(dict(written))
    for name in _BY_RECIPE:
        config.setdefault(name, "auto")
    config.setdefault("zero_allow_untested_optimizer", True)
    config.setdefault("zero_force_ds_cpu_optimizer", False)  # which is compiled first
    _require_known(config["zero_optimization"])
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for name, kind in kinds.items():
        enabled = config.get(name, {}).get("enabled", "auto")
        if enabled not in ("auto", dtype is kind):
            raise RecipeError(
                f"deepspeed: {name}.enabled is {json.dumps(enabled)}, but the recipe trains in "
                f"{str(dtype).removeprefix('torch.')}: write auto for it, or set {name}: "
                f"{json.dumps(enabled)}"
            )
        left = adapters and kind is torch.bfloat16
        config[name] = {**config.get(name, {}), "enabled": dtype is kind and not left}
    return config


def check_deepspeed(arguments: Any) -> None:
    """Let DeepSpeed's dtype be the weights', and all else what the recipe says.

    The Trainer compares the dtype with that of its own autocast, which is off.

    Raises:
        RecipeError: a number in DeepSpeed's file is not the recipe's.
    """
    config = getattr(arguments, "hf_deepspeed_config", None)
    if config is None:
        return
    dtypes = ("- ds bf16.enabled=", "- ds fp16.enabled=")
    config.mismatches = [m for m in config.mismatches if not m.startswith(dtypes)]
    if config.mismatches:
        expected, _, ours = config.mismatches[0].removeprefix("- ds ").partition(" vs hf ")
        raise RecipeError(
            f"deepspeed: {expected} in its configuration, but the recipe and the number of "
            f"processes give {ours}: write auto"
        )


def _require_known(zero: Mapping[str, Any]) -> None:
    """Check the keys and values of ``zero_optimization`` by DeepSpeed's own model."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *detail["loc"])))
        raise RecipeError(f"deepspeed: {key}: {detail['msg']}") from None


_BY_RECIPE = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping",
)  # fmt: skip


def deepspeed_state() -> dict[str, Any]:
    """Arguments of the Trainer for DeepSpeed, whose processes accelerate counts on GPUs only."""
    if torch.cuda.is_available():
        return {}
    from accelerate.state import AcceleratorState, PartialState
    from torch import distributed as dist

    name = "ACCELERATE_USE_DEEPSPEED"
    before = os.environ.get(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ[name] = "true"
    try:
        state: Any = PartialState()
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
    state.backend, state.device = "gloo", torch.device("cpu")
    state.num_processes, state.process_index = dist.get_world_size(), dist.get_rank()
    return {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
