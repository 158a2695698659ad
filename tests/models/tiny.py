"""Tiny models of plain modules, for tests that need no architecture, and steps to compare them by.

Those of real architectures are in ``zoo.py``; ``tests/train/conftest.py`` has one with a tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright import optimize


class Stack(nn.Module):
    """Blocks in a row."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Body(nn.Module):
    """An embedding, and blocks in a row."""

    def __init__(self, blocks: Iterable[nn.Module], vocabulary: int = 32, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(blocks)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


def unshifted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


class CausalLM(nn.Module):
    """A backbone and a head; with labels, it returns the loss and the logits."""

    def __init__(
        self,
        model: nn.Module,
        lm_head: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor] = unshifted_loss,
    ) -> None:
        super().__init__()
        self.model, self.lm_head, self.loss = model, lm_head, loss

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.lm_head(self.model(ids))
        return logits if labels is None else (self.loss(logits, labels), logits)


def step(model: nn.Module, *inputs: Tensor, **more: Any) -> list[Tensor | None]:
    """What a step computes: its output, or its loss and logits, and every gradient.

    What has no loss is trained on the sum of its squares.
    """
    model.zero_grad()
    out = model(*inputs, **more)
    outputs, loss = ([out], out.square().sum()) if isinstance(out, Tensor) else (out[:2], out[0])
    loss.backward()
    return [*(t.detach() + 0 for t in outputs), *(p.grad for p in model.parameters())]


def assert_equal_steps(
    ours: nn.Module,
    eager: nn.Module,
    *inputs: Tensor,
    rtol: float | None = None,
    atol: float | None = None,
    **more: Any,
) -> None:
    """Hold a step of ``ours`` to the results of ``eager``."""
    steps = (step(model, *inputs, **more) for model in (ours, eager))
    for mine, theirs in zip(*steps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=atol)


def token_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(seed))


def training_step(model: nn.Module, ids: Tensor, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a model of transformers, and the gradients that there are."""
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    loss = model(input_ids=ids, labels=ids, **more).loss
    if loss.requires_grad:
        loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def assert_equal_training_steps(ours: Any, eager: Any, ids: Tensor, **more: Any) -> None:
    """Hold the loss and the norm of each gradient to those of ``eager``."""
    (loss, grads), (eager_loss, eager_grads) = (
        training_step(m, ids, **more) for m in (ours, eager)
    )
    torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == eager_grads.keys()
    for name, theirs in eager_grads.items():
        assert (grads[name] - theirs).norm() <= 1e-4 * (theirs.norm() + 1e-6), name


def pair(make: Callable[[], nn.Module], **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model, optimized and eager, in training and without weights of nothing but zeros."""
    torch.manual_seed(0)
    eager = make().float().train()
    for p in eager.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return optimize(copy.deepcopy(eager), codegen="eager", **options), eager


def assert_equal_losses(
    ours: nn.Module, eager: nn.Module, loss_of: Callable[[nn.Module], Tensor]
) -> None:
    """Hold a loss to that of ``eager``, and which parameters have a gradient, and its norm."""
    losses = []
    for model in (ours, eager):
        model.zero_grad()
        torch.manual_seed(1)  # of dropout
        losses.append(loss_of(model))
        losses[-1].backward()
    torch.testing.assert_close(losses[0] + 0, losses[1], rtol=1e-5, atol=1e-6)
    assert_equal_gradients(ours, eager)


def assert_equal_gradients(ours: nn.Module, eager: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            assert (p.grad - q.grad).norm() <= 2e-5 * q.grad.norm() + 1e-6, name
