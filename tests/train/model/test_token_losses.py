"""Losses that weigh tokens: their values, their tiles, and packs, accumulation and processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM

from fusewright import optimize
from fusewright.errors import RecipeError
from fusewright.train import train
from fusewright.train.data import IGNORED
from fusewright.train.model import token_losses
from fusewright.train.model.token_losses import TokenLoss, by_entropy, by_probability, weigher
from fusewright.train.recipe.load import load_recipe
from tests.models.zoo import FAMILIES, build

from ..conftest import make_model

BASE = {"base_model": "a/b", "datasets": [{"path": "a/b"}], "sequence_len": 64}


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """The definition, without tiles: each token's ``-p * log p``, the first ``p`` a constant."""
    logs = torch.log_softmax(logits.double(), -1).gather(-1, labels[:, None])[:, 0]
    return -(logs.exp().detach() * logs).sum()


def eaft(logits: Tensor, labels: Tensor, alpha: float = 1.0, k: int = 20) -> Tensor:
    """The cross entropy times the entropy of the ``k`` largest logits."""
    with torch.no_grad():
        p = torch.softmax(logits.double().topk(k, -1).values, -1)
        entropy = -((p * torch.log(p + 1e-10)).sum(-1) ** 1)
    return (F.cross_entropy(logits.double(), labels, reduction="none") * entropy**alpha).sum()


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "dft": ({"use_dft": True}, dft),
    "eaft": ({"use_eaft": True}, eaft),
    "eaft of few": (
        {"use_eaft": True, "eaft_alpha": 0.5, "eaft_k": 4}, lambda x, y: eaft(x, y, 0.5, 4),
    ),
}  # fmt: skip


def batch(vocabulary: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, vocabulary, (3, 20))
    labels = torch.where(torch.rand(ids.shape) < 0.5, ids, IGNORED)
    return {"input_ids": ids, "labels": labels}


