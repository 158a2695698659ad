"""On a real GPU: block inputs in pinned memory, with the copies beside the work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from fusewright import optimize
from fusewright.compiler.pipeline import planner_of
from fusewright.memory.offload import Offload, Streams
from tests.explained import explain

pytestmark = pytest.mark.gpu

TOLERANCE = 1e-5
BATCH, TIME, HIDDEN, LAYERS = 2, 1024, 512, 12
INPUT = BATCH * TIME * HIDDEN * 4
"""Bytes of one block's input."""


def _model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=1376, num_hidden_layers=LAYERS, vocab_size=1000,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=TIME,
    )  # fmt: skip
    return LlamaForCausalLM(config).cuda().train()


def _forced(model: Any, level: str, codegen: Any) -> Any:
    ours = optimize(copy.deepcopy(model), codegen=codegen, memory="1000GB")
    planner: Any = planner_of(ours)
    planner.allowed = (level,)
    return ours


def _step(model: Any) -> tuple[Tensor, list[Tensor], int]:
    """The loss, the gradients, and the bytes kept between forward and backward."""
    model.zero_grad()
    ids = torch.randint(1, 999, (BATCH, TIME), generator=torch.Generator().manual_seed(1)).cuda()
    before = torch.cuda.memory_allocated()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], kept


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_inputs_leave_and_come_back_as_they_were(codegen: Any) -> None:
    model = _model()
    here, there = _forced(model, "input", codegen), _forced(model, "offload", codegen)
    for ours in (here, there):
        _step(ours)
    for _ in range(3):
        loss, grads, kept = _step(there)
        expected, wanted, kept_here = _step(here)
        # attention sums its gradients in any order, so that even two equal steps differ
        torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=0)
        size = torch.stack([g.norm() for g in wanted]).norm()
        off = torch.stack([(a - b).norm() for a, b in zip(grads, wanted, strict=True)]).norm()
        assert off <= TOLERANCE * size
        # all but the last one, and one that its copy may hold
        assert kept_here - kept >= (LAYERS - 2) * INPUT
    assert f"{LAYERS} blocks keep their input in host memory" in explain(there).memory


def test_nothing_waits_for_the_gpu() -> None:
    offload = Offload()
    x = torch.randn(BATCH, TIME, HIDDEN, device="cuda", requires_grad=True)

    def block(t: Tensor) -> Any:
        return checkpoint(torch.tanh, t, use_reentrant=False, preserve_rng_state=False)

    for mode in ("default", "error"):  # pinned memory is allocated in the first round
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = x
            for _ in range(LAYERS):
                y = offload.around(block)(y)
            y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_copy_waits_for_what_makes_its_source() -> None:
    streams = Streams()
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        a = (a @ a) / 64  # long enough for a copy that does not wait to be early
        going = streams.out(a)
        streams.wait(going, device)
        coming = streams.back(going.result, device)
        streams.wait(coming, device)
        assert torch.equal(coming.result, a)


def test_memory_that_is_let_go_is_not_overtaken() -> None:
    streams, device = Streams(), torch.device("cuda", torch.cuda.current_device())
    for value in range(20):
        t = torch.full((16 << 20,), float(value), device=device)
        going = streams.out(t)
        streams.wait(going, device)
        del t
        torch.full((16 << 20,), -1.0, device=device)  # takes the same place
        torch.cuda.synchronize()
        assert (going.result == value).all()
