"""Linear attention by the delta rule: captured whole, at any length, with eager's results."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from fusewright import optimize
from fusewright.graph.opaque import functions as whole
from fusewright.graph.opaque.hub_kernels import behind
from tests.explained import explain

from ..versions import transformers_before
from .architectures import build
from .tiny import assert_equal_training_steps, token_ids

NAMES = ("qwen3_next", "kimi_linear", "bailing_hybrid", "olmo_hybrid")
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def _functions_of_tests_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of libraries."""
    monkeypatch.setattr(whole, "LIBRARIES", (*whole.LIBRARIES, "tests"))


def _built(name: str) -> nn.Module:
    if name not in CONFIG_MAPPING and transformers_before("5.24"):
        pytest.skip("this version of transformers has no such model")
    return build(name)


def _functions(model: nn.Module) -> list[Any]:
    """What follows the convention in the module that the model is from."""
    return [
        f for f in map(behind, vars(sys.modules[type(model).__module__]).values())
        if callable(f) and not isinstance(f, type) and whole.convention(f) is whole.DELTA
    ]  # fmt: skip


# what runs the blocks does not depend on the model
@pytest.mark.long("bailing_hybrid-eager", "kimi_linear-eager", "kimi_linear-inductor")
@pytest.mark.parametrize(
    ("name", "codegen"), [*((name, "eager") for name in NAMES), ("kimi_linear", "inductor")]
)
def test_steps_of_any_length_equal_eager(name: str, codegen: str) -> None:
    model = _built(name)
    eager = copy.deepcopy(model)
    optimize(model, codegen=codegen)
    captured = set()
    for length in (24, 70, 131):  # one, two and three chunks
        assert_equal_training_steps(model, eager, token_ids(2, length, length), use_cache=False)
        captured.add(explain(model).graphs)
    assert RULES[name] in explain(model).by_rule(), str(explain(model))
    assert len(captured) <= 2  # lengths are dynamic from the second one on at the latest


RULES = dict.fromkeys(NAMES, "gated_delta_rule") | {"kimi_linear": "kda", "bailing_hybrid": "kda"}


@pytest.mark.long("qwen3_5_text")
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_twenty_steps_of_training_are_eagers(name: str) -> None:
    model = _built(name)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    losses: list[list[float]] = []
    for each in (model, eager):
        optimizer, batch = torch.optim.AdamW(each.parameters(), lr=1e-3), token_ids(2, 70, 0)
        losses.append([])
        for _ in range(20):
            loss = each(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)
    report = explain(model)
    assert report.by_rule()["gated_delta_rule"] >= 1, str(report)


@pytest.mark.parametrize("time", [5, 65, 128])  # parts of chunks, and whole ones
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_outline_is_that_of_the_results(name: str, dtype: torch.dtype, time: int) -> None:
    functions = _functions(_built(name))
    assert functions
    for function in functions:
        for final in (False, True):
            q, k, v = (torch.randn(2, time, 3, n, dtype=dtype) for n in (4, 4, 6))
            per_feature = "kimi" in function.__name__
            g = -torch.rand((2, time, 3, 4) if per_feature else (2, time, 3))
            given = {
                "g": g, "beta": torch.rand(2, time, 3), "initial_state": None,
                "output_final_state": final,
            }  # fmt: skip
            made = whole.leaf(function)(q, k, v, **given)
            outline = whole._outline_of_delta({"query": q, "key": k, "value": v, **given})
            for real, fake in zip(made, outline, strict=True):
                assert (real is None) == (fake is None)
                if real is not None:
                    assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
                    assert real.stride() == fake.stride()


def _rule(
    query: Any, key: Any, value: Any, g: Any, beta: Any, chunk_size: int = 64,
    initial_state: Any = None, output_final_state: bool = False,
) -> Any:  # fmt: skip
    """The delta rule by its shapes alone."""
    state = key.transpose(1, 2).mT[..., :1].float() * value.new_ones(value.shape[3])
    return value.to(query.dtype) * g[..., None], state if output_final_state else None


def _state_turned(query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
                  output_final_state: bool = False) -> Any:  # fmt: skip
    out, state = _rule(query, key, value, g, beta, 64, initial_state, output_final_state)
    return out, None if state is None else state.mT


def _writes(query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
            output_final_state: bool = False) -> Any:  # fmt: skip
    if initial_state is not None:
        initial_state.mul_(0.5)
    return _rule(query, key, value, g, beta, 64, initial_state, output_final_state)


def _one_result(query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any = None,
                output_final_state: bool = False) -> Any:  # fmt: skip
    return _rule(query, key, value, g, beta)[0]


def _another_order(query: Any, key: Any, value: Any, beta: Any, g: Any, initial_state: Any = None,
                   output_final_state: bool = False) -> Any:  # fmt: skip
    return _rule(query, key, value, g, beta, 64, initial_state, output_final_state)


def _without_state(query: Any, key: Any, value: Any, g: Any, beta: Any, n: Any) -> Any:
    return _rule(query, key, value, g, beta)


def test_only_what_keeps_to_the_convention_counts() -> None:
    assert whole.convention(_rule) is whole.DELTA
    others = _state_turned, _writes, _one_result, _another_order, _without_state
    assert [whole.convention(f) for f in others] == [None] * len(others)
