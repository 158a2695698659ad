"""Loops of others, audited: what is right passes and stays what it was, what is wrong is named."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from fusewright import AuditCallback, optimize, watch
from fusewright.auditing import watch as watching
from fusewright.auditing.findings import Audit
from fusewright.auditing.in_force import Rates
from fusewright.auditing.micro_batches import StepShape, judge, judge_logged
from fusewright.auditing.movement import Movement
from fusewright.auditing.reference import step_bytes
from fusewright.memory.budget import Budget
from tests.explained import explain

from ..train.conftest import make_model, make_tokenizer


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1,
        )
    )  # fmt: skip


def _lora(model: nn.Module, dropout: float = 0.0) -> Any:
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear"))


def _batches(number: int) -> list[dict[str, Tensor]]:
    """Batches of two rows; every other one has a quarter of the trained tokens."""
    torch.manual_seed(1)
    result = []
    for i in range(number):
        ids = torch.randint(3, 64, (2, 24))
        ids[:, -1] = 2  # the end of a text
        labels = ids.clone()
        labels[:, : 18 if i % 2 else 0] = -100
        result.append({"input_ids": ids, "labels": labels})
    return result


def _verdicts(audit: Audit | None) -> dict[str, str]:
    assert audit is not None
    return {f.check: f.verdict for f in audit.findings}


def _failed(audit: Audit | None) -> set[str]:
    return {check for check, verdict in _verdicts(audit).items() if verdict == "fail"}


# --- verdicts from figures ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "step", "failed"),
    [
        ([(10, 1 / 40), (30, 1 / 40)], StepShape(2, 40), None),
        ([(10, 1 / 10), (30, 1 / 30)], StepShape(2, 40), "accumulation-scale"),  # means, added up
        ([(10, 1 / 20), (30, 1 / 60)], StepShape(2, 40), "accumulation-scale"),  # means, averaged
        ([(10, 1 / 20), (30, 1 / 60)], StepShape(2, 40, average="batches"), None),
        (
            [(20, 1 / 20), (20, 1 / 20)],
            StepShape(2, 40),
            "accumulation-scale",
        ),  # not divided by two
        ([(20, 1 / 80), (20, 1 / 80)], StepShape(2, 40), "accumulation-scale"),  # divided twice
        ([(40, 1.0)], StepShape(1, 40), "loss-scale"),  # summed over tokens
        ([(40, 2 / 80)], StepShape(1, 80, processes=2), None),
        ([(40, 1 / 80)], StepShape(1, 80, processes=2), "loss-scale"),  # divided by processes twice
    ],
)
def test_the_weight_of_a_token_names_the_fault(
    measured: list[tuple[int, float]], step: StepShape, failed: str | None
) -> None:
    found = judge(measured, step)
    assert {f.check for f in found if f.verdict == "fail"} == ({failed} - {None})
    assert {f.check for f in found} == {"accumulation-scale", "loss-scale"}


def test_a_gradient_scaler_is_no_fault() -> None:
    found = judge([(10, 65536 / 40), (30, 65536 / 40)], StepShape(2, 40))
    assert [f.verdict for f in found] == ["skipped", "skipped"]
    assert "scaler" in found[0].reason


def test_a_logged_loss_that_is_not_the_loss_fails() -> None:
    assert judge_logged(2.0, 2.01) is None
    assert judge_logged(2.0, None) is None
    finding = judge_logged(8.0, 2.0)
    assert finding is not None
    assert finding.verdict == "fail"
    assert "4 times" in finding.reason


def test_rates_are_compared_with_the_schedule() -> None:
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = AdamW([parameter], lr=0.1)
    rates = Rates([optimizer])
    rates.note()
    assert rates.finding([0.1, 0.05], "linear").verdict == "pass"
    early = rates.finding([0.0, 0.05, 0.1], "linear", warmup=2)
    assert early.verdict == "fail"
    assert "no warmup" in early.reason
    rates.note()
    late = rates.finding([0.1, 0.05], "linear")
    assert late.verdict == "fail"
    assert "does not decay" in late.reason


def test_weights_too_coarse_for_their_updates_are_no_fault_of_the_loop() -> None:
    """A norm of ones in bfloat16 cannot hold an update of 1e-4; a matrix of small weights can."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.RMSNorm(8)).to(torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    movement = Movement(model, [optimizer])
    model(torch.ones(4, 8, dtype=torch.bfloat16)).float().square().mean().backward()
    movement.before_step({}, 1e-4)
    optimizer.step()
    movement.after_step()
    (finding,) = movement.findings(False, True)
    assert finding.verdict == "pass"
    assert finding.figures["rounded_away"] == 1
    assert finding.figures["moved"] == 1


# --- loops ----------------------------------------------------------------------------------------


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        self.rows = [
            {name: value[i] for name, value in batch.items()}
            for batch in _batches(12)
            for i in range(2)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def _train(
    folder: Path, model: Any, callbacks: list[Any], kind: type[Trainer] = Trainer, **keys: Any
) -> Trainer:
    optimizers = keys.pop("optimizers", (None, None))
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, seed=3, **keys,
    )  # fmt: skip
    trainer = kind(
        model, arguments, train_dataset=_Rows(), callbacks=callbacks, optimizers=optimizers
    )
    trainer.train()
    return trainer


