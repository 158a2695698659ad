"""Context parallelism: how batches are divided, and that the parts are worth the whole.

torch has ring attention for GPUs only. ``ring`` registers the CPU's kernel with its templates, so
that everything around them is tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from fusewright.errors import RecipeError
from fusewright.train.processes import context_parallel as context_parallel_module
from fusewright.train.processes import mesh
from fusewright.train.processes.context_parallel import (
    _ATTENTION,
    Parts,
    divisible,
    gathers,
    require_causal,
)
from fusewright.train.processes.world import World
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.strategy import Strategy
from fusewright.train.run import TrainingRun
from fusewright.train.trainer import sharding

from ..conftest import make_model, small_recipe
from . import ring
from .ranks import values

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize(("width", "size", "expected"), [(16, 2, 16), (14, 2, 16), (17, 3, 18)])
def test_a_batch_that_can_be_divided(width: int, size: int, expected: int) -> None:
    ids = torch.arange(2 * width).view(2, width)
    labels = ids.clone()
    labels[:, :5] = -100
    given = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    batch = divisible(given, size, 7)
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "position_ids", "shift_labels"), (2, expected)
    )
    assert torch.equal(batch["input_ids"][:, :width], ids)
    assert (batch["input_ids"][:, width:] == 7).all()
    assert torch.equal(batch["shift_labels"][:, :-1], batch["labels"][:, 1:])
    trained = (batch["shift_labels"] != -100).sum()
    assert trained == (labels[:, 1:] != -100).sum()
    assert batch["position_ids"].tolist() == [list(range(expected))] * 2


def test_positions_of_packs_stay_and_padding_is_apart() -> None:
    ids = torch.arange(10).view(1, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    batch = divisible({"input_ids": ids, "labels": ids, "position_ids": positions}, 2, 7)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 0]]


@ON_CPU
@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Strategy("fsdp"), False),
        (Strategy("fsdp", context=2), True),  # of rings, torch has none for CPUs
        (Strategy("ddp", context=2, packs=True), True),
    ],
)
def test_who_gathers(strategy: Strategy, expected: bool) -> None:
    assert gathers(strategy) is expected


def test_models_with_other_attention_are_refused() -> None:
    require_causal(make_model())
    window = make_model()
    window.config.layer_types = ["full_attention", "sliding_attention"]
    eager = make_model()
    eager.set_attn_implementation("eager")
    other = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=20))
    for model, said in (
        (window, "LlamaForCausalLM has layers of sliding_attention"),
        (eager, "LlamaForCausalLM does not compute attention with torch's sdpa"),
        (other, "GPT2LMHeadModel has layers without self_attn"),
    ):
        with pytest.raises(RecipeError, match=said):
            require_causal(model)


# --- two processes -------------------------------------------------------------------------------


def _batch() -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(3, 200, (2, 22))
    labels = ids.clone()
    labels[:, :4] = -100
    return divisible({"input_ids": ids, "labels": labels}, 2, 0)


def _losses_of_parts(world: World) -> tuple[float, float, int]:
    """Of logits that need no attention: the loss of the whole, and those of the parts added up."""
    pair = torch.distributed.init_device_mesh("cpu", (2,))
    batch = _batch()
    table = torch.randn(262, 262, generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        logits = table[batch["input_ids"]]
        return F.cross_entropy(
            logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="sum"
        )

    whole = float(loss())
    buffers = list(batch.values())
    with context_parallel(
        pair, buffers=buffers, buffer_seq_dims=[1] * 4, no_restore_buffers=set(buffers)
    ):
        part, width = loss(), batch["input_ids"].shape[1]
    torch.distributed.all_reduce(part)
    return whole, float(part), width


@pytest.mark.long
def test_the_losses_of_the_parts_add_up_to_that_of_the_whole() -> None:
    for whole, parts, width in values(_losses_of_parts):
        assert width == 12
        assert parts == pytest.approx(whole, rel=1e-6)


def _trained(world: World, keys: dict[str, Any], rings: bool = False) -> list[float]:
    if rings:  # as on a GPU
        ring.register()
        for place in (context_parallel_module, mesh, sharding):
            place.gathers = lambda strategy: False  # type: ignore[attr-defined]
    recipe = load_recipe(keys)
    world.share_batches(recipe.strategy().group)
    result = TrainingRun(recipe, Console(quiet=True), world).run()
    assert ({"forward", "backward"} <= set(ring.calls)) is rings or not world.several
    found = [entry["loss"] for entry in result.history if "loss" in entry]
    return [*found, result.val_loss_after or 0.0]


def _keys(base: Path, rows: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    return small_recipe(base, rows, folder / "out") | {
        "adapter": None, "lora_r": None, "lora_target_linear": None, "learning_rate": 1e-3,
        "max_steps": 10, "logging_steps": 1, "codegen": "eager",
        "dataset_prepared_path": str(folder / "prepared"), **keys,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    "sizes", [{"context_parallel_size": 2}, {"context_parallel_size": 2, "tensor_parallel_size": 2}]
)
def test_processes_in_a_ring_train_what_one_does(
    base: Path, rows: Path, tmp_path: Path, sizes: dict[str, int], optimize: bool
) -> None:
    common = _keys(base, rows, tmp_path, sample_packing=False, optimize=optimize)
    size = 2 ** len(sizes)
    one = values(_trained, {**common, "output_dir": str(tmp_path / "one")}, size=1, limit=300.0)[0]
    keys = {**common, **sizes, "fsdp": True}
    for found in values(_trained, keys, True, size=size, timeout=120.0, limit=300.0):
        assert found == pytest.approx(one, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [
        {}, {"fsdp": True}, {"fsdp": True, "tensor_parallel_size": 2},
        {"deepspeed": "deepspeed_configs/zero2.json"},
        {"deepspeed": "deepspeed_configs/zero3.json"},
    ],
    ids=["ddp", "fsdp", "tensor", "zero2", "zero3"],
)  # fmt: skip
def test_packs_that_processes_share_train_as_in_one(
    base: Path, rows: Path, tmp_path: Path, strategy: dict[str, Any], optimize: bool
) -> None:
    common = _keys(base, rows, tmp_path, optimize=optimize)
    one = values(_trained, {**common, "output_dir": str(tmp_path / "one")}, size=1, limit=300.0)[0]
    size = 2 * strategy.get("tensor_parallel_size", 1)
    keys = {**common, **strategy, "context_parallel_size": 2}
    for found in values(_trained, keys, size=size, timeout=120.0, limit=300.0):
        assert found == pytest.approx(one, abs=1e-5)


def _gradients(world: World) -> tuple[float, float, float]:
    """The largest differences of loss and gradients from those of one process, and of a leak."""
    torch.manual_seed(0)
    model = make_model()
    ids = torch.randint(3, 200, (2, 44))
    labels = ids.clone()
    sizes = ([20, 1, 23], [7, 30, 7])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in sizes])
    labels[positions == 0] = -100
    batch = divisible({"input_ids": ids, "labels": labels, "position_ids": positions}, 2, 0)

    def loss(inputs: dict[str, Any]) -> Any:
        out = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"])
        flat = out.logits.flatten(0, 1).double(), inputs["shift_labels"].flatten()
        return F.cross_entropy(*flat, reduction="sum")

    whole = loss(batch)
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    inputs, attention = Parts(world, Strategy("ddp", context=2, packs=True)).divide(batch)
    with attention():
        part = loss(inputs)
        part.backward()
    total = part.detach().clone()
    torch.distributed.all_reduce(total)
    worst = 0.0
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad)
        worst = max(worst, (parameter.grad - grad).abs().max().item() / grad.abs().max().item())
    assert F.scaled_dot_product_attention is _ATTENTION
    with attention(), torch.no_grad():
        changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
        chosen = _of_first_samples(inputs, batch)
        changed["input_ids"][chosen] += 1
        before, after = (
            model(input_ids=i["input_ids"], position_ids=i["position_ids"]).logits
            for i in (inputs, changed)
        )
        leak = (before - after)[~chosen].abs().max().item()
    return abs(float(total) - float(whole)) / float(whole), worst, leak


def _of_first_samples(inputs: dict[str, Any], batch: dict[str, Any]) -> Any:
    """Which tokens of a part are of the first sample in their row."""
    first = (batch["position_ids"] == 0).cumsum(1) == 1
    rank, width = torch.distributed.get_rank(), batch["input_ids"].shape[1]
    chunks = torch.arange(width).view(4, -1)
    return first[:, torch.cat([chunks[rank], chunks[3 - rank]])]


@pytest.mark.long
def test_loss_and_every_gradient_of_parts_are_those_of_one_process() -> None:
    for loss, gradients, leak in values(_gradients):
        assert loss < 1e-6
        assert gradients < 1e-5
        assert leak == 0
