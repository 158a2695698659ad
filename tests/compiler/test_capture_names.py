"""TorchDynamo collects no names in our captures that nothing reads, and in all others it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo import output_graph, symbolic_convert

from fusewright import optimize
from fusewright.compiler import session

PLACES = (
    (output_graph.OutputGraph, "add_fqn_info_for_inlined_modules"),
    (symbolic_convert, "get_funcname"),
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("is_logged", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_names_are_found_for_others(is_logged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def counted(name: str, find: Any) -> Any:
        return lambda *args: called.append(name) or find(*args)

    for owner, name in PLACES:
        monkeypatch.setattr(owner, name, counted(name, vars(owner)[name]))
    monkeypatch.setattr(session, "_finders_of_names", session._finders_of_names.__wrapped__)
    before = [vars(owner)[name] for owner, name in PLACES]
    if is_logged:
        enabled = torch._logging._internal.log_state
        monkeypatch.setattr(type(enabled), "is_artifact_enabled", lambda *_: True)
    model, x = optimize(Model(), codegen="eager"), torch.randn(2, 8)
    model(x).sum().backward()
    assert set(called) == ({"get_funcname"} if is_logged else set())
    assert [vars(owner)[name] for owner, name in PLACES] == before
    torch.compile(Block(), backend="eager")(x)
    assert set(called) == {name for _, name in PLACES}