@pytest.mark.long
@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_passes_and_computes_what_it_would_without(tmp_path: Path, bf16: bool) -> None:
    keys: dict[str, Any] = {
        "bf16": bf16, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
        "warmup_steps": 1, "lr_scheduler_type": "cosine", "max_grad_norm": 0.1,
    }  # fmt: skip
    callback = AuditCallback(report=lambda audit: None)
    states = []
    for callbacks in ([callback], []):
        trainer = _train(tmp_path, _lora(_model(), 0.1), list(callbacks), **keys)
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        states.append((losses, torch.get_rng_state(), trainer.model.state_dict()))
    (losses, numbers, weights), (plain_losses, plain_numbers, plain_weights) = states
    assert losses == plain_losses
    assert torch.equal(numbers, plain_numbers)
    assert all(torch.equal(value, plain_weights[name]) for name, value in weights.items())
    verdicts = _verdicts(callback.audit)
    assert not _failed(callback.audit), callback.audit
    for check in ("accumulation-scale", "loss-scale", "checkpointing", "dropout", "warmup",
                  "weights-moved", "trainable-set"):  # fmt: skip
        assert verdicts[check] == "pass", callback.audit
    assert not trainer.model._forward_pre_hooks


@pytest.mark.long
def test_a_routers_loss_is_none_of_the_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
            output_router_logits=True, router_aux_loss_coef=0.1,
        )
    )  # fmt: skip
    callback = AuditCallback(report=lambda audit: None)
    _train(tmp_path, model, [callback], gradient_accumulation_steps=4)
    assert not _failed(callback.audit), callback.audit


def test_what_an_audit_reads_of_the_logits_is_no_read_of_the_loop() -> None:
    model = optimize(_model(), codegen="eager")
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with watch(model, optimizer) as w:
        model(**_batches(1)[0]).loss.backward()
        optimizer.step()
    assert _verdicts(w.audit)["loss-value"] == "pass", w.audit  # it has called the model
    assert "real tensor" not in str(explain(model))
    model(input_ids=_batches(1)[0]["input_ids"]).logits.sin()
    assert "made as a real tensor by sin at auditing/test_watch.py" in str(explain(model))


def test_the_scale_of_a_loss_is_unknown_without_a_plain_model() -> None:
    class Mine(LlamaForCausalLM):
        """A class without a source of transformers, whose loss is a sum."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.loss = 20 * outputs.loss
            return outputs

    model = _model()
    model.__class__ = Mine
    model.config.intermediate_size = 40  # no plain model can be built by that
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with watch(model, optimizer) as w:
        model(**_batches(1)[0]).loss.backward()
        optimizer.step()
    assert _verdicts(w.audit)["loss-scale"] == "skipped"


def test_a_loss_that_is_a_sum_is_named_once() -> None:
    class Summed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.loss = outputs.loss * (kwargs["labels"][:, 1:] != -100).sum()
            outputs.logits = None  # as fused losses leave them out
            return outputs

    model: Any = _model()
    model.__class__ = Summed
    optimizer = AdamW(model.parameters(), lr=1e-2)
    with watch(model, optimizer) as w:
        for given in _batches(2):
            model(**given).loss.backward()
        optimizer.step()
    assert _verdicts(w.audit)["loss-scale"] == "fail", w.audit
    assert _verdicts(w.audit)["accumulation-scale"] == "skipped", w.audit


@pytest.mark.long
@pytest.mark.parametrize(("kind", "packing"), [("SFT", False), ("SFT", True), ("DPO", False)])
def test_a_trainer_of_trl_passes(tmp_path: Path, kind: str, packing: bool) -> None:
    trl = pytest.importorskip("trl")
    rows = [
        {"prompt": f"What is {i}?", **(
            {"completion": f"It is {i}, " * (1 + i % 3) + "<|im_end|>"} if kind == "SFT"
            else {"chosen": f"It is {i}.", "rejected": "No."}
        )}
        for i in range(24)
    ]  # fmt: skip
    more: dict[str, Any] = {"packing": True, "max_length": 64} if packing else {}
    arguments = getattr(trl, f"{kind}Config")(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", **more,
    )  # fmt: skip
    callback = AuditCallback(report=lambda audit: None)
    trainer = getattr(trl, f"{kind}Trainer")(
        make_model(max_position_embeddings=512), args=arguments, callbacks=[callback],
        train_dataset=Dataset.from_list(rows), processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1),
    )  # fmt: skip
    trainer.train()
    assert not _failed(callback.audit), callback.audit
    assert {"weights-moved", "trainable-set", "dropout"} <= {
        check for check, verdict in _verdicts(callback.audit).items() if verdict == "pass"
    }


class _Summed(Trainer):
    """Adds up the means of its batches."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.loss_is_scaled_for_ga = True
        return model(**inputs).loss


