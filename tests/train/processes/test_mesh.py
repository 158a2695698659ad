"""What a run says of its processes."""

from __future__ import annotations

from typing import Any

import pytest

from fusewright.train.processes.mesh import processes_message
from fusewright.train.processes.world import Placement, World
from fusewright.train.recipe.load import load_recipe

BASE: dict[str, Any] = {"base_model": "a/b", "datasets": [{"path": "a/b"}]}
OFFLOADED = {"fsdp_config": {"offload_params": True, "mixed_precision_policy": "bfloat16"}}


@pytest.mark.parametrize(
    ("size", "keys", "expected"),
    [
        (1, {}, None),
        (2, {}, "processes: 2; each has all the weights (DDP)"),
        (2, OFFLOADED, "processes: 2; weights are sharded (FSDP2)"),
        (
            1, OFFLOADED,
            "fsdp: one process has all the weights, so they are not sharded; "
            "fsdp_config.offload_params and fsdp_config.mixed_precision_policy: not used, nothing "
            "is sharded",
        ),
        (
            2, {"tensor_parallel_size": 2, "fsdp_config": {"offload_params": True}},
            "processes: 2; 2 share each layer (tensor parallelism); fsdp_config.offload_params: "
            "not used, nothing is sharded",
        ),
        (
            4, {"tensor_parallel_size": 2, "fsdp_config": {"offload_params": True}},
            "processes: 4; weights are sharded (FSDP2); 2 share each layer (tensor parallelism)",
        ),
    ],
)  # fmt: skip
def test_what_is_said(size: int, keys: dict[str, Any], expected: str | None) -> None:
    strategy = load_recipe({**BASE, **keys}).strategy()
    assert processes_message(strategy, World(Placement(0, size, 0, size))) == expected
