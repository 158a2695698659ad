"""Whole blocks that lose to their original code run as they were, and nothing else changes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.utils.checkpoint import checkpoint

from fusewright import explain, optimize, restore
from fusewright.compiler import block_races
from fusewright.compiler.block_races import EAGER, OURS, TIMING
from fusewright.compiler.watch import Watches
from fusewright.kernels import choice
from fusewright.memory.meter import Meter
from fusewright.memory.planner import Planner
from fusewright.passes.layer_norm import LayerNorm
from fusewright.passes.rms_norm import RMSNorm

from ..kernels.clocks import Clock, own_choices

IDS = torch.arange(22).reshape(2, 11)
SLOW, FAST = 402e-6, 310e-6


class Block(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.weight, self.linear, self.p = nn.Parameter(torch.rand(32)), nn.Linear(32, 32), p
        self.register_buffer("calls", torch.zeros(()))
        self.counts, self.count, self.breaks = False, 0, False

    def forward(self, x: Tensor, position_ids: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.counts:
            self.count += 1
        if self.breaks:
            torch._dynamo.graph_break()
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight
        return x + nn.functional.dropout(self.linear(h), self.p, self.training)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(32)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Model(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.layers = nn.ModuleList([Block() for _ in range(layers)])
        self.reentrant: bool | None = None
        self.norm: nn.Module = nn.Sequential()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor]:
        x, positions = self.embedding(input_ids), kwargs.get("position_ids")
        for layer in self.layers:
            if self.reentrant is not None:
                x = checkpoint(layer, x, use_reentrant=self.reentrant)
            else:
                x = layer(x, position_ids=positions)
        return (self.norm(x),)


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


def model(**changes: Any) -> Model:
    torch.manual_seed(0)
    return Model(**changes).train()


def fused(model: nn.Module, **options: Any) -> Any:
    return optimize(model, **{"passes": (RMSNorm(),), "verify": "off", **options})


def train(model: nn.Module, ids: Tensor = IDS, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    states: Tensor = model(input_ids=ids, use_cache=False)[0]
    states.square().sum().backward()
    return states.detach()


def is_fused(model: nn.Module) -> bool:
    """Whether its blocks run their graphs."""
    sites = explain(model).sites
    return any("layers." in s.module and s.status == "rewritten" for s in sites)


def as_they_were(model: nn.Module) -> list[str]:
    return [text for _, _, text in explain(model).remarks() if "it is faster so" in text]


def raced(of: str = "Block") -> list[choice.Choice]:
    return [c for c in choice.choices() if c.question.startswith(of)]


def require_equal_gradients(model: nn.Module, other: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, other.get_parameter(name).grad), name


def test_a_block_that_loses_runs_as_it_was_and_says_why() -> None:
    plain = model()
    ours = fused(copy.deepcopy(plain))
    with taking(SLOW, FAST) as calls:
        train(ours)
        # both once to see what they keep and to compile, then in turns: once for both layers
        assert calls == [EAGER, OURS] + [OURS, EAGER] * TIMING.rounds
        train(ours)
        train(ours, IDS[:, :9])  # 18 tokens: the same bucket
        assert len(calls) == 2 + 2 * TIMING.rounds
    assert not is_fused(ours)
    assert as_they_were(ours) == [
        "layers.0 and 1 more: it is faster so: eager 310 us, ours 402 us, forward and backward for "
        "up to 32 tokens"
    ]
    assert "raced: Block of 32 for 32 tokens in float32" in str(explain(ours))
    assert explain(ours).memory == ""  # no block keeps what was planned
    ours.zero_grad()
    assert torch.equal(train(ours), train(plain))
    require_equal_gradients(ours, plain)


@pytest.mark.parametrize(
    "seconds", [(FAST, SLOW), (FAST, FAST), (1.04 * FAST, FAST)], ids=["won", "tie", "margin"]
)
def test_ours_stays_where_it_is_as_fast(seconds: tuple[float, float]) -> None:
    ours = fused(model())
    with taking(*seconds):
        train(ours)
        train(ours)
    assert is_fused(ours)
    assert as_they_were(ours) == []
    assert [c.candidate for c in raced()] == [OURS]


def test_times_that_differ_by_less_than_noise_decide_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, clock, real = fused(model()), Clock(), block_races._Race.step
    taken = {OURS: iter([0, 400, 400]), EAGER: iter([0, 300])}

    def step(self: Any, form: str) -> list[Tensor]:
        clock.now += 1e-6 * next(taken[form], 500)
        return real(self, form)

    monkeypatch.setattr(block_races._Race, "step", step)
    monkeypatch.setattr(choice.race, "__defaults__", (clock,))
    train(ours)
    (found,) = raced()
    assert found.microseconds == {OURS: pytest.approx(400), EAGER: pytest.approx(300)}
    assert found.candidate == OURS  # eager's 300 were luck: its next is 500


@pytest.mark.parametrize("seconds", [(SLOW, FAST), (FAST, SLOW)], ids=["lost", "won"])
def test_a_race_leaves_nothing_behind(seconds: tuple[float, float]) -> None:
    states = []
    for each in (model(), fused(model())):
        hooked: list[float] = []
        weight = each.layers[0].linear.weight
        weight.register_post_accumulate_grad_hook(lambda p, hooked=hooked: hooked.append(1.0))
        weight.register_hook(lambda g, hooked=hooked: hooked.append(round(float(g.norm()), 3)))
        random.seed(1)
        with taking(*seconds):
            outputs = [train(each), train(each, seed=2)]
            drawn = torch.rand(3)
        counts = [layer.calls.item() for layer in each.layers]
        states.append((outputs, drawn, counts, hooked, random.random(), each))
    (outputs, drawn, *plain, eager), (found, drew, *ours, optimized) = states
    assert raced()
    assert plain == ours
    assert torch.equal(drawn, drew)
    for a, b in zip(outputs, found, strict=True):
        torch.testing.assert_close(a, b)
    for name, parameter in optimized.named_parameters():
        torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad)


def test_the_first_block_is_raced_as_later_ones_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input needs no gradient below frozen embeddings, and that of all others does."""
    plain = model()
    plain.embedding.requires_grad_(False)
    found: dict[str, set[int]] = {OURS: set(), EAGER: set()}
    real = block_races._Race.step

    def step(self: Any, form: str) -> list[Tensor]:
        gradients = real(self, form)
        found[form].add(len(gradients))
        return gradients

    monkeypatch.setattr(block_races._Race, "step", step)
    train(fused(plain))
    number = len(list(plain.layers[0].parameters())) + 1
    assert found == {OURS: {number}, EAGER: {number}}


