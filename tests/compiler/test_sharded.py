"""``optimize`` before and after each wrapper that shards or copies a model for two processes.

By default FSDP1 and FSDP2 under a policy for bf16 are tried; ``pytest -m slow`` tries all.
"""

from __future__ import annotations

import datetime
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from fusewright import optimize, restore
from fusewright.compiler.logits import sharded
from fusewright.compiler.logits.lazy_logits import LazyLogits
from tests.explained import explain

from ..train.processes.ranks import free_port, run_bare
from .test_processes import RANKS, _model, _rows

Wrap = Callable[[Any], nn.Module]
RULES = {"linear_cross_entropy": 1, "rms_norm": 5, "mlp_block": 2}
DTYPES = {"FSDP2, bf16": torch.bfloat16}


def _ddp(**options: Any) -> Wrap:
    return lambda model: nn.parallel.DistributedDataParallel(model, **options)


def _fsdp1(own: bool) -> Wrap:
    def wrap(model: Any) -> nn.Module:
        kinds = {type(layer) for layer in _base(model).model.layers}
        return FullyShardedDataParallel(
            model, auto_wrap_policy=ModuleWrapPolicy(kinds), use_orig_params=own,
            device_id=torch.device("cpu"),
        )  # fmt: skip

    return wrap


def _fsdp2(**options: Any) -> Wrap:
    """With the norm and the head as its last unit, as accelerate wraps it."""

    def wrap(model: Any) -> nn.Module:
        base = _base(model)
        for layer in base.model.layers:
            fully_shard(layer, **options)
        fully_shard([base.model.norm, base.lm_head], **options)
        return fully_shard(model, **options)

    return wrap


def _base(model: Any) -> Any:
    return model.base_model.model if hasattr(model, "peft_config") else model


WRAPPERS: dict[str, Wrap] = {
    "DDP, static": _ddp(static_graph=True),
    "DDP, unused": _ddp(find_unused_parameters=True),
    "FSDP1": _fsdp1(True),
    "FSDP1, flat": _fsdp1(False),
    "FSDP2": _fsdp2(reshard_after_forward=True),
    "FSDP2, offloaded": _fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "FSDP2, bf16": _fsdp2(mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32)),
}


def _steps(call: nn.Module, rank: int) -> tuple[list[Tensor], Any]:
    """The losses of three steps with their gradients, and the outputs of the last one."""
    found, outputs = [], None
    for i in range(3):
        call.zero_grad()
        ids = _rows(i).chunk(RANKS)[rank]
        outputs = call(input_ids=ids, labels=ids)
        outputs.loss.backward()
        found.append(outputs.loss.detach())
    return [*found, *_gradients(call)], outputs


