"""The loss of models that are not given how many tokens all processes train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import TrainingArguments

from fusewright.train.data.sample import IGNORED
from fusewright.train.model.token_losses import causal_loss
from fusewright.train.processes.launchers import Placement
from fusewright.train.processes.signals import Interrupts
from fusewright.train.processes.world import World
from fusewright.train.recipe.recipe import Recipe
from fusewright.train.trainer.build import make_trainer
from fusewright.train.trainer.context import Context

from ..conftest import make_model, make_tokenizer

QUIET = Console(quiet=True)


def test_it_is_that_of_models_that_can_be_told() -> None:
    model = make_model()
    ids = torch.randint(3, 262, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :4] = IGNORED
    number = torch.tensor(31)  # of the step, of which this is one process's share
    outputs = model(input_ids=ids, labels=labels, num_items_in_batch=number)
    torch.testing.assert_close(
        causal_loss({"logits": outputs.logits}, labels, number), outputs.loss
    )


def test_a_batch_that_trains_nothing_adds_nothing() -> None:
    logits = torch.randn(1, 8, 16, requires_grad=True)
    loss = causal_loss({"logits": logits}, torch.full((1, 8), IGNORED), torch.tensor(12))
    loss.backward()
    assert float(loss) == 0
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) == 0


def test_labels_are_smoothed_for_several_processes_as_for_one(tmp_path: Path) -> None:
    model = make_model()
    model.accepts_loss_kwargs = False
    keys: dict[str, Any] = {
        "base_model": "x",
        "datasets": [{"path": "x"}],
        "output_dir": str(tmp_path),
    }
    ids = torch.randint(3, 262, (2, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for size in (1, 2):
        world = World(Placement(0, size, 0, size))
        context = Context(Recipe(**keys), make_tokenizer(), QUIET, Interrupts(world), world=world)
        args = TrainingArguments(str(tmp_path), use_cpu=True, label_smoothing_factor=0.3)
        trainer = make_trainer(context, model, [], args=args)
        inputs = {"input_ids": ids, "labels": ids.clone()}
        losses.append(trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(16)))
    plain = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(losses[1], losses[0])
    assert abs(float(losses[0] - plain)) > 1e-4
