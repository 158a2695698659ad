"""QLoRA: whole models over 4-bit and 8-bit weights train as bitsandbytes and PEFT train them."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor

from fusewright import optimize
from fusewright.compiler.pipeline import planner_of
from tests.explained import explain

from ..kernels.util import saved_tensors
from .quantized import quantize

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
BF16, F32 = torch.bfloat16, torch.float32
SIZES = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16,
}  # fmt: skip


def _model(name: str, dtype: torch.dtype = BF16, **options: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=False)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    return quantize(model, compute=dtype, **options)


def _adapted(model: Any, **options: Any) -> Any:
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options
    )
    return get_peft_model(model, config).train()


def _train(model: Any, steps: int = 4, autocast: bool = False) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        ids = torch.randint(SIZES["vocab_size"], (2, 21), generator=generator)
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _assert_alike(model: Any, rule_counts: int, tolerance: float, **options: Any) -> Any:
    plain = copy.deepcopy(model)
    expected = _train(plain, **options)
    losses = _train(optimize(model), **options)
    assert losses == pytest.approx(expected, rel=tolerance)
    counts = explain(model).by_rule()
    assert counts["quant_linear"] == counts["lora_linear"] == rule_counts
    assert counts.get("qkv_block", 0) == counts.get("mlp_block", 0) == 2
    return explain(model)


@pytest.mark.long("nf4-dtype0-2e-05-Llama")
@pytest.mark.long("int8-dtype1-0.005-Llama")
@pytest.mark.parametrize("name", ["Llama", pytest.param("Qwen3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("nf4", F32, 2e-5), ("int8", BF16, 5e-3),
        pytest.param("nf4", BF16, 5e-3, marks=pytest.mark.slow),
        pytest.param("int8", F32, 2e-5, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_losses_are_those_of_eager(name, kind, dtype, tolerance):
    _assert_alike(_adapted(_model(name, dtype, kind=kind)), 14, tolerance)


@pytest.mark.long("True-True")
@pytest.mark.long("False-False")
@pytest.mark.parametrize(
    ("autocast", "checkpointing"),
    [
        (True, True), (False, False),
        *(pytest.param(a, not a, marks=pytest.mark.slow) for a in (True, False)),
    ],
)  # fmt: skip
def test_a_model_that_was_prepared_for_kbit_training(autocast, checkpointing):
    """Norms, embeddings and the head in fp32, the products in bf16; hooks of checkpointing."""
    model = _model("Llama")
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    model = _adapted(model)
    report = _assert_alike(model, 14, 5e-3, autocast=autocast)
    assert not report.gaps()
    assert report.by_rule()["add_rms_norm"] == 2
    assert model.get_base_model().model.norm.weight.dtype is F32


@pytest.mark.long
def test_weights_that_are_made_anew_before_each_call_get_their_states_back():
    """As FSDP2 does it, which puts a plain parameter into a layer when it gathers one."""
    runs = []
    for optimized in (False, True):
        model = _adapted(_model("Llama", F32, storage=F32))
        layers = [m for m in model.modules() if hasattr(m, "quant_state")]
        assert layers

        def gather(module: Any, *_: Any, layers: list[Any] = layers) -> None:
            for layer in layers:
                plain = layer.weight.detach().as_subclass(Tensor)
                layer.weight = torch.nn.Parameter(plain, requires_grad=False)

        model.register_forward_pre_hook(gather)
        if optimized:
            model = optimize(model, codegen="eager")
        runs.append(_train(model))
    assert runs[1] == pytest.approx(runs[0], rel=2e-5)
    assert explain(model).by_rule()["mlp_block"] == SIZES["num_hidden_layers"]


@pytest.mark.long("eager")
@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_no_copy_of_full_precision_is_left(codegen):
    """Neither kept for backward nor alive between forward and backward."""
    model = optimize(_adapted(_model("Llama")), codegen=codegen)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    size = layer.in_features * layer.out_features
    ids = torch.arange(2 * 10).reshape(2, 10)  # activations of other sizes than weights
    model(input_ids=ids, labels=ids).loss.backward()
    with saved_tensors() as kept:
        loss = model(input_ids=ids, labels=ids).loss
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.is_floating_point()]
    assert not [t for t in (*kept, *alive) if t.numel() == size and set(t.shape) == {64, 192}]
    loss.backward()


@pytest.mark.long
def test_in_tiles_what_is_kept_is_the_input_of_a_block():
    kept = {}
    for level in ("all", "tiles"):
        model = optimize(_adapted(_model("Llama")), codegen="eager", memory="100GB")
        planner = planner_of(model)
        assert planner is not None
        planner.allowed = (level,)
        ids = torch.randint(SIZES["vocab_size"], (2, 30))
        model(input_ids=ids, labels=ids).loss.backward()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with saved_tensors() as found:
            model(input_ids=ids, labels=ids).loss.backward()
        places = {t.untyped_storage().data_ptr(): t for t in found}
        own = [t for place, t in places.items() if place not in weights]
        kept[level] = [t for t in own if t.is_floating_point()]
    wide, inputs = SIZES["intermediate_size"], 2 * 30 * SIZES["hidden_size"]
    assert [t for t in kept["all"] if t.shape[-1:] == (wide,)]
    assert not [t for t in kept["tiles"] if t.shape[-1:] == (wide,)]
    # beside them the last norm's input, and, as in eager, the rows of the head, of which somebody
    # may use the logits; of the rows the gradient, too, which is computed with the loss
    layers = SIZES["num_hidden_layers"]
    assert sum(t.numel() == inputs for t in kept["tiles"]) == layers + 3
    assert sum(t.nbytes for t in kept["tiles"]) < sum(t.nbytes for t in kept["all"]) / 3


def test_a_model_without_adapters_gives_the_gradient_of_its_input():
    model = _model("Llama").train()
    ids = torch.arange(2 * 9).reshape(2, 9)

    def gradient() -> Tensor:
        embeds = model.model.embed_tokens(ids).detach().requires_grad_()
        loss = model(inputs_embeds=embeds, labels=ids).loss
        return torch.autograd.grad(loss, embeds)[0]

    expected = gradient()
    optimize(model)
    assert (gradient() - expected).norm() < 0.02 * expected.norm()
    assert explain(model).by_rule()["quant_linear"] == 14


@pytest.mark.long
def test_equal_layers_share_one_graph_and_nothing_is_captured_again():
    model = optimize(_adapted(_model("Llama")))
    _train(model, steps=2)
    before = explain(model).graphs
    _train(model, steps=3)
    assert explain(model).graphs == before == 4  # two kinds of block, the norm, the head
