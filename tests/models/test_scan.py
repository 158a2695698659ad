"""State-space models: scans are captured whole, at any length, and nothing is left behind."""

from __future__ import annotations

import copy
import io
import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.compiler.copies.opaque_calls import opaque_copies
from fusewright.graph.opaque import functions as whole
from tests.explained import explain

from .architectures import build, targets
from .tiny import assert_equal_training_steps, token_ids, training_step

NAMES = ("mamba", "falcon_mamba", "jamba", "zamba", "mamba2", "bamba")
LIMIT = 60.0
"""Seconds for a first step at 512 tokens on a busy machine; unrolled, a scan takes minutes."""
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.long(
    "bamba-lora", "bamba-plain", "jamba-plain", "falcon_mamba-lora", "mamba-lora",
    "mamba2-plain", "falcon_mamba-plain",
)  # fmt: skip
@pytest.mark.long("jamba-lora", "zamba-lora", "zamba-plain")
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_eager(name: str, lora: bool) -> None:
    model = build(name)
    if lora:
        config = LoraConfig(r=4, target_modules=targets(model), lora_dropout=0.0)
        model = get_peft_model(model, config)
    eager = copy.deepcopy(model)
    names = [n for n, _ in model.named_parameters()]
    optimize(model, codegen="eager")
    for length in (24, 37):
        assert_equal_training_steps(model, eager, token_ids(2, length), use_cache=False)
    # training with the default of use_cache
    assert_equal_training_steps(model, eager, token_ids(2, 24))
    report = explain(model)
    assert report.by_rule().get("selective_scan", 0) > 0, str(report)
    assert not [s for s in report.sites if s.rule == "selective_scan" and s.status != "rewritten"]
    assert [n for n, _ in model.named_parameters()] == names


@pytest.mark.long("zamba2", "granitemoehybrid", "bamba", "falcon_h1")
@pytest.mark.parametrize("name", ["bamba", "granitemoehybrid", "falcon_h1", "zamba2"])
def test_a_trainers_keywords_cost_no_scan(name: str) -> None:
    """They reach the scans: the number of items, of which no scan knows anything."""
    model = build(name)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    for length, count in ((24, 46), (37, 11)):
        items = torch.tensor(count)
        assert_equal_training_steps(model, eager, token_ids(2, length), num_items_in_batch=items)
    sites = [s for s in explain(model).sites if s.rule == "selective_scan"]
    assert sites
    assert all(s.status == "rewritten" for s in sites), str(explain(model))


@pytest.mark.long("zamba")
@pytest.mark.long("bamba")
@pytest.mark.parametrize("name", NAMES)
def test_capture_is_independent_of_the_length(name: str) -> None:
    model = optimize(build(name), codegen="eager")
    begun = time.perf_counter()
    training_step(model, token_ids(1, 512), use_cache=False)
    assert time.perf_counter() - begun < LIMIT
    graphs = explain(model).graphs
    for length in (300, 41):
        training_step(model, token_ids(1, length), use_cache=False)
    assert explain(model).graphs == graphs


def _state(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(m.__dict__) for m in model.modules()]


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_restore_is_exact_and_mixers_are_untouched(name: str) -> None:
    model = build(name)
    before = _state(model)
    copies = opaque_copies()
    modules = [m for m in model.modules() if copies.below(m)]
    assert modules
    scans = {m for block in modules for m, _ in copies.below(block)}
    code = {m: type(m).forward for m in scans}
    optimize(model, codegen="eager")
    training_step(model, token_ids(2, 24), use_cache=False)
    assert all("forward" not in m.__dict__ and type(m).forward is code[m] for m in scans)
    model.zero_grad(set_to_none=True)
    restore(model)
    for now, then in zip(_state(model), before, strict=True):
        assert now.keys() == then.keys()
        assert all(now[name] is value for name, value in then.items())


@pytest.mark.long("jamba")
@pytest.mark.parametrize("name", ["mamba", "jamba", "mamba2"])
def test_copies_pickles_and_generation(name: str) -> None:
    model = build(name).eval()
    ids = token_ids(1, 9)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False)
    optimize(model, codegen="eager")
    model.train()
    training_step(model, token_ids(2, 24), use_cache=False)
    copied = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (model, copied, loaded):
        generated = other.eval().generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, plain)
    eager = restore(copy.deepcopy(model))
    assert_equal_training_steps(copied.train(), eager.train(), token_ids(2, 24), use_cache=False)


def test_without_the_rule_the_loop_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEWRIGHT_DISABLE", "selective_scan")
    model = build("mamba")
    eager = copy.deepcopy(model)
    optimize(model, codegen="inductor")  # the blocks run node by node all the same
    assert_equal_training_steps(model, eager, token_ids(2, 24), use_cache=False)
    assert "selective_scan" not in explain(model).by_rule()


def test_bfloat16_is_no_further_from_the_truth_than_eager() -> None:
    model = build("mamba").bfloat16()
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    optimize(model, codegen="eager")
    ids = token_ids(2, 64)
    (_, ours), (_, theirs), (_, truth) = (
        training_step(m, ids, use_cache=False) for m in (model, eager, exact)
    )
    total = [
        sum((g[n].float() - t).norm() / (t.norm() + 1e-6) for n, t in truth.items())
        for g in (ours, theirs)
    ]
    assert total[0] <= 1.2 * total[1]
    assert explain(model).by_rule()["selective_scan"] == 2


def test_only_the_convention_counts() -> None:
    def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
             delta_bias: Any = None, delta_softplus: bool = False) -> None: ...  # fmt: skip

    def chunked(x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, D: Any = None,
                dt_bias: Any = None, dt_softplus: bool = False) -> None: ...  # fmt: skip

    def other(x: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any) -> None: ...

    assert whole.convention(scan) is whole.SELECTIVE
    assert whole.convention(chunked) is whole.CHUNKED
    assert whole.convention(other) is None
    assert whole.leaf(scan) is whole.leaf(scan)
    with pytest.raises(TypeError):
        whole.leaf(other)


def test_a_block_with_a_scan_that_cannot_be_captured_is_split_and_restored() -> None:
    model = build("mamba")
    before = _state(model)
    for block in model.backbone.layers:
        block.mixer = _LooksAtValues(block.mixer)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    assert_equal_training_steps(model, eager, token_ids(2, 24), use_cache=False)
    # the mixers have become regions of their own, and their scans are still captured whole
    assert explain(model).by_rule()["selective_scan"] == 2
    restore(model)
    assert not any(k in m.__dict__ for m in model.modules() for k in _PUT)
    assert len(before) + 2 == len(_state(model))


_PUT = ("forward", "_replicate_for_data_parallel")


class _LooksAtValues(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return self.mixer(x, **more) * (2.0 if float(x.sum()) > 1e9 else 1.0)


def test_a_global_that_changes_is_seen() -> None:
    scope: dict[str, Any] = {"scan": _loop, "SCALE": 1.0}
    exec("def forward(self, x):\n    return scan(x, x, None, None, None) * SCALE", scope)
    copies = opaque_copies()
    first = copies.of(scope["forward"])
    assert copies.of(scope["forward"]) is first
    scope["SCALE"] = 2.0
    again = copies.of(scope["forward"])
    assert again is not first
    assert again.__globals__["SCALE"] == 2.0
    exec("def counts(self, x):\n    global N\n    N = 1\n    return scan(x, x, 0, 0, 0)", scope)
    assert copies.of(scope["counts"]) is None  # in a copy the assignment would be lost


def _loop(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any = None, z: Any = None,
    delta_bias: Any = None, delta_softplus: bool = False,
) -> Any:  # fmt: skip
    return u
