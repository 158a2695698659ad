"""Blocks that are too small to gain keep their original code, by a rule that runs nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fusewright import explain, optimize
from fusewright.compiler.small_blocks import LEAST, why_small
from fusewright.errors import FusewrightError
from fusewright.kernels.processor import KINDS, assume


@pytest.fixture(autouse=True)
def _by_the_rule(monkeypatch: pytest.MonkeyPatch, choose_for: Any) -> None:
    torch._dynamo.reset()
    monkeypatch.delenv("FUSEWRIGHT_SMALL")
    choose_for("avx512_bf16")


def model(hidden: int = 64, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=64, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def step(model: nn.Module, tokens: int) -> Tensor:
    ids = (torch.arange(tokens) % 64).reshape(1, tokens)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def fused(model: nn.Module) -> set[str]:
    return {
        site.module.rpartition(".")[0] for site in explain(model).sites if "layers" in site.module
    }


def test_a_small_call_runs_the_original_code_and_says_why() -> None:
    eager, ours = model(), optimize(model(), codegen="eager")
    torch.testing.assert_close(step(ours, 32), step(eager, 32))
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    report = explain(ours)
    assert not report.sites
    assert "up to 32 tokens x 64 logits" in str(report)
    (reason,) = {b.reason for b in report.small() if "layers" in b.module}
    assert reason == (
        "it is small: up to 32 tokens x 64 features are less than the 98,304 from which the "
        "optimized code is faster in float32"
    )
    assert "too small to gain in some calls" in report.headline()


def test_a_longer_call_of_the_same_block_runs_its_graph() -> None:
    ours = optimize(model(), codegen="eager")
    step(ours, 32)
    step(ours, 1500)
    assert fused(ours)
    assert explain(ours).small()
    step(ours, 32)
    assert fused(ours), "a graph that has run stays in the report"


def test_no_module_is_called_but_by_the_caller() -> None:
    ours, calls = model(), list[str]()
    for name, module in ours.named_modules():
        forward = type(module).forward

        def counting(self: Any, *args: Any, _f: Any = forward, _n: str = name, **kw: Any) -> Any:
            if not torch.compiler.is_compiling():
                calls.append(_n)
            return _f(self, *args, **kw)

        module.__class__ = type(type(module).__name__, (type(module),), {"forward": counting})
    eager = copy.deepcopy(ours)
    step(eager, 32)
    expected = sorted(calls)
    calls.clear()
    optimize(ours, codegen="eager")
    assert calls == []
    step(ours, 32)
    blocks = [n for n in calls if "layers" in n]
    assert sorted(blocks) == [n for n in expected if "layers" in n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_the_limit_is_of_the_dtype(dtype: torch.dtype) -> None:
    least = LEAST[torch.bfloat16 if dtype.itemsize < 4 else torch.float32]
    x = torch.empty(1, 1, 64, dtype=dtype)
    if dtype is torch.float16:  # this processor multiplies it slowly, our code does not
        assert why_small(x, 1) is None
        with assume(KINDS["amx"]):
            assert why_small(x, 1) is not None
        return
    tokens = [n for n in (1 << i for i in range(14)) if why_small(x, n) is None]
    assert tokens[0] == -(-least // 64) or tokens[0] // 2 * 64 < least <= tokens[0] * 64
    assert f"{least:,}" in str(why_small(x, 8))


def test_casts_decide_the_dtype() -> None:
    x = torch.empty(1, 1, 64)
    assert why_small(x, 1024) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert why_small(x, 1024) is None


def test_all_lengths_of_a_bucket_run_the_same_code() -> None:
    x = torch.empty(1, 1, 64)
    assert len({why_small(x, n) for n in range(513, 1025)}) == 1


@pytest.mark.parametrize("how", ["variable", "min", "size"])
def test_where_the_rule_is_not_applied(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for less memory gets it: original code keeps more for backward."""
    if how == "variable":
        monkeypatch.setenv("FUSEWRIGHT_SMALL", "optimize")
    memory = {"variable": "speed", "min": "min", "size": "100GB"}[how]
    ours = optimize(model(), codegen="eager", memory=memory)
    step(ours, 32)
    assert fused(ours)


def test_an_unknown_value_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_SMALL", "no")
    with pytest.raises((ValueError, FusewrightError), match="'no' is neither keep nor optimize"):
        optimize(model())


def test_evaluation_runs_the_same_code() -> None:
    ours = optimize(model(), codegen="eager")
    with torch.no_grad():
        ours(input_ids=torch.arange(32)[None], use_cache=False)
    assert not fused(ours)
