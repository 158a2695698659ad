"""Where the capture of a head fails, what has run by then does not run again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

import fusewright.compiler.capture as capture
from fusewright import optimize
from fusewright.compiler.unit import Unit
from tests.explained import explain

IDS = torch.arange(14).view(2, 7)
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.silu(self.gate(x)) * self.up(x))
        self.calls.add_(1)  # type: ignore[operator]
        return F.dropout(x.to(y.dtype), 0.2, self.training) + y


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.dropout(self.embed(ids), 0.1, self.training)
        for layer in self.layers:
            x = layer(x)
        return x


class Head(nn.Module):
    """A causal LM; a ``flat`` one has the blocks itself."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = Body()
        if flat:
            self.embed, self.layers = body.embed, body.layers
        else:
            self.model = body
        self.flat, self.lm_head = flat, nn.Linear(16, 32, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        z = self.lm_head(F.dropout(Body.forward(self, ids) if self.flat else self.model(ids), 0.1))  # type: ignore[arg-type]
        if labels is None:
            return z
        return F.cross_entropy(z.float().view(-1, 32), labels.view(-1)), z


def _seen(model: nn.Module, autocast: bool) -> list[Any]:
    torch.manual_seed(7)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = model(IDS, labels=IDS)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return [loss.detach(), *gradients, *model.buffers(), torch.get_rng_state()]


def _assert_same(mine: list[Any], theirs: list[Any], rtol: float) -> None:
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol / 10)


def _refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = capture.compile_graph

    def refuse(unit: Unit) -> Any:
        if unit.kind == "head":
            raise TorchDynamoException("no head")
        return real(unit)

    monkeypatch.setattr(capture, "compile_graph", refuse)


def test_the_backbone_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _refusing(monkeypatch)
    eager = Head(flat=False)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    called: list[str] = []
    ours.model.layers[0].register_forward_hook(lambda *a: called.append("block"))
    for _ in range(2):
        _assert_same(_seen(ours, False), _seen(eager, False), 1e-4)
    assert called == ["block", "block"]
    assert any("no head" in b.reason for b in explain(ours).bypasses)


def test_the_blocks_of_a_flat_model_run_once() -> None:
    """Under autocast they return another dtype, which the captured head cannot know."""
    eager = Head(flat=True)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(2):
        _assert_same(_seen(ours, False), _seen(eager, False), 1e-4)
    for _ in range(2):
        _assert_same(_seen(ours, True), _seen(eager, True), 0.05)
    assert any("ResultChanged" in b.reason for b in explain(ours).bypasses)


def test_the_backbone_runs_once_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _refusing(monkeypatch)
    eager = Head(flat=False)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    for _ in range(2):
        found = []
        for model in (ours, eager):
            torch.manual_seed(7)
            with torch.no_grad():
                loss, _ = model(IDS, labels=IDS)
            found.append([loss, *model.buffers(), torch.get_rng_state()])
        _assert_same(*found, 1e-4)
