"""Context parallelism: how batches are divided, and that the parts are worth the whole.

torch has ring attention for GPUs only. ``ring`` registers the CPU's kernel with its templates, so
that everything around them is tried; a run of the command refuses.
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
from fusewright.train import train
from fusewright.train.processes.context_parallel import (
    divisible,
    require_causal,
    require_ring_attention,
)
from fusewright.train.processes.world import World
from fusewright.train.recipe.load import load_recipe
from fusewright.train.recipe.strategy import Strategy
from fusewright.train.run import TrainingRun

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


@ON_CPU
def test_a_cpu_has_no_ring_attention() -> None:
    require_ring_attention(Strategy("fsdp", context=1))
    with pytest.raises(RecipeError, match="context_parallel_size: torch's ring attention has no"):
        require_ring_attention(Strategy("fsdp", context=2))


@ON_CPU
def test_a_run_on_cpus_is_refused_in_one_sentence(recipe: dict[str, Any]) -> None:
    keys = {"context_parallel_size": 1, "fsdp": True, "sample_packing": False}
    load_recipe({**recipe, **keys})
    with pytest.raises(RecipeError) as error:
        train({**recipe, **keys, "context_parallel_size": 2}, console=Console(quiet=True))
    assert str(error.value).startswith("context_parallel_size: 2 needs a multiple of 2 processes")


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
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
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
        mesh, buffers=buffers, buffer_seq_dims=[1] * 4, no_restore_buffers=set(buffers)
    ):
        part, width = loss(), batch["input_ids"].shape[1]
    torch.distributed.all_reduce(part)
    return whole, float(part), width


@pytest.mark.long
def test_the_losses_of_the_parts_add_up_to_that_of_the_whole() -> None:
    for whole, parts, width in values(_losses_of_parts):
        assert width == 12
        assert parts == pytest.approx(whole, rel=1e-6)


def _trained(world: World, keys: dict[str, Any]) -> list[float]:
    ring.register()
    recipe = load_recipe(keys)
    world.share_batches(recipe.strategy().group)
    result = TrainingRun(recipe, Console(quiet=True), world).run()
    assert {"forward", "backward"} <= set(ring.calls) or not world.several
    found = [entry["loss"] for entry in result.history if "loss" in entry]
    return [*found, result.val_loss_after or 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    "sizes", [{"context_parallel_size": 2}, {"context_parallel_size": 2, "tensor_parallel_size": 2}]
)
def test_processes_that_share_sequences_train_what_one_does(
    base: Path, rows: Path, tmp_path: Path, sizes: dict[str, int], optimize: bool
) -> None:
    common = small_recipe(base, rows, tmp_path / "out") | {
        "adapter": None, "lora_r": None, "lora_target_linear": None, "learning_rate": 1e-3,
        "sample_packing": False, "max_steps": 10, "logging_steps": 1, "optimize": optimize,
        "codegen": "eager", "dataset_prepared_path": str(tmp_path / "prepared"),
    }  # fmt: skip
    size = 2 ** len(sizes)
    one = values(_trained, {**common, "output_dir": str(tmp_path / "one")}, size=1, limit=300.0)[0]
    keys = {**common, **sizes, "fsdp": True}
    for found in values(_trained, keys, size=size, timeout=120.0, limit=300.0):
        assert found == pytest.approx(one, abs=1e-5)