def test_calls_of_a_race_do_no_work_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begin looks at all parameters of the model, at the expense of our form alone."""
    begun, real = list[nn.Module](), Planner.begin

    def begin(self: Planner, module: nn.Module, rows: int) -> None:
        begun.append(module)
        real(self, module, rows)

    monkeypatch.setattr(Planner, "begin", begin)
    m = fused(model(), memory="auto")
    with taking(FAST, SLOW) as calls:
        train(m)
    assert calls.count(OURS) > 2
    first, second = m.layers
    assert begun == [first, first, second]  # before the race, and as the step calls them
    assert m(IDS)[0].requires_grad
    assert begun[3:] == [first, second]


def test_a_block_that_counts_its_calls_is_not_raced() -> None:
    ours = fused(model())
    for layer in ours.layers:
        layer.counts = True
    with taking(SLOW, FAST) as calls:
        train(ours)
    assert calls == [EAGER] * 2
    assert [layer.count for layer in ours.layers] == [1, 1]
    assert "changes attributes" in raced()[0].refused["every other"]


def test_a_bucket_is_of_sizes_casts_and_what_is_trained() -> None:
    ours = fused(model())
    with taking(SLOW, FAST):
        train(ours)
        train(ours, IDS.repeat(4, 1))
        with torch.autocast("cpu", torch.bfloat16):
            train(ours)
        for layer in ours.layers:
            layer.weight.requires_grad_(False)
        train(ours)
    names = [c.question for c in raced()]
    assert len(set(names)) == len(names) == 4
    assert [" for 32 tokens" in name for name in names] == [True, False, True, True]


def test_blocks_of_other_kinds_are_raced_apart() -> None:
    ours = fused(model(layers=3))
    ours.layers[1].linear = nn.Sequential(nn.Linear(32, 32), nn.GELU())
    with taking(SLOW, FAST):
        train(ours)
    assert len(raced()) == 2


def test_norms_outside_blocks_are_raced_too() -> None:
    plain = model()
    plain.norm = Norm()
    with taking(SLOW, FAST):
        train(fused(plain))
    assert [c.candidate for c in raced("Norm")] == [EAGER]
    assert len(as_they_were(plain)) == 1  # as it says the same of both


def test_evaluation_follows_training() -> None:
    ours = fused(model())
    with taking(SLOW, FAST) as calls:
        with torch.no_grad():
            ours(IDS)
        assert calls == []
        train(ours)
        before = choice.choices()
        with torch.no_grad():
            ours(IDS)
    assert choice.choices() == before
    assert as_they_were(ours)


@pytest.mark.parametrize("how", ["min", "16GB", "checkpoint", "reentrant", "ops", "fixed"])
def test_what_is_not_raced(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how in ("fixed", "ops"):
        monkeypatch.setenv(choice.VARIABLE, how)
    ours = fused(model(), memory=how if how in ("min", "16GB") else "speed")
    if how in ("checkpoint", "reentrant"):
        ours.reentrant = how == "reentrant"
    with taking(SLOW, FAST) as calls:
        train(ours)
    assert calls == []
    assert is_fused(ours)
    said = "inside the caller's checkpoints, blocks keep their input" in explain(ours).memory
    assert said == (how in ("checkpoint", "reentrant"))


def test_rows_of_several_samples_are_not_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks that are told where samples begin, as recurrent ones are."""
    monkeypatch.setattr(Watches, "has_mixers", lambda watches, module, forward: True)
    ours = fused(model())
    positions = torch.cat([torch.arange(5), torch.arange(6)])[None]
    for position_ids in (positions, torch.arange(11)[None]):
        with taking(SLOW, FAST) as calls:
            ours(IDS[:1], position_ids=position_ids)[0].sum().backward()
        assert bool(calls) is (position_ids is not positions)


