"""Calls that are no ordinary ones: torch.func, forward-mode AD, fake tensors, second derivatives.

Each gives eager's result, or an error that says what to do; and the ordinary calls after it are
rewritten as if nothing had been.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from fusewright import optimize
from fusewright.memory.budget import Budget
from fusewright.memory.meter import Meter
from fusewright.memory.planner import Planner
from tests.explained import explain

from ..models.tiny import Body, CausalLM

IDS = torch.arange(14).view(2, 7)
RULES = {"linear_cross_entropy": 1, "rms_norm_linear": 2, "rms_norm": 2, "glu": 2}
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.norm = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _pair(**choices: Any) -> tuple[CausalLM, CausalLM]:
    torch.manual_seed(0)
    eager = CausalLM(Body(_Block() for _ in range(2)), nn.Linear(16, 32, bias=False))
    choices.setdefault("codegen", "eager")
    return eager, optimize(copy.deepcopy(eager), **choices)


def _loss(model: nn.Module) -> Tensor:
    loss: Tensor = model(IDS, labels=IDS)[0]
    return loss


def _is_rewritten(model: nn.Module) -> None:
    """An ordinary step after all that is rewritten, and no region was given up."""
    _loss(model).backward()
    report = explain(model)
    assert report.by_rule() == RULES, str(report)
    assert "could not be captured" not in str(report)


def _grad(m: nn.Module) -> Any:
    parameters = {n: p.detach() for n, p in m.named_parameters()}
    return grad(lambda p: functional_call(m, p, (IDS,), {"labels": IDS})[0])(parameters)


def _per_sample(m: nn.Module) -> Any:
    parameters = {n: p.detach() for n, p in m.named_parameters()}

    def loss(p: Any, row: Tensor) -> Tensor:
        return functional_call(m, p, (row[None],), {"labels": row[None]})[0]

    return vmap(grad(loss), (None, 0))(parameters, IDS)


def _jacobian(m: nn.Module) -> Any:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    return {"x": jacrev(lambda t: m.model.layers[0](t).sum(-1))(x)}


def _jvp(m: nn.Module) -> Any:
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    with forward_ad.dual_level():
        out = m.model.layers[0](forward_ad.make_dual(x, torch.ones_like(x)))
        return {"x": forward_ad.unpack_dual(out).tangent}


def _func_jvp(m: nn.Module) -> Any:
    parameters = {n: p.detach() for n, p in m.named_parameters()}
    run = lambda p: functional_call(m, p, (IDS,), {"labels": IDS})[0]  # noqa: E731
    return {"out": torch.func.jvp(run, (parameters,), (parameters,))[1]}


@pytest.mark.parametrize("call", [_grad, _per_sample, _jacobian, _jvp, _func_jvp])
@pytest.mark.parametrize("first", [True, False])
def test_a_transform_gives_what_it_gave_and_ends_nothing(
    call: Callable[[nn.Module], Any], first: bool
) -> None:
    eager, ours = _pair()
    if not first:
        _loss(ours)
    expected, found = call(eager), call(ours)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert any(n.startswith(("a transform", "forward-mode")) for n in _notes(ours))
    _is_rewritten(ours)


def _notes(model: nn.Module) -> list[str]:
    text = str(explain(model))
    return [line.split(": ", 2)[-1] for line in text.splitlines() if "runs as it was" in line]


def test_functional_call_alone_is_an_ordinary_call() -> None:
    eager, ours = _pair()
    for m in (eager, ours):
        m.lm_head.weight.grad = None
        parameters = dict(m.named_parameters())
        functional_call(m, parameters, (IDS,), {"labels": IDS})[0].backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, eager.lm_head.weight.grad)
    _is_rewritten(ours)


def _meta(model: nn.Module) -> Any:
    return copy.deepcopy(model).to("meta")(IDS.to("meta"), labels=IDS.to("meta"))[0]


def _fake(model: nn.Module) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return model(IDS, labels=IDS)[0]


def _faked(model: nn.Module) -> Any:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    ids = mode.from_tensor(IDS)
    with mode:
        return model(ids, labels=ids)[0]


def _traced(model: nn.Module) -> Any:
    graph = make_fx(lambda ids: model(ids, labels=ids)[0])(IDS)
    assert not any("fusewright" in str(n.target) for n in graph.graph.nodes)
    return graph(IDS)


@pytest.mark.parametrize("call", [_meta, _fake, _faked, _traced])
def test_the_first_call_may_be_on_tensors_without_values(
    call: Callable[[nn.Module], Any],
) -> None:
    eager, ours = _pair()
    expected, found = call(eager), call(ours)
    assert (found.shape, found.dtype, found.device) == (
        expected.shape, expected.dtype, expected.device
    )  # fmt: skip
    _is_rewritten(ours)


def test_a_model_of_transformers_may_be_called_on_meta_tensors() -> None:
    """It fills a cache there: without one, it would read whether the positions are packed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=37, num_attention_heads=2, **sizes))
        ids = torch.zeros(2, 6, dtype=torch.int64)
        assert model(input_ids=ids, labels=ids).loss.is_meta
        optimize(model)(input_ids=ids, labels=ids).loss.backward()


