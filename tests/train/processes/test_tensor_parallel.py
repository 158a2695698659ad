"""Tensor parallelism: layers divided between processes compute and train what whole ones do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.train.processes.gather import whole_weights
from fusewright.train.processes.tensor_parallel import divide, left_whole, require_divisible
from fusewright.train.processes.world import World
from tests.explained import explain

from ..results import difference
from .ranks import values
from .runs import Runs
from .test_runs import FULL, assert_as_one, assert_said_once

slow = pytest.mark.slow
SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "use_cache": False,
}  # fmt: skip


def _llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def _qwen3(**changes: Any) -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 8, **changes}))


def _mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def _lora(model: Any) -> Any:
    found: Any = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in found.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the first factor
            nn.init.normal_(parameter, std=0.1)
    return found


MODELS = {
    "llama": _llama,
    "tied, with biases": lambda: _llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "norms of heads": _qwen3,
    "experts": _mixtral,
    "LoRA": lambda: _lora(_qwen3()),
}


def _made(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():  # norms and biases are constant at first
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.1)
    return model.train()


def _step(model: Any, twice: bool = True) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of two forward passes, which are added up."""
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for _ in range(2 if twice else 1):
        ids = torch.randint(60, (2, 9), generator=generator)
        found = model(input_ids=ids, labels=ids).loss
        found.backward()
        loss += float(found)
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


class Computed(NamedTuple):
    """What divided layers have computed, beside whole ones.

    Attributes:
        loss: the difference of the losses.
        gradient: the largest difference of a gradient.
        short: the weights of which this process holds less than all.
        gathered: whether the weights brought together again are what they were.
        rules: what was rewritten, how often.
        report: of the compiler.
    """

    loss: float
    gradient: float
    short: set[str]
    gathered: bool
    rules: dict[str, int]
    report: str


def _computed(mesh: Any, name: str, optimized: bool) -> Computed:
    whole = _made(name)
    model = copy.deepcopy(whole)
    weights = {n: p.detach().clone() for n, p in model.state_dict().items()}
    divide(model, mesh)
    parts = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
    held = {n: p._local_tensor.untyped_storage().nbytes() // 4 for n, p in parts.items()}
    gathered = whole_weights(model, False)
    same = all(torch.equal(weights[n], t) for n, t in gathered.items())
    if optimized:
        optimize(model, codegen="eager")
    expected, found = _step(whole), _step(model)
    report = explain(model) if optimized else None
    wrong = []
    for key, gradient in expected[1].items():
        own: Any = found[1][key]
        own = own.full_tensor() if isinstance(own, DTensor) else own
        wrong.append(float((own - gradient).abs().max()))
    return Computed(
        abs(found[0] - expected[0]), max(wrong), {n for n in parts if held[n] < parts[n].numel()},
        same, report.by_rule() if report else {}, str(report),
    )  # fmt: skip


OPTIMIZED = ["llama", "norms of heads", "LoRA"]


def _all_computed(world: World) -> dict[tuple[str, bool], Any]:
    mesh = torch.distributed.init_device_mesh("cpu", (world.size,), mesh_dim_names=("tp",))
    cases = [(name, False) for name in MODELS] + [(name, True) for name in OPTIMIZED]
    return {(name, optimized): _computed(mesh["tp"], name, optimized) for name, optimized in cases}


@pytest.fixture(scope="module")
def computed() -> list[dict[tuple[str, bool], Computed]]:
    """By rank, for each case: processes take long to start."""
    return values(_all_computed, limit=300.0)


Ranks = list[dict[tuple[str, bool], Computed]]


@pytest.mark.long("llama")
@pytest.mark.parametrize("name", MODELS)
def test_divided_layers_compute_what_whole_ones_do(computed: Ranks, name: str) -> None:
    for rank in computed:
        found = rank[name, False]
        assert found.loss < 1e-5
        assert found.gradient < 1e-5
        assert found.gathered
        for part in ("q_proj", "o_proj", *(("gate_proj", "down_proj") * (name != "experts"))):
            assert any(part in key for key in found.short), part


@pytest.mark.parametrize("name", OPTIMIZED)
def test_an_optimized_model_keeps_what_no_process_shares(computed: Ranks, name: str) -> None:
    for rank in computed:
        found = rank[name, True]
        assert found.loss < 1e-5
        assert found.gradient < 1e-5
        # the norms of two blocks, and the final one
        assert found.rules == {"rms_norm": 5, "linear_cross_entropy": 1}
        assert "tensor parallelism divides the work of its submodule" in found.report


def test_what_stays_whole_is_said() -> None:
    assert left_whole(_llama()) == []
    experts = ["model.layers.*.mlp.experts"]
    assert left_whole(_mixtral()) == left_whole(_lora(_mixtral())) == experts


@pytest.mark.parametrize(
    ("make", "size", "said"),
    [
        (lambda: _llama(), 4, "4 processes cannot share the 2 heads of LlamaForCausalLM (num_key"),
        (lambda: _llama(), 3, "3 processes cannot share the 4 heads of LlamaForCausalLM (num_att"),
        (
            lambda: _llama(intermediate_size=47),
            2,
            "2 processes cannot share the 47 out_features of model.layers.0.mlp.gate_proj: set a",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20)),
            2,
            "transformers has no plan for GPT2LMHeadModel: leave tensor_parallel_size out, and",
        ),
        (
            lambda: FalconMambaForCausalLM(
                FalconMambaConfig(num_hidden_layers=1, hidden_size=16, vocab_size=20)
            ),
            2,
            "transformers has no plan for FalconMambaForCausalLM",
        ),
    ],
)
def test_a_model_that_cannot_be_divided(make: Any, size: int, said: str) -> None:
    require_divisible(_llama(), 2)
    with torch.device("meta"):
        model = make()
    with pytest.raises(RecipeError) as error:
        require_divisible(model, size)
    assert str(error.value).startswith(f"tensor_parallel_size: {said}")
    assert len(str(error.value).splitlines()) == 1


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base, tmp_path_factory.mktemp("runs"))


