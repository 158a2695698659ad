"""On a real GPU: what a steady step may not do. No waiting, one device, the precision asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusewright import optimize

from .calls import LAUNCHING, Call, sized
from .util import assert_parity

pytestmark = pytest.mark.gpu

SHAPE = (2, 67, 320)

each_launching_call = pytest.mark.parametrize("name", LAUNCHING)


def _call(name: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Call:
    return replace(LAUNCHING[name], sizes=sized(*SHAPE), dtype=dtype, device="cuda").call(seed)


def _gradients(call: Call, inputs: Sequence[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    made = call.ours(*inputs)
    outputs = list(made) if isinstance(made, tuple) else [made]
    live = [o for o in outputs if o.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    found = torch.autograd.grad(live, wanted, upstream[: len(live)], allow_unused=True)
    return [*(o.detach() for o in outputs), *(g for g in found if g is not None)]


def _upstream(call: Call) -> list[Tensor]:
    made = call.ours(*call.tensors)
    outputs = made if isinstance(made, tuple) else (made,)
    return [torch.randn_like(o) for o in outputs if o.requires_grad]


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@each_launching_call
@pytest.mark.usefixtures("_no_waiting")
def test_the_host_never_waits(name: str) -> None:
    call = _call(name)
    upstream = _upstream(call)
    _gradients(call, call.tensors, upstream)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    _gradients(call, call.tensors, upstream)


@each_launching_call
def test_a_graph_captures_forward_and_backward(name: str) -> None:
    """It computes with what its inputs hold when it is replayed."""
    call = _call(name)
    others = tuple(_call(name, seed=1).tensors)
    held = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in call.tensors)
    upstream = _upstream(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _gradients(call, held, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _gradients(call, held, upstream)
    with torch.no_grad():
        for t, other in zip(held, others, strict=True):
            t.copy_(other)
    graph.replay()
    eager = _gradients(call, others, upstream)
    for ours, theirs in zip(captured, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def _tf32() -> Iterator[None]:
    backends: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul)
    before = [b.fp32_precision for b in backends]
    torch.backends.fp32_precision = "tf32"  # as TrainingArguments(tf32=True) sets it
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


@pytest.mark.parametrize(
    "name",
    ["lora_linear", "lora_linear-quantized", "mlp_block", "moe_experts", "linear_cross_entropy",
     "linear_logprob-all", "rms_norm_linear"],
)  # fmt: skip
@pytest.mark.usefixtures("_tf32")
def test_parity_in_tf32(name: str) -> None:
    """Against eager in tf32: the budget grows with eager's own error."""
    call = _call(name, torch.float32)
    assert_parity(call.ours, call.reference, *call.tensors)


@each_launching_call
def test_every_launch_is_on_the_device_of_its_tensors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another device current, by a stub: a second card is not there."""
    call = _call(name)
    upstream = _upstream(call)
    entered: list[torch.device] = []
    guard = torch.cuda.device

    class Recording(guard):  # type: ignore[misc, valid-type]
        def __init__(self, device: Any) -> None:
            entered.append(torch.device(device))
            super().__init__(device)

    monkeypatch.setattr(torch.cuda, "device", Recording)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    _gradients(call, call.tensors, upstream)
    assert entered
    assert set(entered) == {call.tensors[0].device}


@pytest.mark.usefixtures("_no_waiting")
def test_the_host_never_waits_in_a_step_of_a_model() -> None:
    """Where eager does not, either, an optimized model does not from its second step on."""
    transformers = pytest.importorskip("transformers")

    def prepared(ours: bool) -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=512, use_cache=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
        model = optimize(model) if ours else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(512, (2, 64), device="cuda")

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    for ours in (False, True):
        step = prepared(ours)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            if ours:
                raise
            pytest.skip(f"eager waits, too: {error}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