def test_a_model_made_of_fake_tensors_is_captured() -> None:
    """Its steps are counted, not computed; nothing can be verified there, or compiled."""
    made, _ = _pair()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in made.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype)
                    module._parameters[name] = nn.Parameter(fake, p.requires_grad)
        optimize(made, codegen="inductor")
        made(IDS, labels=IDS)[0].backward()
    assert explain(made).by_rule() == RULES


def test_a_whole_model_on_meta_with_a_budget() -> None:
    eager, _ = _pair()
    ours = optimize(copy.deepcopy(eager).to("meta"))
    assert ours(IDS.to("meta"), labels=IDS.to("meta"))[0].is_meta


def test_the_planner_reads_only_what_is_there() -> None:
    """Parameters on meta (accelerate's cpu_offload puts them there between calls), and shards."""
    module = nn.Linear(4, 4)
    module.bias = nn.Parameter(torch.empty(4, device="meta"))
    budget, blocks = Budget.parse("auto"), weakref.WeakSet([module])
    planner = Planner(budget, weakref.ref(module), blocks, Meter(torch.device("cpu")), ())
    before = planner._values()
    assert len(before) == 1
    with torch.no_grad():
        module.weight.add_(1)
    assert planner._values() != before


def test_accelerate_cpu_offload() -> None:
    accelerate = pytest.importorskip("accelerate")
    eager, ours = _pair(memory="auto")
    for m in (eager, ours):
        accelerate.cpu_offload(m, execution_device=torch.device("cpu"))
    for _ in range(2):
        assert float(_loss(ours)) == pytest.approx(float(_loss(eager)), rel=1e-6)


@pytest.mark.parametrize("memory", ["speed", "min"])
def test_a_gradient_penalty(memory: str) -> None:
    eager, ours = _pair(memory=memory)
    for m in (eager, ours):
        loss = _loss(m)
        (g,) = torch.autograd.grad(loss, m.lm_head.weight, create_graph=True)
        (loss + 100 * g.pow(2).sum()).backward()
    for (name, a), b in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    ours.zero_grad()
    _is_rewritten(ours)


@pytest.mark.parametrize("memory", ["speed", "min"])
def test_a_penalty_on_the_gradient_of_an_input(memory: str) -> None:
    eager, ours = _pair(memory=memory)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    for m in (eager, ours):
        leaf = x.clone().requires_grad_()
        out = m.model.layers[1](m.model.layers[0](leaf)).sum()
        (g,) = torch.autograd.grad(out, leaf, create_graph=True)
        g.pow(2).sum().backward()
    for a, b in zip(ours.model.layers.parameters(), eager.model.layers.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["speed", "min"])
def test_a_compiled_block_says_what_to_do(memory: str) -> None:
    """Whether or not the gradient that comes in has a history."""
    _, ours = _pair(codegen="inductor", memory=memory)
    block = ours.model.layers[0].requires_grad_(False)
    x = torch.randn(2, 3, 16, requires_grad=True)
    (once,) = torch.autograd.grad(block(x).sum(), x, create_graph=True)
    assert torch.allclose(once, torch.autograd.grad(block(x).sum(), x)[0])
    with pytest.raises(NotImplementedError, match=r"codegen='eager'.*restore\(model\)"):
        once.sum().backward()
