"""Quantized linears: recognised in every form, fused with adapters, and left alone with reasons."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.passes import PIPELINE
from fusewright.passes.quant_linear import QuantLinear
from fusewright.rewrite.findings import Finding
from tests.explained import explain

from ..capturing import capture, rewrite, rewritten
from ..models.quantized import quantize

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
BF16, F32 = torch.bfloat16, torch.float32
IDS = torch.arange(2 * 9).reshape(2, 9)


class Layer(nn.Module):
    """One quantized projection; what is done with it is the test's."""

    def __init__(self, kind: str = "nf4", dtype: torch.dtype = BF16, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj: Any = nn.Linear(128, 64).to(dtype)
        quantize(self, kind, compute=None if kind == "int8" else dtype, **options)

    def forward(self, x: Tensor) -> Any:
        return self.proj(x)


def _findings(module: nn.Module, x: Tensor, rules: Any = PIPELINE) -> list[Finding]:
    module(x)  # bitsandbytes arranges its state in the first call
    graph = capture(module, x)
    findings = rewrite(graph, rules)
    return findings


def _x(dtype: torch.dtype = BF16, grad: bool = True) -> Tensor:
    return torch.randn(2, 5, 128).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("nf4", {}),
        ("nf4", {"nested": False}),
        ("fp4", {}),
        ("nf4", {"storage": BF16}),
        ("nf4", {"storage": F32}),
        ("int8", {}),
    ],
    ids=str,
)
def test_every_kind_is_one_op(kind, options, dtype, grad):
    module = Layer(kind, dtype, **options)
    assert rewritten(_findings(module, _x(dtype, grad))) == ["quant_linear"]


def test_the_op_gives_what_the_layer_gave():
    module, x = Layer(), _x()
    expected = module(x)
    upstream = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(expected, x, upstream)
    graph = capture(module, x)
    assert rewritten(rewrite(graph)) == ["quant_linear"]
    assert not [n for n in graph.graph.nodes if "autograd_function" in n.name]
    state = module.proj.weight.quant_state
    values = {
        "weight": module.proj.weight, "bias": module.proj.bias, "state2_absmax":
        state.state2.absmax, "state_absmax": state.absmax, "code": state.state2.code,
        "offset": state.offset, "x": x,
    }  # fmt: skip
    # the state comes in; it is no constant of the graph
    names = [n.name for n in graph.graph.find_nodes(op="placeholder")]
    given = [next(v for k, v in values.items() if n.endswith((f"_{k}", f"_{k}_"))) if not
             n.startswith("s") else 0 for n in names]  # fmt: skip
    (made,) = graph(*given)
    assert torch.equal(made, expected)
    assert torch.equal(torch.autograd.grad(made, x, upstream)[0], grad)


def test_a_result_in_another_dtype_than_the_computation():
    class Wide(Layer):
        def forward(self, x: Tensor) -> Any:
            return self.proj(x).tanh()

    module = Wide()
    x = _x(F32)
    assert rewritten(_findings(module, x)) == ["quant_linear"]


def test_without_fuel_the_layer_stays():
    module, x = Layer(), _x()
    graph = capture(module, x)
    findings = rewrite(graph, [QuantLinear()], fuel=0)
    assert {f.status for f in findings} == {"refused"}
    assert [n for n in graph.graph.nodes if "autograd_function" in n.name]


def test_a_trained_bias_and_a_frozen_one():
    for wanted in (True, False):
        module = Layer()
        module.proj.bias.requires_grad_(wanted)
        assert rewritten(_findings(module, _x())) == ["quant_linear"]


def test_autocast_to_another_dtype_is_refused():
    module, x = Layer(dtype=F32), _x(F32)
    with torch.autocast("cpu", BF16):
        findings = _findings(module, x)
    assert [(f.rule, f.status) for f in findings] == [("quant_linear", "refused")]
    assert "autocast" in findings[0].reason


def test_int8_that_quantizes_its_input_is_reported():
    module = Layer("int8", torch.float16)
    module.proj.state.threshold = 0.0
    module.eval()
    findings = _findings(module, _x(torch.float16, grad=False))
    assert [(f.rule, f.status) for f in findings] == [("quant_linear", "missed")]
    assert "quantizes the input too" in findings[0].reason


def test_a_weight_that_was_packed_for_inference_is_reported():
    module = Layer()
    if not module.proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no avx512_bf16, for which alone bitsandbytes packs weights")
    module.eval()
    findings = _findings(module, _x(grad=False))
    assert [(f.rule, f.status) for f in findings] == [("quant_linear", "missed")]
    assert "repacked" in findings[0].reason


def _llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128,
    )  # fmt: skip
    return quantize(LlamaForCausalLM(config).to(BF16), **options)


def _with_lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).train()


@pytest.mark.long("nf4-0.0")
@pytest.mark.long("int8-0.1")
@pytest.mark.parametrize(
    ("kind", "dropout"),
    [
        ("nf4", 0.0), ("int8", 0.1),
        *(pytest.param(*case, marks=pytest.mark.slow)
          for case in (("nf4", 0.1), ("int8", 0.0), ("fp4", 0.0), ("fp4", 0.1))),
    ],
)  # fmt: skip
def test_all_layers_of_a_llama_with_adapters(kind, dropout):
    model = _with_lora(_llama(kind=kind), lora_dropout=dropout)
    model(input_ids=IDS, labels=IDS)
    report = explain(optimize(model))
    counts = report.by_rule()
    assert counts["quant_linear"] == counts["lora_linear"] == 3 * 7
    assert not [s for s in report.gaps() if s.rule in ("quant_linear", "lora_linear")]
    where = Counter(s.module.split(".")[-1] for s in report.sites if s.rule == "lora_linear")
    assert set(where.values()) == {3}
    # one graph for the first block, whose input needs no gradient, one for the others
    assert report.graphs == 4


@pytest.mark.long
def test_adapters_on_some_layers_only():
    model = _with_lora(_llama(), target_modules=["q_proj", "v_proj"])
    report = explain(optimize(model))
    assert report.by_rule()["quant_linear"] == 3 * 7
    assert report.by_rule()["lora_linear"] == 3 * 2
    assert not report.gaps()


@pytest.mark.long
def test_two_active_adapters_are_joined():
    from peft import LoraConfig

    model = _with_lora(_llama(), target_modules=["q_proj"])
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    report = explain(optimize(model))
    assert report.by_rule()["quant_linear"] == 3 * 7
    assert report.by_rule()["lora_linear"] == 3
    assert not report.gaps()


@pytest.mark.long
def test_weights_states_and_checkpoints_stay_what_they_were():
    model = _with_lora(_llama())
    before = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    names = list(model.state_dict())
    explain(optimize(model))
    assert list(model.state_dict()) == names
    for name, p in model.named_parameters():
        assert (p, p.data_ptr()) == before[name]
        assert ".base_layer." not in name or type(p).__name__ == "Params4bit"
    restore(model)
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
