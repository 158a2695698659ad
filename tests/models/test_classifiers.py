"""Models that classify texts or tokens: optimized, their losses and gradients are eager's."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.kernels.tolerance import FACTOR, errors, unit
from tests.explained import explain

from .test_models import _InDouble, _rms

SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
_LLAMA = {"rms_norm": 5, "rope": 2, "glu": 2, "mlp_block": 2, "add_rms_norm": 2}
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
    "llama": (tf.LlamaConfig, {}, _LLAMA),
    "mistral": (tf.MistralConfig, {"sliding_window": 8}, _LLAMA),
    "qwen3": (tf.Qwen3Config, {"head_dim": 16}, {**_LLAMA, "rms_norm": 9}),
    "gemma": (tf.GemmaConfig, {"head_dim": 16}, _LLAMA),
    "gpt2": (
        tf.GPT2Config, {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
        {"layer_norm": 5},
    ),
    "gpt_neox": (tf.GPTNeoXConfig, {}, {"layer_norm": 5, "rope": 2}),
}  # fmt: skip
"""Configuration, features, and the sites that must be rewritten in the body."""

DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
LENGTHS = ((7, 12), (12, 3), (20, 9, 1, 20))
_FIRST = ("llama", "gpt2")
CASES = [
    pytest.param(name, labels, lora, marks=[] if name in _FIRST and lora else [pytest.mark.slow])
    for name in ARCHITECTURES for labels in (1, 2) for lora in (False, True)
    if lora or name in _FIRST
]  # fmt: skip
"""One label: a text's score; two: the classes of a token."""
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def make(name: str, labels: int, lora: bool, tokens: bool | None = None, **given: Any) -> Any:
    kind, features, _ = ARCHITECTURES[name]
    tokens = labels == 2 if tokens is None else tokens
    dropouts = dict.fromkeys((*DROPOUTS, "hidden_dropout", "classifier_dropout"), 0.0)
    auto: Any = tf.AutoModelForTokenClassification
    if not tokens:
        auto = tf.AutoModelForSequenceClassification
    torch.manual_seed(0)
    config = kind(**{**SIZES, **features, **dropouts, **given}, num_labels=labels)
    model = auto.from_config(config).train()
    if not lora:
        return model
    linear = {n.rpartition(".")[2] for n, m in model.named_modules()
              if isinstance(m, (nn.Linear, tf.pytorch_utils.Conv1D)) and "." in n}  # fmt: skip
    adapted = get_peft_model(model, LoraConfig(
        r=4, lora_alpha=8, task_type="TOKEN_CLS" if tokens else "SEQ_CLS",
        target_modules=sorted(linear), fan_in_fan_out=name == "gpt2",
    ))  # fmt: skip
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            nn.init.normal_(parameter, std=0.1)
    return adapted


def batch(lengths: tuple[int, ...], labels: int, seed: int, left: bool = False) -> dict[str, Any]:
    """Texts of these lengths, padded; a label for each, or for each token."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (len(lengths), max(lengths)), generator=drawn)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = ids * mask
    given: Tensor = torch.randn(len(lengths), generator=drawn)
    if labels > 1:
        given = torch.randint(labels, ids.shape, generator=drawn).masked_fill(mask == 0, -100)
    if left:
        ids, mask = ids.flip(1), mask.flip(1)
        given = given.flip(1) if labels > 1 else given
    return {"input_ids": ids, "attention_mask": mask, "labels": given}


def batches(labels: int, loss_of: Any) -> list[tuple[dict[str, Any], Any]]:
    """Texts of several lengths, padded on either side."""
    return [(batch(lengths, labels, seed, left), loss_of)
            for seed, lengths in enumerate(LENGTHS) for left in (False, True)]  # fmt: skip


def own_loss(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The loss of the model itself."""
    loss: Tensor = model(**given).loss
    return loss


def ranked(model: nn.Module, given: dict[str, Any]) -> Tensor:
    """The loss of TRL's reward trainer: the first text is better than each of the others."""
    rewards = model(**{k: v for k, v in given.items() if k != "labels"}).logits.squeeze(-1)
    return -F.logsigmoid(rewards[:1] - rewards[1:]).mean()


