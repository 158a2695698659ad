"""What changes in a model after its graphs were captured: hooks, classes, forwards."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.overrides import TorchFunctionMode

from fusewright import optimize
from fusewright.compiler.install import installed
from tests.explained import explain

from ..models.tiny import Stack, assert_equal_steps

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))

    @property
    def factor(self) -> float:
        return 1.0

    def activation(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x)) * self.factor


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Gate()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def _stack() -> Stack:
    torch.manual_seed(0)
    return Stack(Block() for _ in range(2))


def _pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    eager = _stack()
    return optimize(copy.deepcopy(eager), **{"codegen": "eager", **options}), eager


def _assert_equal(ours: nn.Module, eager: nn.Module) -> None:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert_equal_steps(ours, eager, x)


def _other_forward(self: Any, x: Tensor) -> Tensor:
    return self.down(torch.tanh(self.gate(x)) + self.up(x))


PATCHES = {
    "the block's class": (Block, "forward", lambda self, x: 3 * x - self.mlp(x)),
    "a submodule's class": (Gate, "forward", _other_forward),
    "a method of a submodule's class": (Gate, "activation", lambda self, x: torch.tanh(x)),
    "a property of a submodule's class": (Gate, "factor", property(lambda self: 0.25)),
    "a class of PyTorch": (nn.Linear, "forward", lambda self, x: F.linear(x, 0.5 * self.weight)),
}


@pytest.mark.long(
    "inductor-the block's class", "inductor-a submodule's class", "inductor-a class of PyTorch"
)
@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_class_patched_after_the_first_step(
    monkeypatch: pytest.MonkeyPatch, patch: tuple[type, str, Any], codegen: str
) -> None:
    ours, eager = _pair(codegen=codegen)
    _assert_equal(ours, eager)
    with monkeypatch.context() as patched:
        patched.setattr(*patch)
        _assert_equal(ours, eager)
        assert not explain(ours).bypasses  # captured anew, not passed by
    _assert_equal(ours, eager)


def _with_defaults(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return lambda x, gate=gate, factor=factor: factor * _other_forward(gate, x)


def _with_keyword_defaults(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return lambda x, *, gate=gate, factor=factor: factor * _other_forward(gate, x)


def _with_a_closure(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return lambda x: factor * _other_forward(gate, x)


def _with_a_partial(gate: nn.Module, factor: float) -> Callable[..., Any]:
    return functools.partial(_times_other_forward, gate, factor)


def _times_other_forward(gate: nn.Module, factor: float, x: Tensor) -> Tensor:
    return factor * _other_forward(gate, x)


@pytest.mark.parametrize(
    "make", [_with_defaults, _with_keyword_defaults, _with_a_closure, _with_a_partial]
)
def test_a_forward_put_into_a_submodule_after_the_first_step(make: Callable[..., Any]) -> None:
    ours, eager = _pair()
    _assert_equal(ours, eager)
    for factor in (2.0, 3.0):
        for model in (ours, eager):
            gate = model.layers[1].mlp
            gate.forward = make(gate, factor)
        _assert_equal(ours, eager)
    for model in (ours, eager):
        del model.layers[1].mlp.forward
    _assert_equal(ours, eager)


def test_a_submodule_replaced_and_a_class_swapped_after_the_first_step() -> None:
    class Other(Gate):
        forward = _other_forward

    ours, eager = _pair()
    _assert_equal(ours, eager)
    for model in (ours, eager):
        model.layers[0].mlp.__class__ = Other
        torch.manual_seed(3)
        model.layers[1].mlp = Other()
    _assert_equal(ours, eager)


@pytest.mark.parametrize(
    "register",
    [
        all_modules.register_module_forward_pre_hook,
        all_modules.register_module_forward_hook,
        all_modules.register_module_full_backward_pre_hook,
        all_modules.register_module_full_backward_hook,
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_hooks_of_all_modules_are_called_as_in_eager(register: Callable[..., Any], early) -> None:
    ours, eager = _pair()
    if not early:
        _assert_equal(ours, eager)
    seen: list[str] = []
    handle = register(lambda module, *_: seen.append(type(module).__name__))
    calls = []
    for model in (ours, eager):
        seen.clear()
        model(torch.randn(2, 5, 16, requires_grad=True)).sum().backward()
        calls.append(list(seen))
    handle.remove()
    assert calls[0] == calls[1]
    assert "Linear" in calls[0]
    assert any("for all modules" in b.reason for b in explain(ours).bypasses)
    _assert_equal(ours, eager)
    assert explain(ours).by_rule()["glu"] == 2


def test_equal_blocks_share_a_graph_and_nothing_is_captured_twice() -> None:
    ours, eager = _pair()
    for _ in range(3):
        _assert_equal(ours, eager)
    assert explain(ours).graphs == 1
    watches = installed(ours.layers[0]).session.state.watches
    assert watches.get(ours.layers[0]).code == watches.get(ours.layers[1]).code


class Body(Stack):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Block() for _ in range(2))
        self.embed, self.norm = nn.Embedding(32, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class LM(nn.Module):
    """A head that calls parts of its backbone itself: the embedding, or everything."""

    def __init__(self, walks: bool) -> None:
        super().__init__()
        self.model, self.walks = Body(), walks
        self.lm_head = nn.Linear(16, 32, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        h = self.model.embed(ids)
        if self.walks:
            for layer in self.model.layers:
                h = layer(h)
            h = self.model.norm(h)
        else:
            h = self.model(h)
        z = self.lm_head(h)
        return z if labels is None else (F.cross_entropy(z.flatten(0, 1), labels.flatten()), z)


IDS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))


def _lm_pair(walks: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    eager = LM(walks)
    return optimize(copy.deepcopy(eager), codegen="eager", verify="off"), eager


def _twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def _half(module: nn.Module, inputs: Any) -> Any:
    return None if inputs[0].dtype == torch.int64 else (inputs[0] * 0.5,)


def _steeper(module: nn.Module, grad_inputs: Any, grad_outputs: Any) -> Any:
    return tuple(None if g is None else g * 3 for g in grad_inputs)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(_twice),
    "pre": lambda m: m.register_forward_pre_hook(_half),
    "backward": lambda m: m.register_full_backward_hook(_steeper),
}


@pytest.mark.parametrize("place", ["layers.0", "layers.1.mlp", "layers.0.mlp.up", "embed", "norm"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_that_come_and_go_below_a_head_that_calls_the_blocks_itself(
    place: str, hook: str
) -> None:
    ours, eager = _lm_pair(walks=True)
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    handles = [HOOKS[hook](m.model.get_submodule(place)) for m in (ours, eager)]
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert f"submodule model.{place}" in " ".join(b.reason for b in explain(ours).bypasses)
    for handle in handles:
        handle.remove()
    assert_equal_steps(ours, eager, IDS, labels=IDS)


def test_a_hook_that_a_head_was_captured_with_is_no_reason_to_pass_it_by() -> None:
    ours, eager = _lm_pair(walks=False)
    handles = [m.model.embed.register_forward_hook(_twice) for m in (ours, eager)]
    for _ in range(2):
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert ours not in installed(ours).session.log.notes
    handles += [
        m.model.embed.register_forward_pre_hook(lambda m, a: (a[0] // 2,)) for m in (ours, eager)
    ]
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    for handle in handles:
        handle.remove()
    assert_equal_steps(ours, eager, IDS, labels=IDS)


def test_a_head_that_embeds_itself_is_passed_by_for_hooks_on_the_embedding_alone() -> None:
    ours, eager = _lm_pair(walks=False)
    seen = []
    for _ in range(2):
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    graphs = explain(ours).graphs
    for model in (ours, eager):
        model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert seen == ["mlp", "mlp"]
    head = installed(ours).session.log
    assert ours not in head.notes
    assert explain(ours).graphs <= graphs
    for model in (ours, eager):
        model.model.embed.register_forward_hook(_twice)
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert ours in head.notes


def test_a_head_that_calls_the_blocks_itself_is_captured_once_and_warns_of_nothing(
    recwarn: pytest.WarningsRecorder,
) -> None:
    ours, eager = _lm_pair(walks=True)
    for _ in range(3):
        assert_equal_steps(ours, eager, IDS, labels=IDS)
    assert explain(ours).graphs == 1
    assert ours not in installed(ours).session.log.notes
    assert not [w for w in recwarn if "torch.compile was put around" in str(w.message)]


def test_an_embedding_replaced_below_a_head_that_calls_it_itself() -> None:
    ours, eager = _lm_pair(walks=False)
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    for model in (ours, eager):
        torch.manual_seed(5)
        model.model.embed = nn.Embedding(32, 16)
        model.model.embed.register_forward_hook(_twice)
    assert_equal_steps(ours, eager, IDS, labels=IDS)
    for model in (ours, eager):
        model.model.embed.forward = functools.partial(_times_rows, model.model.embed.weight)
        model.model.embed._forward_hooks.clear()
    assert_equal_steps(ours, eager, IDS, labels=IDS)


def _times_rows(weight: Tensor, ids: Tensor) -> Tensor:
    return weight[ids] * 1.5


@pytest.mark.parametrize("kind", ["__defaults__", "__kwdefaults__", "a keyword's", "__code__"])
@pytest.mark.parametrize("place", ["block", "mlp"])
def test_what_a_method_holds_is_replaced_after_the_first_step(kind: str, place: str) -> None:
    class Scaled(Gate):
        def forward(self, x: Tensor, k: float = 1.0, *, j: float = 1.0) -> Tensor:
            return Gate.forward(self, x) * k * j

    class ScaledBlock(Block):
        def forward(self, x: Tensor, k: float = 1.0, *, j: float = 1.0) -> Tensor:
            return x * k + j * self.mlp(x)

    def other(self: Any, x: Tensor, k: float = 1.0, *, j: float = 1.0) -> Tensor:
        return torch.tanh(x)

    eager = _stack()
    for layer in eager.layers:
        layer.__class__, layer.mlp.__class__ = ScaledBlock, Scaled
    ours = optimize(copy.deepcopy(eager), codegen="eager")
    _assert_equal(ours, eager)
    function: Any = (ScaledBlock if place == "block" else Scaled).forward
    if kind == "__defaults__":
        function.__defaults__ = (3.0,)
    elif kind == "__kwdefaults__":
        function.__kwdefaults__ = {"j": 3.0}
    elif kind == "a keyword's":
        function.__kwdefaults__["j"] = 3.0
    else:
        function.__code__ = other.__code__
    before = ours(torch.ones(1, 2, 16))
    _assert_equal(ours, eager)
    assert not torch.allclose(before, _stack()(torch.ones(1, 2, 16)))
    assert not explain(ours).bypasses


@pytest.mark.parametrize("memory", ["speed", "min"])
def test_parameters_are_swapped_after_the_first_step(memory: str) -> None:
    ours, eager = _pair(memory=memory)
    _assert_equal(ours, eager)
    for model in (ours, eager):
        model.zero_grad()
        other = nn.Parameter(torch.full((16, 16), 0.1))
        torch.utils.swap_tensors(model.layers[0].mlp.up.weight, other)
    _assert_equal(ours, eager)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (ours, eager):
            model.zero_grad()
            model.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    _assert_equal(ours, eager)


class _Louder(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        return result * 100 if func is F.silu else result


@pytest.mark.parametrize("early", [False, True])
def test_a_function_mode_sees_the_functions_that_eager_mode_calls(early: bool) -> None:
    ours, eager = _pair()
    if not early:
        _assert_equal(ours, eager)
    with _Louder():
        _assert_equal(ours, eager)
    _assert_equal(ours, eager)
    assert explain(ours).by_rule()["glu"] == 2
    with torch.device("cpu"):  # a mode of PyTorch's, which changes nothing of a graph
        optimize(ours, codegen="eager")
        _assert_equal(ours, eager)
    assert not explain(ours).bypasses