DIVIDED: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (2, {"tensor_parallel_size": 2}),
    "tensor and fsdp": (4, {"tensor_parallel_size": 2, "fsdp": True}),
}


@slow
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("method", ["LoRA", "full"])
@pytest.mark.parametrize("name", DIVIDED)
def test_divided_layers_train_what_one_process_does(
    runs: Runs, name: str, method: str, optimized: bool
) -> None:
    size, sizes = DIVIDED[name]
    keys = {"optimize": optimized, "codegen": "eager", **(FULL if method == "full" else {})}
    run = runs.several(f"{name}, {method}, {optimized}", size, **keys, **sizes)
    one = runs.alone(size // 2, **keys)
    assert_as_one(run, one)
    assert_said_once(run)
    assert "2 share each layer (tensor parallelism)" in run.out
    assert difference(run.weights(), one.weights()) < 1e-4
    if optimized:
        assert run.json["optimize"]["by_rule"]["linear_cross_entropy"] == 1


@slow
@pytest.mark.parametrize("method", ["LoRA", "full"])
def test_checkpoints_of_divided_layers_are_those_of_one_process(runs: Runs, method: str) -> None:
    keys = {
        "save_steps": 8, "lr_scheduler": "cosine", "weight_decay": 0.1,
        **(FULL if method == "full" else {}),
    }  # fmt: skip
    (_, tensor), (_, both) = DIVIDED.values()
    whole = runs.alone(2, **keys)
    first = runs.several(f"saved, {method}", 4, **keys, **both)
    for made in (first, whole):
        again = {**keys, "resume_from_checkpoint": str(made.folder / "checkpoint-8")}
        for size, sizes, passes in ((1, {}, 2), (2, tensor, 2), (4, both, 1)):
            name = f"{made.folder.name} to {size}, {method}"
            asked = {**again, "gradient_accumulation_steps": passes, **sizes}
            run = runs.alone(2, **again) if size == 1 else runs.several(name, size, **asked)
            assert run.json["resumed_from"] == 8, name
            assert_as_one(run, whole)
            assert difference(run.weights(), whole.weights()) < 1e-4, name