@pytest.mark.long
@pytest.mark.parametrize("fault", ["weights-moved", "accumulation-scale", "warmup", "dropout"])
def test_a_fault_of_a_trainer_is_named(tmp_path: Path, fault: str) -> None:
    model: Any = _model()
    keys: dict[str, Any] = {}
    kind: type[Trainer] = Trainer
    if fault == "weights-moved":
        keys["optimizers"] = (AdamW(model.parameters(), lr=1e-2), None)
        model = _lora(model)
    elif fault == "accumulation-scale":
        kind, keys["gradient_accumulation_steps"] = _Summed, 2
    elif fault == "warmup":
        optimizer = AdamW(model.parameters(), lr=1e-2)
        keys |= {"optimizers": (optimizer, LambdaLR(optimizer, lambda _: 1.0)), "warmup_steps": 2}
    else:
        model = _lora(model, 0.1)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.forward = lambda x: x  # type: ignore[method-assign,assignment]
    callback = AuditCallback(report=lambda audit: None)
    _train(tmp_path, model, [callback], kind, **keys)
    assert fault in _failed(callback.audit), callback.audit


def _loop(model: Any, optimizer: Any, means: bool, clear: str) -> None:
    batches = _batches(6)
    for step in range(3):
        parts = batches[2 * step : 2 * step + 2]
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in parts]
        for batch, count in zip(parts, counts, strict=True):
            if clear == "batch":
                optimizer.zero_grad()
            (model(**batch).loss * (0.5 if means else count / sum(counts))).backward()
        optimizer.step()
        if clear == "step":
            optimizer.zero_grad()


@pytest.mark.long
@pytest.mark.parametrize(
    ("means", "clear", "average", "failed"),
    [
        (False, "step", "tokens", set()),
        (True, "step", "batches", set()),
        (True, "step", "tokens", {"accumulation-scale"}),
        (False, "batch", "tokens", {"accumulation-scale"}),
        (False, "never", "tokens", {"accumulation-scale"}),
    ],
)
def test_a_loop_by_hand(means: bool, clear: str, average: Any, failed: set[str]) -> None:
    model = _model().train()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    with watch(model, optimizer, average=average) as watched:
        _loop(model, optimizer, means, clear)
    assert _failed(watched.audit) == failed, watched.audit
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.long
def test_a_frozen_weight_that_is_written_is_named() -> None:
    model = _lora(_model()).train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with watch(model, optimizer) as watched:
        _loop(model, optimizer, False, "step")
        frozen = model.get_parameter("base_model.model.model.norm.weight")
        with torch.no_grad():
            frozen[3] += 1e-3
    (finding,) = [f for f in watched.audit.failed if f.check == "trainable-set"]
    assert finding.subjects == ("base_model.model.model.norm.weight",)


@contextlib.contextmanager
def _alone(port: int, rank: int) -> Iterator[None]:
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _shard_and_train(rank: int, port: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    with _alone(port, rank):
        found: list[Any] = []
        for scale in (2.0, 1.0, None):  # right; the mean of all processes once more; unaudited
            model: Any = _model().train()
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
            optimizer = AdamW(model.parameters(), lr=1e-3)
            loop = None if scale is None else watch(model, optimizer)
            batches = _batches(4)[rank::2]  # the other process has another number of tokens
            for batch in batches:
                count = (batch["labels"][:, 1:] != -100).sum()
                whole = count.clone()
                torch.distributed.all_reduce(whole)
                loss = model(**batch).loss * (scale or 2.0) * count / whole
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if loop is not None:
                audit = loop.finish()
                found.append({f.check: f.verdict for f in audit.findings})
            found.append([p.full_tensor() for p in model.parameters()])
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_sharded_over_two_processes(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_shard_and_train, (port, str(tmp_path)), nprocs=2)
    right, weights, wrong, _, plain = torch.load(tmp_path / "0.pt", weights_only=False)
    assert "fail" not in right.values(), right
    for check in ("accumulation-scale", "loss-scale", "weights-moved", "checkpointing"):
        assert right[check] == "pass"
    assert right["gradient-value"] == "skipped"
    assert wrong["loss-scale"] == "fail"
    assert all(map(torch.equal, weights, plain))
    assert torch.load(tmp_path / "1.pt", weights_only=False)[0] == right


def test_what_a_plan_of_memory_leaves_to_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the plain model run again where memory is to be least, or too short otherwise."""
    model, used = make_model(), 1 << 30
    monkeypatch.setattr(watching.Meter, "used", lambda meter: used)
    needed = {
        recompute: step_bytes(model, torch.float64, 64, recompute) for recompute in (False, True)
    }
    between = used + sum(needed.values()) // 2
    for budget, found in {
        Budget("min", "min"): (64, True),
        Budget("speed", "speed"): (64, False),
        Budget("enough", "bytes", used + needed[False]): (64, False),
        Budget("short", "bytes", between): (64, True),
        Budget("too short", "bytes", used + needed[True] - 1): (0, True),
    }.items():
        planner = SimpleNamespace(budget=budget)
        monkeypatch.setattr(watching, "planner_of", lambda model, planner=planner: planner)
        tokens, recompute, why = watching._tokens_that_fit(model, 64, None)
        assert ((tokens, recompute), bool(why)) == (found, not tokens), budget