def test_original_blocks_that_would_keep_too_much_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Meter, "capacity", lambda meter: meter.used() + 100_000)
    monkeypatch.setattr(Meter, "used", lambda meter: 0)
    ours = fused(model())
    with taking(SLOW, FAST) as calls:
        train(ours)
        train(ours)
    assert calls == [EAGER]
    assert is_fused(ours)
    (found,) = raced()
    assert (found.candidate, found.source) == (OURS, "fixed")
    assert "the original blocks would keep 0.00 GiB" in found.refused["every other"]
    assert "raced: Block" in str(explain(ours))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_a_race_that_fails_changes_nothing(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Any, form: str) -> list[Tensor]:
        raise kind("not now")

    monkeypatch.setattr(block_races._Race, "step", failing)
    ours = fused(model())
    train(ours)
    assert is_fused(ours)
    assert "not now" in raced()[0].refused["every other"]


def test_a_plan_that_keeps_less_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "is_fastest", lambda planner, module: False)
    ours = fused(model(), memory="auto")
    with taking(SLOW, FAST):
        train(ours)
    assert is_fused(ours)
    assert "keep less than is fastest" in raced()[0].refused["every other"]


def test_the_plan_of_auto_is_the_fastest_where_there_is_memory() -> None:
    ours = fused(model(), memory="auto")
    with taking(SLOW, FAST):
        train(ours)
    assert as_they_were(ours)


def test_what_explain_has_captured_is_forgotten_when_the_block_loses() -> None:
    ours = fused(model())
    with taking(SLOW, FAST) as calls:
        assert is_fused(ours)
        assert calls == []  # its tiny step says nothing of the user's
        train(ours)
    assert not is_fused(ours)