def _gradients(call: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in call.parameters() if p.grad is not None and p.grad.numel()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads]


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest one, relative to the largest number of its tensor."""
    assert len(one) == len(other)
    return max(
        float((a - b).abs().max() / (b.abs().max() + 1e-9)) for a, b in zip(one, other, strict=True)
    )


def _read(logits: Any) -> Any:
    try:
        return logits.detach().double().clone()
    except RuntimeError as error:
        return str(error)


def _made(name: str, lora: bool) -> Any:
    model = _model(lora)
    if lora and name == "FSDP1, flat":  # a flat parameter is trained as a whole
        model.requires_grad_(True)
    return model


def _try(name: str, lora: bool, rank: int) -> dict[str, Any]:
    wrap = WRAPPERS[name]
    eager = wrap(_made(name, lora))
    expected, outputs = _steps(eager, rank)
    logits = outputs.logits.detach().double()
    # what bf16 itself loses
    exact = _steps(WRAPPERS["FSDP2"](_made(name, lora)), rank)[0] if name in DTYPES else expected
    found: dict[str, Any] = {}
    for order in ("before", "after"):
        torch._dynamo.reset()
        model = _made(name, lora)
        if order == "before":
            optimize(model, codegen="eager")
        call = wrap(model)
        if order == "after":
            optimize(call, codegen="eager")
        mine, outputs = _steps(call, rank)
        lazy = isinstance(outputs.logits, LazyLogits) and outputs.logits.is_pending
        read, report = _read(outputs.logits), explain(call)
        restore(call)
        again, plain = _steps(call, rank)
        found[order] = {
            "error": _difference(mine, exact), "of eager": _difference(expected, exact),
            "lazy": lazy, "rewrites": report.by_rule(),
            "reasons": [b.reason for b in report.bypasses],
            "logits": read if isinstance(read, str) else float((read - logits).abs().max()),
            "restored": _difference(again, expected) == 0 and type(plain.logits) is Tensor,
        }  # fmt: skip
    return found


def _rank(rank: int, port: int, folder: str, work: Callable[..., Any], given: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=limit)
    found = work(*given, rank)
    pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _run(folder: pathlib.Path, work: Callable[..., Any], *given: Any) -> list[Any]:
    run_bare(_rank, free_port(), str(folder), work, given, size=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


USUAL = [("FSDP2, bf16", True), ("FSDP1", False)]
"""With adapters the root is not what computes the loss."""
CASES = [
    *USUAL,
    *(
        pytest.param(name, lora, marks=pytest.mark.slow)
        for name in WRAPPERS
        for lora in (False, True)
        if (name, lora) not in USUAL
    ),
]


@pytest.mark.long("FSDP1-False", "FSDP2, bf16-True")
@pytest.mark.parametrize(("name", "lora"), CASES)
def test_before_and_after_a_wrapper(name: str, lora: bool, tmp_path: pathlib.Path) -> None:
    for ranks in _run(tmp_path, _try, name, lora):
        for order, found in ranks.items():
            assert found["error"] <= 1.5 * found["of eager"] + 1e-5, order
            assert found["restored"], order
            if name == "FSDP1, flat":  # its parameters are no parameters of the modules
                assert found["rewrites"] == {}, order
                assert any("FSDP with use_orig_params=False" in r for r in found["reasons"]), order
                continue
            assert found["rewrites"].items() >= RULES.items(), order
            assert found["lazy"], order
            if name == "FSDP1":
                assert "were not read before the parameters" in found["logits"], order
            else:
                assert found["logits"] < (2e-2 if name in DTYPES else 1e-5), order


def _with_experts() -> Any:
    import transformers as tf
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = tf.Qwen3MoeConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, intermediate_size=48, use_cache=False,
    )  # fmt: skip
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    chosen = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=stacks)
    model = get_peft_model(tf.Qwen3MoeForCausalLM(config), chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def _adapted_stacks(name: str, rank: int) -> list[Any]:
    """The gradients of one process with all rows, and of two with optimized models."""
    plain = _with_experts()
    ids = _rows(0)
    plain(input_ids=ids, labels=ids).loss.backward()
    call = WRAPPERS[name](optimize(_with_experts(), codegen="eager"))
    mine = ids.chunk(RANKS)[rank]
    call(input_ids=mine, labels=mine).loss.backward()
    named = {n.removeprefix("module."): p.grad for n, p in call.named_parameters()}
    pairs = [(p.grad, named[n]) for n, p in plain.named_parameters() if p.grad is not None]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for _, g in pairs]
    return [_difference(whole, [g for g, _ in pairs]), explain(call).by_rule()]


@pytest.mark.long
@pytest.mark.parametrize("name", ["DDP, unused", "FSDP2"])
def test_adapters_of_stacked_experts(name: str, tmp_path: pathlib.Path) -> None:
    for difference, rewrites in _run(tmp_path, _adapted_stacks, name):
        assert difference < 1e-4
        assert rewrites["moe_experts"] == 2


def _read_late(rank: int) -> list[Any]:
    """Logits of the step before, whose head was trained since: none are better than wrong ones."""
    found = []
    for wrap in (_fsdp1(True), _fsdp2()):
        call = wrap(optimize(_model(False), codegen="eager"))
        optimizer = torch.optim.SGD(call.parameters(), lr=0.1)
        outputs = []
        for i in range(2):
            ids = _rows(i).chunk(RANKS)[rank]
            outputs.append(call(input_ids=ids, labels=ids))
            if not i:
                outputs[0].loss.backward()
                optimizer.step()
        found.append([str(_read(outputs[0].logits)), isinstance(_read(outputs[1].logits), Tensor)])
    return found


@pytest.mark.long
def test_logits_of_weights_that_were_gathered_anew(tmp_path: pathlib.Path) -> None:
    for (old, is_read), (old2, is_read2) in _run(tmp_path, _read_late):
        for said in (old, old2):
            assert "these logits were not read before the weights that make them" in said
        assert is_read
        assert is_read2


def _read_alone(rank: int) -> list[Any]:
    """Three steps: the logits of the first are read on rank 0 alone, or there first."""
    sharded._PATIENCE = 1.0
    call = _fsdp2()(optimize(_model(False), codegen="eager"))
    outputs = []
    for i in range(3):
        ids = _rows(i).chunk(RANKS)[rank]
        outputs.append(call(input_ids=ids, labels=ids))
        outputs[-1].loss.backward()
    begun, alone = time.monotonic(), ""
    if rank == 0:
        alone = _read(outputs[0].logits)
    waited = time.monotonic() - begun
    dist.barrier()
    late = "" if rank == 0 else _read(outputs[0].logits)
    both = _read(outputs[2].logits)
    again = _read(outputs[2].logits) if rank == 0 else ""  # which the others do not do
    dist.barrier()
    return [alone or late, waited, both if isinstance(both, str) else list(both.shape), str(again)]


@pytest.mark.slow
def test_a_process_that_alone_reads_released_logits_says_so(tmp_path: pathlib.Path) -> None:
    ranks = _run(tmp_path, _read_alone)
    for said, waited, both, _ in ranks:
        assert "not by every process" in said
        assert waited < 20
        assert both == [2, 15, 128]
    assert ranks[0][3].startswith("tensor(")  # what was read once is kept
