"""Models whose code comes with their checkpoint: rewritten as the built-in ones are.

``remote/weaver`` has Llama's formulas under names of its own, ``remote/oddity`` does everything in
another way. Both are loaded as such models are, from a folder that brings its code.
"""

from __future__ import annotations

import copy
import importlib
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fusewright import optimize, restore
from tests.explained import explain

from .tiny import token_ids
from .zoo import FAMILIES

FOLDER = pathlib.Path(__file__).parent / "remote"
LLAMA = FAMILIES[0]
_ODD = {"rms_norm": 3, "rope": 2, "glu": 2, "linear_cross_entropy": 1}
COUNTS: dict[tuple[str, bool], dict[str, int]] = {
    ("weaver", False): LLAMA.plain,
    ("weaver", True): LLAMA.lora,
    # both parts read one norm, so that none follows a residual add
    ("oddity", False): {**_ODD, "rms_norm_linear": 2},
    ("oddity", True): {**_ODD, "lora_linear": 8, "mlp_block": 2},
}
TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True, scope="module")
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Transformers copies remote code into a folder of modules: one that goes with these tests."""
    dynamic: Any = importlib.import_module("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        _forget_remote_modules()
        yield
        _forget_remote_modules()


def _forget_remote_modules() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def _build(name: str, lora: bool, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(FOLDER / name, trust_remote_code=True, **changes)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1 and "bias" not in parameter_name:  # norms that start as ones
            nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
    if not lora:
        return model
    linears = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = sorted(linears - {"to_words"})
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def _step(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    labels = ids.clone()
    labels[:, :3] = -100
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _assert_equal_steps(ours: nn.Module, eager: nn.Module, ids: Tensor) -> None:
    (loss, grads), (eager_loss, eager_grads) = _step(ours, ids), _step(eager, ids)
    assert float((loss - eager_loss).abs() / eager_loss.abs()) <= TOLERANCE
    assert grads.keys() == eager_grads.keys()
    for name, theirs in eager_grads.items():
        difference = (grads[name] - theirs).norm() / theirs.norm()
        assert float(difference) <= TOLERANCE, name


@pytest.mark.long("oddity-lora", "oddity-plain", "weaver-plain")
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", ["weaver", "oddity"])
def test_remote_code_is_rewritten_and_trains_as_in_eager(name: str, lora: bool) -> None:
    eager = _build(name, lora)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    report = explain(ours)
    assert report.by_rule() == COUNTS[name, lora], str(report)
    assert not report.gaps(), str(report)
    assert {b.reason.split(":")[0] for b in report.bypasses} <= {"attention"}, str(report)
    _assert_equal_steps(ours, eager, token_ids(2, 13))
    graphs = explain(ours).graphs
    _assert_equal_steps(ours, eager, token_ids(3, 24, seed=1))
    assert explain(ours).graphs == graphs, "another shape was captured anew"


@pytest.mark.long("oddity-lora", "weaver-plain")
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", ["weaver", "oddity"])
def test_restore_is_exact(name: str, lora: bool) -> None:
    eager = _build(name, lora)
    ours = copy.deepcopy(eager)
    before = [dict(vars(m)) for m in ours.modules()]
    _step(optimize(ours, codegen="eager"), token_ids(2, 13))
    assert restore(ours) is ours
    ours.zero_grad()
    for module, attributes in zip(ours.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[k] is v for k, v in attributes.items() if k[0] != "_")
    (loss, grads), (eager_loss, eager_grads) = (_step(m, token_ids(2, 13)) for m in (ours, eager))
    assert torch.equal(loss, eager_loss)
    assert all(torch.equal(grads[n], g) for n, g in eager_grads.items())


@pytest.mark.long("oddity")
@pytest.mark.parametrize("name", ["weaver", "oddity"])
def test_saved_and_loaded_again(name: str, tmp_path: pathlib.Path) -> None:
    """The folder that comes out brings the code along, and optimized weights are the weights."""
    ours = optimize(_build(name, False), codegen="eager")
    with torch.no_grad():
        for p in ours.parameters():
            p.mul_(1.5)
    loss, _ = _step(ours, token_ids(2, 13))
    saved = tmp_path / "saved"
    ours.save_pretrained(saved)
    for file in (FOLDER / name).glob("*.py"):
        shutil.copy(file, saved)
    again = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True)
    mine, theirs = ours.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    _assert_equal_steps(optimize(again.train(), codegen="eager"), restore(ours), token_ids(2, 13))
    torch.testing.assert_close(_step(again, token_ids(2, 13))[0], loss)


@pytest.mark.long("oddity", "weaver")
@pytest.mark.parametrize("name", ["weaver", "oddity"])
def test_an_adapter_saved_and_loaded_again(name: str, tmp_path: pathlib.Path) -> None:
    ours = optimize(_build(name, True), codegen="eager")
    _step(ours, token_ids(2, 13))
    ours.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(_build(name, False), tmp_path / "adapter", is_trainable=True)
    _assert_equal_steps(optimize(again.train(), codegen="eager"), restore(ours), token_ids(2, 13))


def test_logits_under_another_name_and_in_a_tuple() -> None:
    eager = _build("oddity", False)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    ids = token_ids(2, 13)
    named, theirs = ours(ids, labels=ids), eager(ids, labels=ids)
    assert type(named).__name__ == "OddityOutput"
    torch.testing.assert_close(named.scores + 0, theirs.scores)
    loss, scores, memory = ours(ids, labels=ids, as_tuple=True)
    torch.testing.assert_close(loss, theirs.loss)
    torch.testing.assert_close(scores + 0, theirs.scores)
    assert memory is None
    torch.testing.assert_close(ours(ids).scores, theirs.scores)


def test_a_cache_of_its_own_passes_by() -> None:
    eager = _build("oddity", False).eval()
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    kept = type(eager).forward.__globals__["Memory"]
    ids, steps = token_ids(2, 6), []
    with torch.no_grad():
        for model in (ours, eager):
            memory = kept()
            scores = [model(ids, memory=memory).scores[:, -1]]
            for _ in range(4):
                token = scores[-1].argmax(-1, keepdim=True)
                scores.append(model(token, memory=memory).scores[:, -1])
            steps.append(torch.stack(scores))
    torch.testing.assert_close(*steps)
    assert any("a Memory was passed" in b.reason for b in explain(ours).bypasses)


def test_a_wrong_argument_is_the_callers_error_and_costs_nothing() -> None:
    ours = optimize(_build("weaver", False), codegen="eager")
    ids = token_ids(2, 13)
    with pytest.raises(TypeError, match="use_cache"):
        ours(ids, labels=ids, use_cache=False)
    ours(ids, labels=ids).loss.backward()
    assert explain(ours).by_rule() == COUNTS["weaver", False]
