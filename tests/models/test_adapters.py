"""Which adapters are fused, and that each trains as it does in eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fusewright import optimize
from tests.explained import explain

from .adapters import PAGE, TABLE, Adapter, build, line, optimized, step
from .setups import in_double
from .test_setups import over

QUICK = {"two LoRAs, a dropout each", "VeRA", "HiRA", "IA3"}
"""What the default run and long ones try: other inputs, vectors, a matrix, and nothing fused."""

LINES = PAGE.read_text().splitlines()
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def _assert_as_in_eager(ours: Any, adapter: Adapter) -> None:
    def run(model: Any, draw: int, lowered: bool) -> dict[str, Tensor]:
        return step(model, adapter, draw)

    eager = build(adapter)
    if not adapter.random:
        assert not over(run, ours, eager, in_double(build(adapter)), draws=6, pooled=True)
        return
    run(eager, 0, True)  # as ours has: some count their steps
    mine, theirs = run(ours, 0, True), run(eager, 0, True)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (mine[key] - value).norm() <= 1e-5 * value.norm() + 1e-7, key


@pytest.mark.long("two LoRAs, a dropout each", "VeRA", "HiRA")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in TABLE]
)
def test_what_is_fused_and_how_exact_it_is(name: str) -> None:
    adapter = TABLE[name]
    if adapter.needs:
        pytest.importorskip(adapter.needs)
    if adapter.quantized:
        pytest.importorskip("bitsandbytes")
    ours, report = optimized(adapter)
    assert line(name, report) in LINES
    _assert_as_in_eager(ours, adapter)


def test_the_page_has_every_type_of_peft_and_no_other_lines() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    rows = [row for row in LINES if row.startswith("| ") and not row.startswith("| adapter")]
    assert len(rows) == len(TABLE)
    assert {a.kind for a in TABLE.values()} == {t.name for t in PEFT_TYPE_TO_CONFIG_MAPPING}


def test_adapters_of_the_head_with_a_dropout_each_are_left_with_the_reason() -> None:
    config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 61,
              "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    torch.manual_seed(0)
    eager: Any = get_peft_model(
        LlamaForCausalLM(LlamaConfig(**config)),
        LoraConfig(r=4, target_modules=["lm_head"], lora_dropout=0.3, init_lora_weights=False),
    )
    second = LoraConfig(r=3, target_modules=["lm_head"], lora_dropout=0.2, init_lora_weights=False)
    eager.add_adapter("second", second)
    eager.base_model.set_adapter(["default", "second"])
    ours = optimize(copy.deepcopy(eager.train()), codegen="eager")
    ids, grads = torch.randint(0, 61, (2, 9)), []
    for model in (ours, eager):
        torch.manual_seed(1)
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    reasons = [s.reason for s in explain(ours).gaps() if s.rule == "linear_cross_entropy"]
    assert reasons == ["several adapters of the head have an input of their own"]
