"""What the code around a block writes into, when the block has run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusewright import optimize
from fusewright.kernels.tolerance import exceeded
from tests.explained import explain


class Block(nn.Module):
    """``mlp(norm(x))``, or the sum of x and a part of it beside that."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.g, self.u, self.d = (nn.Linear(16, 16) for _ in range(3))
        self.w = nn.Parameter(torch.rand(16) + 0.5)
        self.pair = pair

    def forward(self, x: Tensor) -> Any:
        if self.pair:
            x = x + self.d(x)
        h = x * 1 if x.dtype is torch.float64 else x.float()  # the exact one may be written to, too
        n = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = self.w * n.to(x.dtype)
        y = self.d(F.silu(self.g(y)) * self.u(y))
        return (y, x) if self.pair else y


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(self.pair), Block(self.pair)])

    pair = False


class Adds(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x += layer(x)
        return x


class AddsByMethod(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self._add(x, layer(x))
        return x

    def _add(self, x: Tensor, y: Tensor) -> None:
        x.add_(y)


class AddsUnseen(Stack):
    """By a name that is in no code."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            getattr(x, "add" + self.end)(layer(x))
        return x

    end = "_"


class Scales(Stack):
    pair = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y, rest = layer(x)
            rest *= 2
            x = y + rest
        return x


class Plain(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x * 1)
    y.double().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", ["speed", "min"])
@pytest.mark.parametrize("kind", [Adds, AddsByMethod, AddsUnseen, Scales])
def test_the_caller_may_write_as_in_eager(kind: Any, memory: str, codegen: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = kind().to(torch.bfloat16)
    ours = optimize(copy.deepcopy(eager), codegen=codegen, memory=memory)
    exact, x = copy.deepcopy(eager).double(), torch.randn(2, 5, 16, dtype=torch.bfloat16)
    reference = _step(exact, x.double())
    for _ in range(3):
        for a, b, o in zip(_step(ours, x), _step(eager, x), reference, strict=True):
            assert exceeded(a, b, o) is None
    assert explain(ours).by_rule()


class Twice(Stack):
    """A block's second call, before anybody has written."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        for _ in range(2):
            x = x + first(x)
        x += second(x)
        return x


class WritesLater(Stack):
    inplace = False

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.inplace:
                x += layer(x)
            else:
                x = x + layer(x)
        return x


class Crosses(Block):
    """A block of a decoder that is given an encoder's states."""

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x) + self.d(super().forward(states)) * mask


class CrossesFirst(Crosses):
    """It uses these states before its hidden states, and both have the size of its result."""

    def forward(self, x: Tensor, states: Tensor, mask: Tensor) -> Any:
        return self.d(Block.forward(self, states)) * mask + Block.forward(self, x)


class Narrows(Block):
    """A block whose result has another size than its input."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[..., :4] * 2


class AddsInside(Block):
    """A block that writes into its input, as its caller does afterwards."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = self.d(x)
        x += y
        return x + super().forward(x)


class WritesItsBuffer(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([AddsInside(False), AddsInside(False)])

    def forward(self, x: Tensor) -> Tensor:
        buffer = x.detach().clone()
        first = self.layers[0](buffer)
        buffer.copy_(buffer.flip(0, 1) * 0.5)
        return first + self.layers[1](buffer)


class AddsToAPart(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Narrows(False), Narrows(False)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x[..., :4] += layer(x)
        return x


class AddsBesideAnEncoder(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([CrossesFirst(False), CrossesFirst(False)])

    def forward(self, x: Tensor) -> Tensor:
        states = x * 3
        for layer in self.layers:
            x += layer(x, states, torch.ones(2, 5, 1, dtype=x.dtype))
        return x


def test_an_input_that_block_and_caller_write() -> None:
    torch.manual_seed(0)
    eager = WritesItsBuffer().to(torch.bfloat16)
    ours, x = optimize(copy.deepcopy(eager), codegen="eager"), torch.randn(2, 5, 16).bfloat16()

    def step(model: nn.Module, x: Tensor) -> list[Tensor]:
        model.zero_grad()
        y = model(x)
        y.double().square().sum().backward()
        return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    reference = step(copy.deepcopy(eager).double(), x.double())
    for a, b, o in zip(step(ours, x), step(eager, x), reference, strict=True):
        assert exceeded(a, b, o) is None
    assert explain(ours).by_rule()


@pytest.mark.parametrize("kind", [AddsToAPart, AddsBesideAnEncoder])
def test_hidden_states_are_known_by_their_place(kind: Any) -> None:
    torch.manual_seed(0)
    eager = kind().to(torch.bfloat16)
    ours, x = optimize(copy.deepcopy(eager), codegen="eager"), torch.randn(2, 5, 16).bfloat16()
    reference = _step(copy.deepcopy(eager).double(), x.double())
    for a, b, o in zip(_step(ours, x), _step(eager, x), reference, strict=True):
        assert exceeded(a, b, o) is None
    assert explain(ours).by_rule()


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trained", [False, True])
def test_inputs_that_are_slices_or_expanded(trained: bool, codegen: str) -> None:
    """A copy of them has other strides than what the graph was captured with."""
    torch.manual_seed(0)
    eager = Plain()
    ours = optimize(copy.deepcopy(eager), codegen=codegen)
    for view in (lambda t: t[:, :5, :16], lambda t: t[:1, :5, :16].expand(2, -1, -1)):
        torch._dynamo.reset()
        grads = []
        for model in (eager, ours):
            model.zero_grad()
            t = torch.linspace(-1, 1, 2 * 7 * 24).view(2, 7, 24).requires_grad_(trained)
            model(view(t)).square().sum().backward()
            grads.append([t.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*grads)
    assert explain(ours).by_rule()


@pytest.mark.parametrize("kind", [Twice, WritesLater])
def test_what_one_call_did_not_write_the_next_one_may(kind: Any) -> None:
    torch.manual_seed(0)
    eager = kind().to(torch.bfloat16)
    ours, x = optimize(copy.deepcopy(eager), codegen="eager"), torch.randn(2, 5, 16).bfloat16()
    exact = copy.deepcopy(eager).double()
    for inplace in (False, True, True):
        for model in (ours, eager, exact):
            model.inplace = inplace
        reference = _step(exact, x.double())
        for a, b, o in zip(_step(ours, x), _step(eager, x), reference, strict=True):
            assert exceeded(a, b, o) is None


@pytest.mark.parametrize("kind", [Adds, AddsByMethod])
def test_the_caller_may_write_into_what_needed_no_gradient(kind: Any) -> None:
    """As into the embeddings of a frozen table: the first block keeps them for its weights."""
    torch.manual_seed(0)
    eager = kind().to(torch.bfloat16)
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    exact, x = copy.deepcopy(eager).double(), torch.randn(2, 5, 16, dtype=torch.bfloat16)
    for model, own in ((ours, x.clone()), (eager, x.clone()), (exact, x.double())):
        model(own).double().square().sum().backward()
    weights = zip(ours.parameters(), eager.parameters(), exact.parameters(), strict=True)
    for a, b, o in weights:
        assert exceeded(a.grad, b.grad, o.grad) is None
    assert explain(ours).by_rule()


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", ["speed", "min"])
def test_a_buffer_without_a_gradient_is_filled_again_before_backward(
    memory: str, codegen: str
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = Plain()
    ours = optimize(copy.deepcopy(eager), codegen=codegen, memory=memory)
    for frozen in (False, True):
        for model in (eager, ours):
            model.zero_grad()
            if frozen:
                next(model.parameters()).requires_grad_(False)
            buffer, total = torch.empty(2, 5, 16), torch.zeros(())
            for seed in range(3):
                buffer.copy_(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)))
                total = total + model(buffer).square().sum()
            total.backward()
        for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    assert explain(ours).by_rule()


@pytest.mark.parametrize("kind", [Crosses, CrossesFirst])
def test_what_all_blocks_are_given_is_not_copied_for_each(kind: Any) -> None:
    """Each of them keeps what it is given for backward."""
    torch._dynamo.reset()
    blocks = nn.ModuleList([kind(False) for _ in range(3)])
    model = optimize(nn.ModuleDict({"layers": blocks}), codegen="eager")
    states = torch.randn(2, 5, 16, requires_grad=True) * 1
    kept: list[Tensor] = []
    x = torch.randn(2, 5, 16, requires_grad=True) * 1
    given = [x]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for layer in model["layers"]:
            x = layer(x, states, torch.ones(2, 5, 1))
            given.append(x)
    memory = [t.untyped_storage().data_ptr() for t in kept]
    assert states.untyped_storage().data_ptr() in memory
    assert not any(t.untyped_storage().data_ptr() in memory for t in given)
    assert explain(model).by_rule()


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("memory", ["speed", "min"])
def test_backward_need_not_pass_what_eager_saves(memory: str, codegen: str) -> None:
    """In fp32 the norm keeps the input itself; the gradient of a later weight needs none."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    eager = nn.ModuleDict({"layers": nn.ModuleList([Block(False), Block(False)])})
    ours = optimize(copy.deepcopy(eager), codegen=codegen, memory=memory)
    grads = []
    for model in (eager, ours):
        first, last = model["layers"]
        x = torch.linspace(-1, 1, 160).view(2, 5, 16).requires_grad_() * 1
        x = x + first(x)
        x += last(x)
        grads += torch.autograd.grad(x.square().sum(), last.d.weight)
    torch.testing.assert_close(*grads)
    assert explain(ours).by_rule()