def step(model: nn.Module, given: dict[str, Any], loss_of: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = loss_of(model, given)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def require_equal(models: Sequence[Any], steps: Iterable[tuple[dict[str, Any], Any]]) -> None:
    """Hold loss and gradients to the budget: the error of each, over several batches.

    Args:
        models: optimized, in eager mode, and that in fp64.
        steps: batches, each with what makes the loss.
    """
    ours, eager = defaultdict(list), defaultdict(list)
    for given, loss_of in steps:
        mine, theirs = (step(model, given, loss_of) for model in models[:2])
        wide = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        with _InDouble():
            exact = step(models[2], wide, loss_of)
        assert mine.keys() == theirs.keys() == exact.keys()
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype
            ours[name].append(errors(value, exact[name]).rms)
            eager[name].append(errors(theirs[name], exact[name]).rms)
    for name in ours:
        found, budget = _rms(ours[name]), FACTOR * _rms(eager[name]) + unit(torch.float32)
        assert found <= budget, f"{name}: {found:.2e}, budget {budget:.2e}"


@pytest.mark.long("gpt2-1-True", "llama-1-True", "llama-2-True")
@pytest.mark.parametrize(("name", "labels", "lora"), CASES)
def test_loss_and_gradients_are_those_of_eager(name: str, labels: int, lora: bool) -> None:
    model = make(name, labels, lora)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    models = optimize(model, codegen="eager"), eager, exact
    require_equal(models, batches(labels, own_loss))
    if labels == 1:
        require_equal(models, batches(labels, ranked))
    report = explain(model)
    expected = ARCHITECTURES[name][2]
    assert {rule: report.by_rule().get(rule) for rule in expected} == expected
    assert report.by_rule().get("linear_cross_entropy", 0) == (labels == 2)
    assert bool(report.by_rule().get("lora_linear")) == lora
    assert report.gaps() == ()
    plain = restore(model)
    last = batch(LENGTHS[0], labels, 0)
    assert torch.equal(own_loss(plain, last), own_loss(eager, last))


@pytest.mark.long("checkpoints-1", "dropout-1", "logits-1", "memory-1")
@pytest.mark.parametrize("labels", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how",
    [{"memory": "min"}, {"logits": "always"}, {"checkpointed": True},
     {"classifier_dropout": 0.3, "attention_dropout": 0.1}],
    ids=["memory", "logits", "checkpoints", "dropout"],
)  # fmt: skip
def test_ways_to_train(how: dict[str, Any], labels: int) -> None:
    options = {k: v for k, v in how.items() if k in ("memory", "logits")}
    dropouts = {k: v for k, v in how.items() if "dropout" in k}
    model = make("llama", labels, lora=True, **dropouts)
    exact = copy.deepcopy(model).double()
    if "checkpointed" in how:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    eager = copy.deepcopy(model)
    models = optimize(model, codegen="eager", **options), eager, exact
    require_equal(models, batches(labels, own_loss))


@pytest.mark.long("any of three", "one of three")
@pytest.mark.parametrize("several", [False, True], ids=["one of three", "any of three"])
def test_the_kind_of_labels_is_noted_as_eager_does(several: bool) -> None:
    model = make("qwen3", 3, lora=False, tokens=False)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    report = explain(optimize(model, codegen="eager"))
    assert model.config.problem_type is None
    assert report.by_rule()["rms_norm"] == 9
    given = batch((7, 12), 1, 0)
    given["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 1]]) if several else torch.tensor([2, 0])
    require_equal((model, eager, exact), [(given, own_loss)])
    assert model.config.problem_type == eager.config.problem_type is not None


@pytest.mark.long("2-True")
@pytest.mark.parametrize(("labels", "lora"), [(1, False), (1, True), (2, True)])
def test_explain_runs_a_step_of_its_own(labels: int, lora: bool) -> None:
    model = optimize(make("llama", labels, lora), codegen="eager")
    report = explain(model)
    assert report.by_rule()["mlp_block"] == 2
    assert not any("failed" in b.reason or "no call" in b.reason for b in report.bypasses)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.long("1")
@pytest.mark.long("2")
@pytest.mark.parametrize("labels", [1, 2])
def test_evaluation_gives_the_scores_of_eager(labels: int) -> None:
    model = make("gemma", labels, lora=True)
    eager = copy.deepcopy(model)
    optimize(model, codegen="eager")
    given = batch((9, 4), labels, 0)
    require = torch.testing.assert_close
    require(own_loss(model, given), own_loss(eager, given))
    for mode in (model, eager):
        mode.eval()
    with torch.no_grad():
        require(model(**given).logits, eager(**given).logits, rtol=1e-4, atol=1e-6)
