"""State that a block changes or draws from, and that is no tensor of a graph, is eager's."""

from __future__ import annotations

import collections
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fusewright import explain, optimize

GLOBAL = types.SimpleNamespace(calls=0)


def model(change: Callable[[Any, Tensor], Tensor], make: Callable[[int], Any]) -> Any:
    """A model whose blocks end in ``change``, with ``make(number)`` as their attribute ``held``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()

    class Block(LlamaDecoderLayer):
        def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return change(self, super().forward(hidden, *args, **kwargs))

    for i, layer in enumerate(model.model.layers):
        layer.__class__ = Block
        layer.held = make(i)
    return model


def losses(model: Any) -> list[float]:
    """The losses of three steps and an evaluation, from the same random states."""
    np.random.seed(0)
    random.seed(0)
    torch.manual_seed(0)
    found = []
    for seed in range(3):
        ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(seed))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(float(loss.detach()))
    model.eval()
    with torch.no_grad():
        found.append(float(model(input_ids=ids, labels=ids, use_cache=False).loss))
    return [*found, float(np.random.rand()), random.random(), float(torch.rand(()))]


def noise(block: Any, h: Tensor) -> Tensor:
    return h + torch.from_numpy(np.random.randn(h.shape[-1]).astype("float32")) * 0.1


def scale(block: Any, h: Tensor) -> Tensor:
    return h * (1 + 0.5 * float(np.random.rand()))


def of_held(block: Any, h: Tensor) -> Tensor:
    return h + torch.from_numpy(block.held.standard_normal(h.shape[-1]).astype("float32")) * 0.1


def of_python(block: Any, h: Tensor) -> Tensor:
    return h * (1 + block.held.random())


@pytest.mark.parametrize("small", ["keep", "optimize"])
@pytest.mark.parametrize(
    ("change", "make"),
    [
        (noise, lambda i: None),
        (scale, lambda i: None),
        (of_held, np.random.default_rng),
        (of_held, np.random.RandomState),
        (of_python, random.Random),
    ],
    ids=["a global array", "a global number", "a Generator", "a RandomState", "a Random"],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_random_numbers_of_numpy_and_python(
    change: Any, make: Any, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEWRIGHT_SMALL", small)
    eager, ours = model(change, make), optimize(model(change, make), codegen="eager")
    assert losses(ours) == pytest.approx(losses(eager), rel=1e-5)
    if small == "optimize":
        reasons = {b.reason for b in explain(ours).bypasses if b.module.endswith("layers.0")}
        assert any("could not be captured" in reason for reason in reasons), reasons


def batch_norm(block: Any, h: Tensor) -> Tensor:
    return block.held(h.transpose(1, 2)).transpose(1, 2)


def append(block: Any, h: Tensor) -> Tensor:
    block.held.append(1)
    return h * (1 + 0.1 * len(block.held))


def count(block: Any, h: Tensor) -> Tensor:
    block.held["calls"] = block.held.get("calls", 0) + 1
    return h * (1 + 0.1 * block.held["calls"])


def count_globally(block: Any, h: Tensor) -> Tensor:
    GLOBAL.calls += 1
    return h * (1 + 0.1 * GLOBAL.calls)


def write_parameter(block: Any, h: Tensor) -> Tensor:
    block.held.data.add_(0.01)
    return h * block.held


def write_detached(block: Any, h: Tensor) -> Tensor:
    block.held.detach().mul_(0.9).add_(0.1 * h.detach().mean((0, 1)))
    return h - block.held


def draw(block: Any, h: Tensor) -> Tensor:
    return h * (1 + 0.2 * torch.rand(h.shape[-1], generator=block.held))


STATES: dict[str, tuple[Any, Any, Any]] = {
    "BatchNorm": (
        batch_norm,
        lambda i: nn.BatchNorm1d(64),
        lambda m: (m.running_mean.tolist(), m.running_var.tolist(), int(m.num_batches_tracked)),
    ),
    "InstanceNorm": (
        batch_norm,
        lambda i: nn.InstanceNorm1d(64, track_running_stats=True),
        lambda m: (m.running_mean.tolist(), int(m.num_batches_tracked)),
    ),
    "deque": (append, lambda i: collections.deque(), len),
    "list": (append, lambda i: [], len),
    "dict": (count, lambda i: {}, lambda d: d["calls"]),
    "global": (count_globally, lambda i: None, lambda _: GLOBAL.calls),
    "parameter.data": (write_parameter, lambda i: nn.Parameter(torch.ones(64)), Tensor.tolist),
    "detached buffer": (write_detached, lambda i: nn.Buffer(torch.zeros(64)), Tensor.tolist),
    "torch.Generator": (
        draw,
        lambda i: torch.Generator().manual_seed(i),
        lambda g: g.get_state().tolist(),
    ),
}
"""The code of the block, the state it holds, and the part of that which is compared."""


@pytest.mark.parametrize("small", ["keep", "optimize"])
@pytest.mark.parametrize("kind", STATES)
@pytest.mark.usefixtures("fresh_dynamo")
def test_state_changes_as_often_as_in_eager_mode(
    kind: str, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEWRIGHT_SMALL", small)
    change, make, read = STATES[kind]
    found = []
    for optimizing in (False, True):
        GLOBAL.calls = 0
        each = model(change, make)
        if optimizing:
            optimize(each, codegen="eager")
        found.append((losses(each), [read(layer.held) for layer in each.model.layers]))
    (theirs, their_state), (mine, my_state) = found
    assert mine == pytest.approx(theirs, rel=1e-5)
    flat = [torch.tensor(s, dtype=torch.float64).flatten() if not isinstance(s, tuple) else
            torch.cat([torch.tensor(t, dtype=torch.float64).flatten() for t in s])
            for s in (*my_state, *their_state)]  # fmt: skip
    for ours, eager in zip(flat[:2], flat[2:], strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
