"""What each process holds, beside what the engines themselves would give it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusewright.errors import RecipeError
from fusewright.train.plan.count.blueprint import draw
from fusewright.train.plan.count.layout import ProcessLayout, layout_of, model_states, state_bytes
from fusewright.train.plan.count.network import traffic
from fusewright.train.plan.count.tensors import Weight, fsdp_units, quantized_bytes

from .conftest import LORA, MakeRecipe

FSDP = {"fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}


@pytest.fixture
def fake_group(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process group of so many ranks, none of which is there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def test_weights_of_8_bits_are_whole_in_each_process(recipe: MakeRecipe) -> None:
    made = draw(recipe(**LORA), torch.bfloat16)
    alone, shared = (
        model_states(fsdp_units(made, 8), ProcessLayout("FSDP2", n, shard=n), "adamw_torch")
        for n in (1, 4)
    )
    packed = sum(w.scales * u.times for u in fsdp_units(made, 8) for w in u.weights)
    assert 0 < packed < shared.weights < alone.weights


@pytest.mark.parametrize("fake_group", [2, 8, 1024], indirect=True)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_shards_are_those_of_fully_shard(method: str, fake_group: int, recipe: MakeRecipe) -> None:
    made = draw(recipe(**(LORA if method == "lora" else {})), torch.bfloat16)
    planned = model_states(
        fsdp_units(made, None), ProcessLayout("FSDP2", fake_group, shard=fake_group), "adamw_torch"
    )
    mesh = init_device_mesh("cpu", (fake_group,))
    for block in made.blocks.values():
        fully_shard(block, mesh=mesh)
    fully_shard(made.model, mesh=mesh)
    local = {p: p.to_local() for p in made.model.parameters()}  # type: ignore[attr-defined]
    times = {p: made.times[path] for path, b in made.blocks.items() for p in b.parameters()}
    own = sum(times.get(p, 1) * t.nbytes for p, t in local.items())
    trained = sum(times.get(p, 1) * t.nbytes for p, t in local.items() if p.requires_grad)
    assert planned.weights == own
    assert planned.gradients == trained
    assert planned.optimizer == 2 * trained
    assert planned.between_steps == own + 2 * trained


def test_zero_has_a_copy_in_32_bits_of_what_it_trains(recipe: MakeRecipe) -> None:
    made = draw(recipe(), torch.bfloat16)
    numbers = sum(u.times * w.numbers for u in fsdp_units(made, None) for w in u.weights)
    found = model_states(
        fsdp_units(made, None), ProcessLayout("ZeRO-3", 2, shard=2, persistent=0), "adamw_torch"
    )
    assert found.weights == pytest.approx(2 * numbers / 2, rel=1e-3)
    assert found.optimizer == pytest.approx(12 * numbers / 2, rel=1e-3)
    first = model_states(fsdp_units(made, None), ProcessLayout("ZeRO-1", 2), "adamw_torch")
    assert first.weights == 2 * numbers
    assert first.optimizer == pytest.approx(12 * numbers / 2, rel=1e-3)


def test_small_weights_stay_whole_under_zero_3(recipe: MakeRecipe) -> None:
    parts = fsdp_units(draw(recipe(**LORA), torch.bfloat16), None)
    small = model_states(parts, ProcessLayout("ZeRO-3", 2, shard=2), "adamw_torch").weights
    none = model_states(
        parts, ProcessLayout("ZeRO-3", 2, shard=2, persistent=0), "adamw_torch"
    ).weights
    persistent = sum(u.times * w.bytes for u in parts for w in u.weights if w.numbers <= 100_000)
    assert small - none == persistent


def test_what_is_offloaded_is_on_the_host(recipe: MakeRecipe) -> None:
    made = recipe(**FSDP | {"fsdp_config": {"offload_params": True}})
    layout = layout_of(made, 2)
    own = model_states(fsdp_units(draw(made, torch.bfloat16), None), layout, "adamw_torch")
    assert own.host == own.weights + own.gradients + own.optimizer


@pytest.mark.parametrize(
    ("keys", "world", "engine", "shard", "replicate"),
    [
        ({}, 1, "one process", 1, 1),
        ({}, 8, "DDP", 1, 8),
        (FSDP, 8, "FSDP2", 8, 1),
        ({**FSDP, "dp_shard_size": 4, "dp_replicate_size": 2}, 8, "HSDP", 4, 2),
        ({"deepspeed": "deepspeed_configs/zero2.json"}, 4, "ZeRO-2", 1, 1),
        ({"deepspeed": "deepspeed_configs/zero3.json"}, 4, "ZeRO-3", 4, 1),
    ],
)
def test_layouts(
    keys: dict[str, object], world: int, engine: str, shard: int, replicate: int,
    recipe: MakeRecipe,
) -> None:  # fmt: skip
    found = layout_of(recipe(**keys), world)
    assert (found.engine, found.shard, found.replicate) == (engine, shard, replicate)


def test_a_number_of_devices_that_the_recipe_cannot_use(recipe: MakeRecipe) -> None:
    made = recipe(**FSDP, dp_shard_size=4, dp_replicate_size=2)
    with pytest.raises(RecipeError, match="3 processes run"):
        layout_of(made, 3)


# --- states, quantized weights, traffic -----------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "size"),
    [
        ("adamw_torch", 2 * 2), ("sgd", 0), ("lion_32bit", 4), ("adamw_8bit", 2 * (1 + 4 / 256)),
        ("ademamix", 3 * 2), ("paged_lion_8bit", 1 + 4 / 256), ("adagrad", 2),
    ],
)  # fmt: skip
def test_states(optimizer: str, size: float) -> None:
    weight = Weight(64 * 128, 64, 2 * 64 * 128, 2, trains=True, is_matrix=True)
    assert state_bytes(optimizer, weight) == round(size * 64 * 128)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adagrad", "adafactor"])
def test_states_are_those_of_the_optimizers_themselves(optimizer: str) -> None:
    from transformers.optimization import Adafactor

    kinds = {
        "adamw_torch": torch.optim.AdamW, "adagrad": torch.optim.Adagrad, "adafactor": Adafactor,
        "sgd": torch.optim.SGD,
    }  # fmt: skip
    p = nn.Parameter(torch.randn(64, 128))
    made = kinds[optimizer]([p])  # type: ignore[operator]
    p.grad = torch.ones_like(p)
    made.step()
    tensors = [v for v in made.state[p].values() if isinstance(v, torch.Tensor) and v.dim()]
    weight = Weight(64 * 128, 64, 4 * 64 * 128, 4, trains=True, is_matrix=True)
    assert state_bytes(optimizer, weight) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("shape", [(96, 64), (192, 576), (50, 33)])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_as_large_as_those_of_bitsandbytes(
    shape: tuple[int, int], bits: int
) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="it is the one to compare with")
    weight = torch.randn(shape)
    found = quantized_bytes(weight, bits)
    if bits == 8:
        made, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        assert found == (made.nbytes, scales.nbytes)
        return
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert found == (packed.nbytes, state.absmax.nbytes + state.state2.absmax.nbytes)


def test_traffic_is_that_of_the_closed_formulas(recipe: MakeRecipe) -> None:
    parts = fsdp_units(draw(recipe(), torch.bfloat16), None)
    whole = sum(u.times * w.bytes for u in parts for w in u.weights)
    outside = sum(w.bytes for u in parts if not u.name for w in u.weights)
    ddp = traffic(parts, ProcessLayout("DDP", 8, replicate=8), 4, 256, 64)
    assert ddp.total == round(2 * 7 / 8 * whole)
    fsdp = traffic(parts, ProcessLayout("FSDP2", 8, shard=8), 4, 256, 64)
    assert fsdp.weights == pytest.approx(7 / 8 * (2 * whole - outside) * 4, abs=1)
    assert fsdp.gradients == pytest.approx(7 / 8 * whole, abs=1)
    hsdp = traffic(parts, ProcessLayout("HSDP", 8, shard=4, replicate=2), 1, 256, 64)
    assert hsdp.gradients == pytest.approx(3 / 4 * whole, abs=1)
    assert hsdp.copies == pytest.approx(2 * 1 / 2 / 4 * whole, abs=1)
    zero = traffic(parts, ProcessLayout("ZeRO-3", 8, shard=8), 4, 256, 64)
    assert zero.weights == pytest.approx(7 / 8 * 2 * whole * 4, abs=1)
    assert traffic(parts, ProcessLayout("one process"), 4, 256, 64).total == 0


def test_zero_2_reduces_in_each_pass(recipe: MakeRecipe) -> None:
    parts = fsdp_units(draw(recipe(), torch.bfloat16), None)
    one, four = (traffic(parts, ProcessLayout("ZeRO-2", 8), n, 256, 64).gradients for n in (1, 4))
    assert four == pytest.approx(4 * one, abs=4)


def test_keys_and_values_go_around_the_ring(recipe: MakeRecipe) -> None:
    parts = fsdp_units(draw(recipe(), torch.bfloat16), None)
    layout = ProcessLayout("FSDP2", 4, shard=1, context=4)
    found = traffic(parts, layout, 1, 256, 64, keys=32).activations
    assert found == 4 * 6 * 3 * (256 // 4) * 32 * 2  # blocks, tensors, hops, tokens, width, bytes


def test_scales_of_quantized_weights_are_not_divided(recipe: MakeRecipe) -> None:
    made = recipe(**LORA | {"adapter": "qlora", "load_in_4bit": True})
    parts = fsdp_units(draw(made, torch.bfloat16), 4)
    scales = sum(u.times * w.scales for u in parts for w in u.weights)
    stored = sum(u.times * w.bytes for u in parts for w in u.weights)
    found = model_states(parts, ProcessLayout("FSDP2", 1024, shard=1024), "adamw_torch").weights
    assert scales < found < scales + stored / 8


def test_only_what_is_trained_is_reduced(recipe: MakeRecipe) -> None:
    parts = fsdp_units(draw(recipe(**LORA), torch.bfloat16), None)
    trained = sum(u.times * w.numbers * w.itemsize for u in parts for w in u.weights if w.trains)
    assert traffic(parts, ProcessLayout("DDP", 2, replicate=2), 1, 256, 64).total == trained
