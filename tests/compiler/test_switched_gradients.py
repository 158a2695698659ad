"""A block that switches gradients off says of its output what it says in eager mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusewright import optimize
from fusewright.compiler.copies.opaque_calls import opaque_copies
from fusewright.compiler.watch import Watch


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.linear(self.norm(x))
        return x + y


class _Trained(_Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


class _FrozenInAMethod(_Trained):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x)

    def part(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.linear(self.norm(x))  # type: ignore[no-any-return]


class _Stack(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(), kind()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("kind", "switches"), [(_Frozen, True), (_FrozenInAMethod, True), (_Trained, False)]
)
def test_forwards_that_switch_gradients_are_known(kind: type[nn.Module], switches: bool) -> None:
    block = kind()
    watch = Watch(block, (), opaque_copies().below(block))
    assert watch.switches_gradients is switches


def test_peft_and_torch_do_not_count() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    block = inject_adapter_in_model(LoraConfig(target_modules=["linear"], r=2), _Trained())
    watch = Watch(block, (), opaque_copies().below(block))
    assert not watch.switches_gradients


@pytest.mark.parametrize("kind", [_Frozen, _FrozenInAMethod, _Trained])
def test_an_output_needs_a_gradient_where_it_does_in_eager_mode(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(2, 5, 16), _Stack(kind)
    expected = model(x)
    made = optimize(model, codegen="inductor")(x)
    torch.testing.assert_close(made, expected)
    assert made.requires_grad is expected.requires_grad
