"""Under wrappers for several processes: one process's losses and rewrites, and lazy logits."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fusewright import optimize
from fusewright.compiler.logits.lazy_logits import LazyLogits
from tests.explained import explain

from ..train.processes.ranks import free_port, run_bare

RANKS, ROWS, LENGTHS, VOCABULARY = 2, 4, (12, 9, 15), 128
Step = Callable[[Tensor], Any]


def _model(lora: bool) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    return get_peft_model(made, LoraConfig(r=4, target_modules="all-linear")) if lora else made


def _rows(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (ROWS, LENGTHS[step]), generator=generator)


def _stepping(call: nn.Module, model: nn.Module) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)

    def step(ids: Tensor) -> Any:
        outputs = call(input_ids=ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return outputs

    return step


def _ddp(**options: Any) -> Callable[[Any], Step]:
    return lambda m: _stepping(nn.parallel.DistributedDataParallel(m, **options), m)


def _fsdp(last: str) -> Callable[[Any], Step]:
    """Sharded as accelerate does it: each block, then what is left, and the root."""

    def wrap(model: Any) -> Step:
        base = model.base_model.model if hasattr(model, "peft_config") else model
        for layer in base.model.layers:
            if last == "parts of a block":
                fully_shard(layer.mlp)
            fully_shard(layer)
        if last == "norm and head":
            fully_shard([base.model.norm, base.lm_head], reshard_after_forward=False)
        elif last == "head":
            fully_shard(base.lm_head)
        fully_shard(model)
        return _stepping(model, model)

    return wrap


def _zero(model: Any) -> Step:
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(trained, lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": ROWS // RANKS,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        },
    )

    def step(ids: Tensor) -> Any:
        outputs = engine(input_ids=ids, labels=ids)
        engine.backward(outputs.loss)
        engine.step()
        return outputs

    return step


WRAPPERS: dict[str, Callable[[Any], Step]] = {
    "DDP, static": _ddp(static_graph=True),
    "DDP, unused": _ddp(find_unused_parameters=True),
    "FSDP2, root": _fsdp("root"),
    "FSDP2, norm and head": _fsdp("norm and head"),
    "FSDP2, head": _fsdp("head"),
    "FSDP2, parts of a block": _fsdp("parts of a block"),
    "ZeRO-3": _zero,
}


def _losses(step: Step, rank: int) -> tuple[list[float], Any]:
    """Of three steps, and the outputs of the last one."""
    losses = []
    for i in range(3):
        outputs = step(_rows(i).chunk(RANKS)[rank])
        loss = outputs.loss.detach().clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / RANKS)
    return losses, outputs


def _try(wrap: Callable[[Any], Step], lora: bool, rank: int) -> dict[str, Any]:
    """With adapters ``optimize`` comes before the wrapper, else after it."""
    torch._dynamo.reset()
    model = _model(lora)
    if lora:
        model = optimize(model, codegen="eager")
    step = wrap(model)
    if not lora:
        optimize(model, codegen="eager")
    losses, outputs = _losses(step, rank)
    logits = outputs.logits
    lazy = isinstance(logits, LazyLogits) and logits.is_pending
    found = {"losses": losses, "rewrites": explain(model).by_rule(), "lazy": lazy}
    # a head that is trained has changed since; a frozen one is gathered once more
    return {**found, "logits": logits.detach().double().sum().item()} if lora else found


def _one_process(lora: bool) -> dict[str, Any]:
    """The same in eager mode, with all rows."""
    model = _model(lora)
    step = _stepping(model, model)
    made = [step(_rows(i)) for i in range(3)]
    logits = made[-1].logits.detach().double().chunk(RANKS)
    return {"losses": [m.loss.item() for m in made], "logits": [float(z.sum()) for z in logits]}


def _rank(rank: int, port: int, names: list[str], folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS, timeout=limit)
    found = {
        f"{name}, {'LoRA' if lora else 'full'}": _try(WRAPPERS[name], lora, rank)
        for name in names
        for lora in (True, False)
    }
    # DeepSpeed's own steps of a whole model are not those of one process, in eager mode either
    if names == ["ZeRO-3"]:
        for name, run in found.items():
            run["eager"], _ = _losses(_zero(_model("LoRA" in name)), rank)
    pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _run(folder: pathlib.Path, *names: str) -> list[dict[str, dict[str, Any]]]:
    run_bare(_rank, free_port(), list(names), str(folder), size=RANKS)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def _assert_right(ranks: list[dict[str, dict[str, Any]]]) -> None:
    expected = {"LoRA": _one_process(True), "full": _one_process(False)}
    for rank, runs in enumerate(ranks):
        for name, found in runs.items():
            method = name.rsplit(", ", 1)[1]
            losses = found.get("eager", expected[method]["losses"])
            assert found["losses"] == pytest.approx(losses, rel=1e-5), name
            assert found["lazy"], name
            if "logits" in found:
                logits = expected[method]["logits"][rank]
                assert found["logits"] == pytest.approx(logits, rel=1e-4), name
            rewrites = found["rewrites"]
            assert rewrites["linear_cross_entropy"] == 1, name
            assert rewrites["rms_norm"] == 5, name
            assert rewrites["mlp_block"] == 2, name
            assert rewrites.get("qkv_block", 0) == (2 if method == "LoRA" else 0), name


USUAL = ("DDP, static", "FSDP2, norm and head")


@pytest.mark.long("DDP, static", "FSDP2, norm and head")
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow])
    for name in WRAPPERS if name != "ZeRO-3"
])  # fmt: skip
def test_losses_and_rewrites_of_several_processes(name: str, tmp_path: pathlib.Path) -> None:
    _assert_right(_run(tmp_path, name))


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
def test_losses_and_rewrites_of_zero_3(tmp_path: pathlib.Path) -> None:
    _assert_right(_run(tmp_path, "ZeRO-3"))