def test_a_report_says_that_races_are_still_to_come() -> None:
    ours = fused(model())
    with taking(FAST, SLOW):
        assert "\n  not final: the first training step races" in str(explain(ours))
        assert "not final:" in explain(ours)._repr_html_()
        with torch.no_grad():
            ours(IDS)
        assert explain(ours).pending
        train(ours)
        assert "not final" not in str(explain(ours))
    again = fused(model())
    assert explain(again).pending  # though its blocks are known: no call has asked


def test_a_report_is_final_where_nothing_will_be_raced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not explain(fused(model(), memory="min")).pending
    assert not explain(restore(fused(model()))).pending
    monkeypatch.setenv(choice.VARIABLE, "ops")
    assert not explain(fused(model())).pending


def test_a_step_in_which_no_block_may_be_raced_makes_a_report_final() -> None:
    ours = fused(model())
    ours.reentrant = False
    with taking(SLOW, FAST) as calls:
        train(ours)
    assert calls == []
    assert not explain(ours).pending


def test_a_report_has_the_races_of_its_own_model() -> None:
    first, second = fused(model()), fused(model())
    with taking(SLOW, FAST):
        train(first)
    assert "raced: Block of 32" in str(explain(first))
    assert explain(second).choices == ()
    train(second)
    assert explain(second).choices == explain(first).choices


def test_a_block_that_wins_somewhere_shows_both() -> None:
    ours = fused(model())
    with taking(FAST, SLOW):
        train(ours, IDS.repeat(4, 1))
    with taking(SLOW, FAST):
        train(ours)
    assert is_fused(ours)
    assert len(as_they_were(ours)) == 1


def test_restored_models_are_what_they_were() -> None:
    plain = model()
    before = {name: dict(vars(m)) for name, m in plain.named_modules()}
    fused(plain)
    with taking(SLOW, FAST):
        train(plain)
    restore(plain)
    assert {name: dict(vars(m)) for name, m in plain.named_modules()} == before
    other = model()
    plain.zero_grad()
    assert torch.equal(train(plain), train(other))
    require_equal_gradients(plain, other)


def test_later_processes_and_resumed_runs_choose_the_same() -> None:
    first = fused(model())
    with taking(SLOW, FAST):
        want = train(first)
    saved = choice.records()
    for source in ("kept", "resumed"):
        choice._CHOICES.clear()
        if source == "resumed":
            for path in choice.kept_folder().glob("choice-*"):
                path.unlink()
            choice.adopt(saved)
        again = fused(model())
        with taking(FAST, SLOW) as calls:
            assert torch.equal(train(again), want)  # from the first step on
        assert calls == []
        assert len(as_they_were(again)) == 1
        assert [c.source for c in raced()] == [source]
        require_equal_gradients(first, again)


def test_ranks_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, fusing = dist.HashStore(), []
    monkeypatch.setattr(choice, "has_peers", lambda: True)
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)
    for rank, seconds in enumerate([(FAST, SLOW), (SLOW, FAST)]):  # each would choose another
        with own_choices(tmp_path / str(rank)), taking(*seconds):
            monkeypatch.setenv(choice.VARIABLE, "raced")
            ours = fused(model())
            train(ours)
            fusing.append(is_fused(ours))
    assert fusing == [True, True]


def test_rules_and_memory_have_races_of_their_own() -> None:
    settings: list[dict[str, Any]] = [{}, {"passes": (LayerNorm(), RMSNorm())}, {"memory": "auto"}]
    for options in settings:
        with taking(SLOW, FAST):
            train(fused(model(), **options))
    assert len({c.question for c in raced()}) == 3


def test_a_block_that_cannot_be_captured_says_that() -> None:
    ours, plain = fused(model()), model()
    for each in (ours, plain):
        for layer in each.layers:
            layer.breaks = True
    with taking(SLOW, FAST):
        assert torch.equal(train(ours), train(plain))
    assert as_they_were(ours) == []
    assert "could not be captured" in str(explain(ours))
