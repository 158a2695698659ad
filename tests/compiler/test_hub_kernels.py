"""Kernels of the Hub that transformers puts into models, and functions that they may replace."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusewright import optimize, restore
from fusewright.graph.opaque.hub_kernels import behind, is_replaced, replaceable
from tests.explained import explain

from ..models.zoo import FAMILIES, build
from ..versions import transformers_before

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(
        transformers_before("5.25"), reason="transformers installs the package kernels since 5.25"
    ),
]
IDS = torch.randint(3, 200, (2, 13), generator=torch.Generator().manual_seed(0))


class _Norm(nn.Module):
    """A kernel of LlamaRMSNorm, told apart by what it gives."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype) * 1.5


class _Repository:
    layer_name = "RMSNorm"

    def load(self) -> type[nn.Module]:
        return _Norm


@pytest.fixture
def kernels() -> Iterator[dict[str, Any]]:
    """Let ``kernelize`` put ``_Norm`` in the place of norms on a CPU; gives the mapping."""
    from kernels import use_kernel_mapping

    mapping: dict[str, Any] = {"RMSNorm": {"cpu": _Repository()}}
    with use_kernel_mapping(mapping):
        yield mapping


def _model() -> Any:
    return build(FAMILIES[0], lora=False).train()


def _step(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


def _assert_alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-4, atol=1e-6, msg=name)


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]


def _in_place(model: nn.Module) -> list[bool]:
    return ["_kernel_repo" in m.__dict__ for m in _norms(model)]


def test_the_kernels_of_transformers_give_way(kernels: Any) -> None:
    plain = _step(_model())
    model = _model()
    model.set_use_kernels(True)
    assert all(_in_place(model))
    with_kernels = _step(model)
    assert (with_kernels["loss"] - plain["loss"]).abs() > 1e-3
    optimize(model, codegen="eager")
    for _ in range(2):
        assert not any(_in_place(model))
        _assert_alike(_step(model), plain)
        model.eval().train()  # when transformers would put them in again
    assert explain(model).by_rule()["rms_norm"] == len(_norms(model))
    restore(model)
    assert all(_in_place(model))
    _assert_alike(_step(model), with_kernels)


def test_a_model_without_kernels_for_its_device_keeps_its_norms_optimized() -> None:
    model = _model()
    model.set_use_kernels(True)  # as from_pretrained does
    optimize(model, codegen="eager")
    model.eval().train()
    _step(model)
    assert explain(model).by_rule()["rms_norm"] == len(_norms(model))
    restore(model)
    assert model.use_kernels
    assert all("forward" not in m.__dict__ for m in model.modules())


def test_kernels_that_a_caller_chose_stay(kernels: Any) -> None:
    model = _model()
    model.set_use_kernels(True)
    model.kernel_config = types.SimpleNamespace(kernel_mapping=kernels, inherit_mapping=True)
    expected = _step(model)
    optimize(model, codegen="eager")
    assert all("_kernel_repo" in m.__dict__ for m in _norms(model.model.layers))
    _assert_alike(_step(model), expected)


def _turned(self: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A kernel for rotary embeddings, told apart by what it gives."""
    return q * 8.0, k * 8.0


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_replaced_function_is_called(checkpoints: bool) -> None:
    """Before it is captured, after, and when it is taken out again."""
    model, plain = _model(), _model()
    if checkpoints:
        for m in (model, plain):
            m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = _step(plain)
    optimize(model, codegen="eager")
    _assert_alike(_step(model), expected)
    assert explain(model).by_rule()["rope"] == len(model.model.layers)
    for m in (model, plain):
        for part in m.modules():
            for function in replaceable(part):
                function.forward = types.MethodType(_turned, function)
        assert any(map(is_replaced, m.modules()))
    turned = _step(plain)
    assert (turned["loss"] - expected["loss"]).abs() > 1e-4
    _assert_alike(_step(model), turned)
    _assert_alike(_step(copy.deepcopy(model)), turned)
    for part in model.modules():
        for function in replaceable(part):
            del function.forward
    _assert_alike(_step(model), expected)


def test_what_is_behind_a_marked_function() -> None:
    from transformers.models.llama import modeling_llama as llama

    marked: Any = llama.apply_rotary_pos_emb
    assert isinstance(marked, nn.Module)
    assert isinstance(behind(marked), types.FunctionType)
    assert behind(marked).__name__ == "apply_rotary_pos_emb"
    assert behind(behind(marked)) is behind(marked)
    forward = llama.LlamaAttention.forward
    assert behind(forward) is not forward
    assert behind(behind(forward)) is behind(forward)
    for other in (nn.Linear(2, 2), len, 3, None, _step, [], llama.LlamaMLP.forward):
        assert behind(other) is other
