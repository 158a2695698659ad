"""What is known of parameters that processes share, by each engine that shards them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fusewright import sharding


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Of one process, which has all shares."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _zero3(status: str = "NOT_AVAILABLE") -> Any:
    """A parameter as ZeRO-3 leaves it."""
    parameter: Any = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 0, torch.Size([4, 3])
    parameter.ds_status, parameter.ds_process_group = SimpleNamespace(name=status), "group"
    parameter.all_gather, parameter.partition = (lambda: "whole"), (lambda: "parts")
    return parameter


class _Model(nn.Sequential):
    pass


def test_a_parameter_of_this_process_alone() -> None:
    parameter = nn.Parameter(torch.ones(4, 3))
    assert not sharding.is_sharded(parameter)
    assert not sharding.is_released(parameter)
    assert sharding.whole_shape(parameter) == (4, 3)
    assert sharding.whole(parameter) is parameter
    assert sharding.local_share(parameter).data_ptr() == parameter.data_ptr()
    assert not sharding.local_share(parameter).requires_grad
    assert not sharding.has_shards(nn.Linear(3, 4))
    assert sharding.gathering_of(nn.Linear(3, 4), parameter) is None
    assert sharding.gathering_of(None, parameter) is None


def test_a_parameter_in_zero3() -> None:
    parameter = _zero3()
    assert sharding.in_zero3(parameter)
    assert not sharding.is_dtensor(parameter)
    assert sharding.is_released(parameter)
    assert not sharding.is_released(_zero3("AVAILABLE"))
    assert sharding.whole_shape(parameter) == (4, 3)
    gathering = sharding.gathering_of(None, parameter)
    assert gathering is not None
    assert (gathering.gather(), gathering.release(), gathering.group) == ("whole", "parts", "group")
    model = nn.Linear(3, 4)
    model.weight = parameter
    assert sharding.has_shards(model)


def test_a_dtensor(mesh: DeviceMesh) -> None:
    parameter = nn.Parameter(distribute_tensor(torch.arange(12.0).view(4, 3), mesh, [Shard(0)]))
    assert sharding.is_dtensor(parameter)
    assert sharding.is_sharded(parameter)
    assert not sharding.in_zero3(parameter)
    assert not sharding.is_released(parameter)
    for plain in (sharding.whole(parameter), sharding.local_share(parameter)):
        assert not sharding.is_dtensor(plain)
        assert torch.equal(plain, torch.arange(12.0).view(4, 3))
    assert not sharding.local_share(parameter).requires_grad


def test_a_unit_of_fsdp2(mesh: DeviceMesh) -> None:
    model: Any = _Model(nn.Linear(3, 4), nn.Linear(4, 2))
    weights = [p.detach().clone() for p in model[0].parameters()]
    policy = MixedPrecisionPolicy(torch.bfloat16, output_dtype=torch.float32)
    fully_shard(model[0], mesh=mesh)
    assert not sharding.gathers(model[1])
    fully_shard(model[1], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    model(torch.ones(2, 3))  # only the root's are whole after it
    assert sharding.has_shards(model)
    assert sharding.class_before_fsdp2(model) is _Model
    assert sharding.class_before_fsdp2(model[0]) is nn.Linear
    assert sharding.class_before_fsdp2(nn.Linear(1, 1)) is nn.Linear
    assert sharding.fsdp2_casts(model[0]) == (None, None)
    assert sharding.fsdp2_casts(model[1]) == (torch.bfloat16, torch.float32)
    assert sharding.fsdp2_casts(nn.Linear(1, 1)) == (None, None)
    assert all(map(sharding.gathers, model))
    assert sharding.divided_by(model[0]) is None

    model[0].unshard()
    whole = [p.detach() for p in model[0].parameters()]
    model[0].reshard()
    assert all(map(sharding.is_released, whole))
    for tensor, weight in zip(whole, weights, strict=True):
        gathering = sharding.gathering_of(model, tensor)
        assert gathering is not None
        gathering.gather()
        assert not sharding.is_released(tensor)
        assert torch.equal(tensor, weight)
        gathering.release()
        assert sharding.is_released(tensor)
    assert sharding.gathering_of(model, torch.ones(2)) is None

    model[0].register_forward_hook(lambda *_: None)
    assert not sharding.gathers(model[0])


def test_a_layer_in_tensor_parallelism(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    assert sharding.divided_by(model[0]) == "tensor parallelism"
    assert sharding.divided_by(model[1]) is None
    assert sharding.is_dtensor(model[0].weight)
    assert not sharding.gathers(model[0])


def test_a_hook_is_known_by_the_function_behind_it() -> None:
    def theirs(*_: Any) -> None: ...

    theirs.__module__ = "deepspeed.runtime.zero.parameter_offload"

    @functools.wraps(theirs)
    def wrapped(*args: Any) -> None: ...

    wrapped.__module__ = "anywhere"
    for hook in (theirs, wrapped, functools.partial(theirs, 1)):
        model = nn.Linear(2, 2)
        assert not sharding.gathers(model)
        handle = model.register_forward_pre_hook(hook)
        assert sharding.gathers(model)
        handle.remove()
        assert not sharding.gathers(model)
