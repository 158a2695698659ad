"""Whole blocks that lose to their original code run as they were, and nothing else changes."""

from __future__ import annotations

import copy
import multiprocessing
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from fusewright import explain, optimize, restore
from fusewright.compiler import block_races
from fusewright.compiler.block_races import EAGER, OURS, TIMING
from fusewright.kernels import choice
from fusewright.memory.meter import Meter
from fusewright.passes.layer_norm import LayerNorm
from fusewright.passes.rms_norm import RMSNorm

from ..kernels.clocks import Clock, own_choices

IDS = torch.arange(22).reshape(2, 11)
CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=64,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _racing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    with own_choices(tmp_path):
        monkeypatch.setenv(choice.VARIABLE, "raced")
        yield


@contextmanager
def taking(ours: float, eager: float) -> Iterator[list[str]]:
    """Let a call of a block take so many seconds in either form; yields the forms called."""
    clock, calls, real = Clock(), list[str](), block_races._Race.step
    seconds = {OURS: ours, EAGER: eager}

    def step(self: Any, form: str) -> list[Tensor]:
        clock.now += seconds[form]
        calls.append(form)
        return real(self, form)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_races._Race, "step", step)
        patch.setattr(choice.race, "__defaults__", (clock,))
        yield calls


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**CONFIG.to_dict(), **changes})).train()


def fused(model: Any, **options: Any) -> Any:
    """Optimized with what is captured in no time."""
    return optimize(model, **{"passes": (RMSNorm(),), "verify": "off", **options})


def train(model: Any, ids: Tensor = IDS) -> Tensor:
    """A step of its blocks alone."""
    called = next(m for m in model.modules() if isinstance(m, (DDP, LlamaModel)))
    states: Tensor = called(input_ids=ids, use_cache=False)[0]
    states.square().sum().backward()
    return states.detach()


def is_fused(model: nn.Module) -> bool:
    """Whether its blocks run their graphs."""
    sites = explain(model).sites
    return any(".layers." in s.module and s.status == "rewritten" for s in sites)


def as_they_were(model: nn.Module) -> list[str]:
    return [text for _, _, text in explain(model).remarks() if "it is faster so" in text]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def raced() -> list[choice.Choice]:
    return [c for c in choice.choices() if c.question.startswith("LlamaDecoderLayer")]


def test_a_block_that_loses_runs_as_it_was_and_says_why() -> None:
    plain = model()
    ours = fused(copy.deepcopy(plain))
    with taking(402e-6, 310e-6) as calls:
        train(ours)
        # both once to see what they keep and to compile, then in turns: once for both layers
        assert calls == [EAGER, OURS] + [OURS, EAGER] * TIMING.rounds
        train(ours)
        train(ours, IDS[:, :9])  # 18 tokens: the same bucket
        assert len(calls) == 2 + 2 * TIMING.rounds
    assert not is_fused(ours)
    (text,) = as_they_were(ours)
    assert text == (
        "model.layers.0 and 1 more: it is faster so: eager 310 us, ours 402 us, forward and "
        "backward for up to 32 tokens"
    )
    assert "raced: LlamaDecoderLayer of 32 for 32 tokens in float32" in str(explain(ours))
    # bit for bit what the original blocks give, between our final norm and loss
    other = fused(copy.deepcopy(plain))
    for layer in other.model.layers:
        restore(layer)
    for each in (ours, other):
        each.zero_grad()
    assert torch.equal(train(ours), train(other))
    for name, grad in gradients(ours).items():
        assert torch.equal(grad, other.get_parameter(name).grad), name


@pytest.mark.parametrize(
    "seconds", [(300e-6, 400e-6), (300e-6, 300e-6), (310e-6, 299e-6)], ids=["won", "tie", "margin"]
)
def test_ours_stays_where_it_is_as_fast(seconds: tuple[float, float]) -> None:
    ours = fused(model())
    with taking(*seconds):
        train(ours)
        train(ours)
    assert is_fused(ours)
    assert as_they_were(ours) == []
    assert [c.candidate for c in raced()] == [OURS]


def test_times_that_differ_by_less_than_noise_decide_nothing() -> None:
    ours, clock = fused(model()), Clock()
    taken = {OURS: iter([0, 400, 400, *[404] * 8]), EAGER: iter([0, 300, *[500] * 9])}
    real = block_races._Race.step

    def step(self: Any, form: str) -> list[Tensor]:
        clock.now += 1e-6 * next(taken[form], 600)
        return real(self, form)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_races._Race, "step", step)
        patch.setattr(choice.race, "__defaults__", (clock,))
        train(ours)
    (found,) = raced()
    assert found.microseconds == {OURS: pytest.approx(400), EAGER: pytest.approx(300)}
    assert found.candidate == OURS  # eager's 300 were luck: its next is 500


