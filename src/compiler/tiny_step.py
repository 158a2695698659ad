"""A small step of a model, for commands that build a model themselves to explain it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from ..rewrite.verify import quiet_randomness
from .install import active
from .regions import input_embeddings


def tiny_step(model: nn.Module) -> None:
    """Run a forward of 2 x 11 tokens and a backward; keep gradients and random state as they are.

    Blocks run their graphs, although so few tokens are too small to gain. A model without an
    embedding of tokens is not called.
    """
    embedding = input_embeddings(model)
    if embedding is None:
        return
    weight = next(embedding.parameters())
    sessions = {record.session for m in model.modules() if (record := active(m)) is not None}
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_randomness())
        stack.enter_context(torch.enable_grad())
        for session in sessions:
            stack.enter_context(session.choices.small_blocks.disabled())
        ids = torch.arange(22, device=weight.device).reshape(2, 11) % weight.shape[0]
        inputs = {"input_ids": ids, **_labels(model, ids)}
        try:
            outputs = model(**inputs, use_cache=False)
        except TypeError:  # a model without a cache has no such argument
            outputs = model(**inputs)
        parameters = [p for p in model.parameters() if p.requires_grad]
        # an output class has the loss by name, a tuple has it first; without one, scores or states
        # are first
        loss = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "loss", None)
        loss = loss if "labels" in inputs and loss is not None else outputs[0].sum()
        if isinstance(loss, Tensor) and loss.requires_grad and loss.dim() == 0 and parameters:
            torch.autograd.grad(loss, parameters, allow_unused=True)


def _labels(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Labels for a tiny step, by the kind of loss that transformers notes in a model."""
    kind = next(filter(None, (getattr(m, "loss_type", None) for m in model.modules())), None)
    if kind == "ForSequenceClassification":  # which would note the kind of labels for all calls
        return {}
    return {"labels": torch.zeros_like(ids) if kind == "ForTokenClassification" else ids}