def plain(model: Any, given: dict[str, Tensor], loss: Any, number: float) -> Tensor:
    """The loss by its definition, from whole logits."""
    logits = model(input_ids=given["input_ids"]).logits[:, :-1]
    labels = given["labels"][:, 1:]
    chosen = labels != IGNORED
    found: Tensor = loss(logits[chosen], labels[chosen]) / number
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients(
    name: str, family: str, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads with a scale and a softcap, in seven tiles; rows have another number of tokens."""
    keys, definition = LOSSES[name]
    recipe = load_recipe({**BASE, **keys})
    model: Any = build(next(f for f in FAMILIES if f.name == family), lora=False).float()
    vocabulary = model.config.vocab_size
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head"]))
    model.train()
    given = batch(vocabulary)
    monkeypatch.setattr(token_losses, "_TILE", 64 * vocabulary // 7 + 1)
    sizes: list[int] = []
    head = model.get_output_embeddings()

    def note(module: Any, args: Any, out: Tensor) -> None:
        if type(out) is Tensor:  # not what stands for all of them
            sizes.append(out.shape[-2])

    handle = head.register_forward_hook(note)
    weigh = weigher(recipe)
    assert weigh is not None
    with TokenLoss(recipe, weigh).on(model):
        ours = model(**given, num_items_in_batch=torch.tensor(31)).loss
    ours.backward()
    handle.remove()
    assert max(sizes) <= -(-int((given["labels"][:, 1:] != IGNORED).sum()) // 7)
    mine = gradients(model)
    theirs = plain(model, given, definition, 31)
    theirs.backward()
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    expected = gradients(model)
    assert mine.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-6, msg=key)
    assert "forward" not in vars(head)
    assert not hasattr(model, "_loss_function")


def test_token_scaling_of_liger_is_dft() -> None:
    recipe = load_recipe({**BASE, "liger_use_token_scaling": True})
    assert weigher(recipe) is by_probability
    assert weigher(load_recipe({**BASE, "liger_use_token_scaling": False})) is None


def test_an_optimized_model_has_the_same_loss() -> None:
    recipe = load_recipe({**BASE, "use_dft": True})
    given = batch(262)
    weigh = weigher(recipe)
    assert weigh is not None
    losses = []
    for change in (lambda m: m, lambda m: optimize(m, codegen="eager")):
        model = change(make_model())
        model.train()
        with TokenLoss(recipe, weigh).on(model):
            loss = model(**given).loss
        loss.backward()
        losses.append((float(loss), gradients(model)))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    for key, value in losses[0][1].items():
        torch.testing.assert_close(losses[1][1][key], value, rtol=1e-3, atol=1e-6, msg=key)


def test_a_model_that_computes_its_own_loss_is_refused() -> None:
    recipe = load_recipe({**BASE, "use_dft": True})
    model = make_model()
    with (
        pytest.raises(RecipeError, match="LlamaForCausalLM computes its own loss"),
        TokenLoss(recipe, by_entropy).on(model),
    ):
        model(input_ids=batch(262)["input_ids"])


class _Changing(LlamaForCausalLM):
    """A model whose code changes its logits before the loss."""

    change: Any

    def forward(self, input_ids: Any, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.change(self.lm_head(self.model(input_ids).last_hidden_state))
        return self.loss_function(logits, labels, vocab_size=logits.shape[-1])


def _masked(logits: torch.Tensor) -> torch.Tensor:
    logits[..., 3] = -100.0
    return logits


def _unseen(logits: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return logits * 2


def _changing(change: Any) -> Any:
    model = make_model()
    model.__class__ = _Changing
    model.change = change
    return model.train()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_masked, "changes logits in place .__setitem__."),
        (lambda x: x.clamp_(-1, 1), "changes logits in place .clamp_."),
        (_unseen, "calls aten.mul.Tensor"),
    ],
)
def test_logits_that_cannot_wait_are_refused(change: Any, said: str) -> None:
    model = _changing(change)
    given = {k: v for k, v in batch(262).items() if k in ("input_ids", "labels")}
    with (
        pytest.raises(RecipeError, match=f"use_dft, use_eaft: .*{said}.*: leave the key out"),
        TokenLoss(load_recipe({**BASE, "use_dft": True}), by_probability).on(model),
    ):
        model(**given)


def test_logits_in_a_list_are_computed() -> None:
    losses = []
    given = {k: v for k, v in batch(262).items() if k in ("input_ids", "labels")}
    for change in (lambda x: x, lambda x: torch.cat([x[..., :9], x[..., 9:]], -1)):
        model = _changing(change)
        with TokenLoss(load_recipe({**BASE, "use_dft": True}), by_probability).on(model):
            losses.append(float(model(**given).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        {"use_dft": True, "use_eaft": True},
        {"use_dft": True, "label_smoothing_factor": 0.1},
        {"use_eaft": True, "context_parallel_size": 2},
        {"use_dft": True, "fsdp_config": {"version": 2}},
        {"use_eaft": True, "deepspeed": {"zero_optimization": {"stage": 2}}},
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="not both"):
        load_recipe({**BASE, **keys})


def train_losses(recipe: dict[str, Any], **keys: Any) -> list[float]:
    result = train({**recipe, "val_set_size": 0, "max_steps": 3, **keys},
                   console=Console(quiet=True))  # fmt: skip
    return [entry["loss"] for entry in result.history if "loss" in entry]


@pytest.mark.long("dft", "eaft")
@pytest.mark.parametrize("name", ["dft", "eaft"])
def test_packed_accumulated_and_optimized_runs_have_the_same_losses(
    name: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    keys = LOSSES[name][0]
    rest = {"num_epochs": 1, "max_steps": None, "seed": 1}

    def losses(**more: Any) -> list[float]:
        out = str(tmp_path / str(len(list(tmp_path.iterdir()))))
        return train_losses(recipe, **keys, output_dir=out, **more)

    whole = {"sample_packing": False, "micro_batch_size": 40}
    once = losses(**rest, **whole)
    assert once != pytest.approx(train_losses(recipe, **rest, **whole), rel=1e-2)
    parts = {"sample_packing": False, "micro_batch_size": 8, "gradient_accumulation_steps": 5}
    assert losses(**rest, **parts) == pytest.approx(once, rel=1e-5)
    packed = {"micro_batch_size": 1, "gradient_accumulation_steps": 100}
    assert losses(**rest, **packed) == pytest.approx(once, rel=1e-5)
    assert losses(**rest, **parts, optimize=True, codegen="eager") == pytest.approx(once, rel=1e-5)