def test_a_race_leaves_nothing_behind() -> None:
    """Gradients, random numbers, buffers, numbers in modules, hooks."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen += 1
            return nn.functional.dropout(x, 0.5)

    def with_counters() -> Any:
        counted = model(attention_dropout=0.0)
        for layer in counted.model.layers:
            act = layer.mlp.act_fn
            layer.mlp.act_fn = nn.Sequential(act, Counting())
        return counted

    states = []
    plain, ours = with_counters(), fused(with_counters())
    seen: list[int] = []
    for each in (plain, ours):
        weight = each.model.layers[0].mlp.down_proj.weight
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(1))
        torch.manual_seed(1)
        random.seed(1)
        with taking(4e-4, 3e-4) as calls:
            train(each)
            train(each)
        counters = [m for m in each.modules() if isinstance(m, Counting)]
        counts = [(m.calls, m.seen.item()) for m in counters]
        states.append((counts, torch.get_rng_state(), random.random()))
    assert calls
    assert seen == [1] * 4
    assert states[0][0] == states[1][0] == [(2, 2.0)] * 2
    assert torch.equal(states[0][1], states[1][1])
    assert states[0][2] == states[1][2]
    assert not is_fused(ours)
    for name, grad in gradients(ours).items():
        torch.testing.assert_close(grad, plain.get_parameter(name).grad, msg=name)


def test_a_bucket_is_of_sizes_casts_and_what_is_trained() -> None:
    ours = fused(get_peft_model(model(), LoraConfig(target_modules="all-linear", r=4)))
    with taking(4e-4, 3e-4):
        train(ours)
        train(ours, IDS.repeat(4, 1))
        with torch.autocast("cpu", torch.bfloat16):
            train(ours)
        for parameter in ours.parameters():
            parameter.requires_grad_(True)
        train(ours)
    names = [c.question for c in raced()]
    assert len(set(names)) == len(names) == 4
    assert [" for 32 tokens" in name for name in names] == [True, False, True, True]


def test_layers_of_other_kinds_are_raced_apart() -> None:
    ours, taken = fused(model(num_hidden_layers=3)), {OURS: 4e-4, EAGER: 3e-4}
    ours.model.layers[1].mlp.act_fn = nn.GELU()
    with taking(taken[OURS], taken[EAGER]):
        train(ours)
    assert len(raced()) == 2


def test_evaluation_follows_training() -> None:
    ours = fused(model())
    with torch.no_grad(), taking(4e-4, 3e-4) as calls:
        ours.model(input_ids=IDS, use_cache=False)
        assert calls == []
        with torch.enable_grad():
            train(ours)
        before = choice.choices()
        ours.model(input_ids=IDS, use_cache=False)
    assert choice.choices() == before
    assert as_they_were(ours)


@pytest.mark.parametrize("memory", ["min", "16GB"])
def test_blocks_whose_memory_is_planned_are_ours(memory: str) -> None:
    ours = fused(model(), memory=memory)
    with taking(4e-4, 3e-4) as calls:
        train(ours)
    assert calls == []
    assert is_fused(ours)


def test_blocks_in_a_checkpoint_are_ours() -> None:
    ours = fused(model())
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    with taking(4e-4, 3e-4) as calls:
        train(ours)
    assert calls == []
    assert is_fused(ours)


def test_original_blocks_that_would_keep_too_much_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "capacity", lambda meter: meter.used() + 100_000)
    ours = fused(model())
    with taking(4e-4, 3e-4) as calls:
        train(ours)
        train(ours)
    assert calls == [EAGER]
    assert is_fused(ours)
    (found,) = raced()
    assert (found.candidate, found.source) == (OURS, "fixed")
    assert "the original blocks would keep 0.00 GB" in found.refused["every other"]
    assert "raced: LlamaDecoderLayer" in str(explain(ours))


def test_no_memory_for_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, form: str) -> list[Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(block_races._Race, "step", full)
    ours = fused(model())
    train(ours)
    assert is_fused(ours)
    assert [c.candidate for c in raced()] == [OURS]


def test_a_plan_that_keeps_less_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = "fusewright.memory.planner.Planner"
    monkeypatch.setattr(f"{planner}.is_fastest", lambda planner, module: False)
    ours = fused(model(), memory="auto")
    with taking(4e-4, 3e-4):
        train(ours)
    assert is_fused(ours)
    assert "keep less than is fastest" in raced()[0].refused["every other"]


@pytest.mark.parametrize("how", ["hook", "packs", "fixed", "ops", "explained"])
def test_what_is_not_raced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how in ("fixed", "ops"):
        monkeypatch.setenv(choice.VARIABLE, how)
    ours = fused(model(attn_implementation="sdpa"))
    if how == "hook":
        for layer in ours.model.layers:
            layer.mlp.up_proj.weight.register_hook(lambda g: None)
    with taking(4e-4, 3e-4) as calls:
        if how == "explained":
            assert explain(ours).sites
        elif how == "packs":
            positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
            ours.model(input_ids=IDS[:1], position_ids=positions, use_cache=False)
        else:
            train(ours)
    assert calls == []
    assert is_fused(ours)


def test_what_explain_has_captured_is_forgotten_when_the_block_loses() -> None:
    ours = fused(model())
    assert is_fused(ours)
    with taking(4e-4, 3e-4):
        train(ours)
    assert not is_fused(ours)


def test_a_block_that_wins_somewhere_shows_both() -> None:
    ours = fused(model())
    with taking(3e-4, 4e-4):
        train(ours, IDS.repeat(4, 1))
    with taking(4e-4, 3e-4):
        train(ours)
    assert is_fused(ours)
    assert len(as_they_were(ours)) == 1


def test_restored_models_are_what_they_were() -> None:
    plain = model()
    before = {name: dict(vars(m)) for name, m in plain.named_modules()}
    fused(plain)
    with taking(4e-4, 3e-4):
        train(plain)
    restore(plain)
    assert {name: dict(vars(m)) for name, m in plain.named_modules()} == before
    other = model()
    plain.zero_grad()
    assert torch.equal(train(plain), train(other))
    for name, grad in gradients(plain).items():
        assert torch.equal(grad, other.get_parameter(name).grad)


def test_later_processes_and_resumed_runs_choose_the_same() -> None:
    first = fused(model())
    with taking(4e-4, 3e-4):
        train(first)
        want = train(first)
    saved = choice.records()
    for resumed in (False, True):
        choice._CHOICES.clear()
        if resumed:
            for path in choice.kept_folder().glob("choice-*"):
                path.unlink()
            choice.adopt(saved)
        again = fused(model())
        with taking(3e-4, 4e-4) as calls:
            train(again)
            assert torch.equal(train(again), want)
        assert calls == []
        assert len(as_they_were(again)) == 1
        assert raced()[0].source == ("resumed" if resumed else "kept")


def test_rules_and_codegen_have_races_of_their_own() -> None:
    for settings in ({}, {"passes": (LayerNorm(), RMSNorm())}, {"memory": "auto"}):
        with taking(4e-4, 3e-4):
            train(fused(model(), **settings))
    assert len(raced()) == 3


def test_a_block_that_cannot_be_captured_says_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(forward: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            torch._dynamo.graph_break()
            return forward(*args, **kwargs)

        return inner

    broken = model()
    for layer in broken.model.layers:
        layer.mlp.forward = breaking(layer.mlp.forward)
    ours = fused(broken)
    with taking(4e-4, 3e-4):
        loss = train(ours)
    torch.testing.assert_close(loss, train(model()))
    assert "could not be captured" in str(explain(ours))


def _rank(rank: int, folder: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own = Path(folder, str(rank))
    own.mkdir()
    with own_choices(own), pytest.MonkeyPatch.context() as patch:
        patch.setenv(choice.VARIABLE, "raced")
        wrapped = DDP(fused(model().model))
        with taking(3e-4 + rank * 1e-4, 4e-4 - rank * 1e-4):  # each would choose another one
            losses = [train(wrapped).item() for _ in range(2)]
        results.put((rank, raced()[0].candidate, is_fused(wrapped.module), losses))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without distributed")
def test_ranks_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, str(tmp_path), results)) for r in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=240)[1:] for _ in ranks]
    for process in ranks:
        process.join()
    assert found[0] == found[1]


def test_checkpointed_functions_around_a_block_race_nothing() -> None:
    ours = fused(model())
    layer, x = ours.model.layers[0], torch.randn(2, 11, 32, requires_grad=True)
    rotary = ours.model.rotary_emb(x, torch.arange(11)[None])
    with taking(4e-4, 3e-4) as calls:
        checkpoint(
            lambda x: layer(x, position_embeddings=rotary), x, use_reentrant=True
        ).sum().backward()
    assert calls == []
