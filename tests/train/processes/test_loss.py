"""The loss of models that are not given how many tokens all processes train."""

from __future__ import annotations

import torch

from fusewright.train.data.sample import IGNORED
from fusewright.train.trainer.parallel import causal_loss

from ..conftest import make_model


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
