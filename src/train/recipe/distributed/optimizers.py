"""Optimizers that do not go with weights, or states, that several processes share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..keys.distributed import DistributedKeys
from .sharding import is_sharded

if TYPE_CHECKING:
    from ..problems import Loc

    Problem = tuple[Loc, str]

_FEW_BITS = re.compile(r"_\d+bit")
_OTHERS = ("ademamix", "rmsprop_bnb", "adafactor")


def optimizer_conflicts(values: Mapping[str, Any], recipe: DistributedKeys) -> Iterator[Problem]:
    """Yield the place and the problem of an optimizer that cannot train as the other keys say.

    Those of bitsandbytes, and Adafactor, do not know PyTorch's ``DTensor``; torchao's know
    FSDP's. DeepSpeed steps the shares of all parameters as one, whose blocks of 8 bits are those of
    no parameter.

    Args:
        values: the recipe as written.
        recipe: its keys of several processes.
    """
    name = str(values.get("optimizer", ""))
    divided, of_torch = recipe.tensor_parallel_size > 1, name.startswith("adamw_torch")
    few_bits = bool(_FEW_BITS.search(name)) and (divided or not of_torch)
    if (divided or is_sharded(recipe)) and (few_bits or name in _OTHERS):
        key = "tensor_parallel_size" if divided else "FSDP"
        instead = "adamw_torch_fused" if divided else "adamw_torch_fused or adamw_torch_8bit"
        yield ("optimizer",), f"{name} needs whole weights, which {key} divides: use {instead}"
    elif recipe.deepspeed and "8bit" in name and not (of_torch or values.get("save_only_model")):
        yield (
            ("optimizer",),
            f"under DeepSpeed, checkpoints cannot hold the state of {name}: use adamw_torch_fused, "
            "or set save_only_model: true",
        )
